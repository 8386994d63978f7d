// When `depthwise_toeplitz` is legal, its tiles, and their estimated time.
#include <algorithm>

#include "plan/cost.h"
#include "plan/families.h"

namespace fused_cna::depthwise_toeplitz {

namespace {

// Warp instructions, counted in the compiled kernel.
constexpr double instructions_per_block = 3500;   // coordinates, the table of the filter, folds, staging
constexpr double instructions_per_item = 133;     // to copy and transpose four pixels of 8 channels
constexpr double instructions_per_multiply = 5;   // with its share of loads and of the check for infinities
constexpr double instructions_per_result = 12.5;  // fold, a cheap activation, rounding, store

const Choice& choice_of(const Plan& plan) { return std::get<Choice>(plan.choice); }
int rows_of_pass(const Choice& choice) { return filter_rows_of_pass[choice.pass]; }

int64_t passes(const ConvProblem& problem, int rows) { return ceil_div(problem.r, rows); }

Layout layout_of(const ConvProblem& problem, const Choice& choice) {
    return Layout::of(choice, static_cast<int>(passes(problem, rows_of_pass(choice))) * rows_of_pass(choice));
}

Estimate estimate(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const Choice& choice = choice_of(plan);
    const Layout layout = layout_of(problem, choice);
    const double rows = rows_of_pass(choice), channels = slab_channels;
    const double channel_passes = channels * static_cast<double>(passes(problem, rows_of_pass(choice)));
    // Warps without a strip of the tile store nothing.
    const double results = static_cast<double>(ceil_div(choice.strips(), 4)) * 4 * strip_rows * strip_columns * channels;
    const double multiplies = channel_passes * rows * strip_rows;
    constexpr double products_per_multiply = 16 * 8 * 16;

    const double x_matrices = channel_passes * (rows + strip_rows - 1) * 512;
    const double filter_words = channel_passes * rows * shared_bytes_per_cycle;
    // All accumulators are written once; the results are read with two lanes per bank.
    const double staged = (most_pixels * channels + results * 2) * 4;
    const double shared = (layout.plane * 16 * channels + x_matrices + filter_words + staged) / shared_bytes_per_cycle;
    const double items = choice.images * layout.rows * layout.row * 2 * channels / 8;
    const double issue = (instructions_per_block + (items * instructions_per_item + results * instructions_per_result) / 32 +
                          multiplies * instructions_per_multiply) /
                         issued_per_cycle;
    const double cycles =
        std::max({multiplies * products_per_multiply / (mma_per_clock(device) * mma_share), shared, issue});
    // A block's phases wait for each other; only other blocks can hide that.
    const double lone = 2 * memory_latency + shared + issue;
    const int64_t resident = resident_blocks(threads, layout.shared_bytes, blocks_per_multiprocessor, device);
    return {.products_us = as_us(waves(plan, 1, device) * cycles, device),
            .bytes_us = transfer_us(compulsory_bytes(problem), device),
            .latency_us = as_us(waves(plan, resident, device) * lone, device),
            .overhead_us = launch_us + conversions_us(problem, plan, device)};
}

// Why no tile can run the problem; empty where some may.
std::string unsupported_reason(const ConvProblem& problem, const DeviceInfo& device) {
    if (!too_old(device).empty()) return too_old(device);
    if (problem.dtype == DType::float32) return "its tensor cores take float16 and bfloat16, not float32";
    if (problem.groups != problem.c || problem.groups != problem.k) {
        return "it is depthwise with as many output as input channels, this is " + std::to_string(problem.c) + " to " +
               std::to_string(problem.k) + " channels in " + std::to_string(problem.groups) + " groups";
    }
    if (problem.stride_h != 1 || problem.stride_w != 1 || problem.dil_h != 1 || problem.dil_w != 1) {
        return "strides and dilations must be 1";
    }
    if (problem.s < 2 || problem.s > widest_filter) {
        return "the filter is " + std::to_string(problem.s) + " wide, it takes widths from 2 to " +
               std::to_string(widest_filter);
    }
    // the table of a higher filter fits no device's shared memory
    if (constexpr int64_t highest = 128; problem.r > highest)
        return with_numbers("the filter has", problem.r, " rows", highest);
    if (constexpr int64_t most_images = int_limit - most_strips; problem.n > most_images) {
        return with_numbers("it counts", problem.n, " images", most_images);
    }
    if (problem.dense_pixel_vector_bytes() < 4) {
        return "a pixel's " + std::to_string(problem.c) + " channels allow loads of 2 bytes, it takes 16 or 4";
    }
    return "";
}

// Everything that does not depend on the strips.
Plan base_plan(const ConvProblem& problem, const Choice& choice) {
    Plan plan{.kernel = Kernel::depthwise_toeplitz, .choice = choice};
    plan.convert_x = problem.x_pixel_vector_bytes < 4;
    plan.vector_bytes = (plan.convert_x ? problem.dense_pixel_vector_bytes() : problem.x_pixel_vector_bytes) == 16 ? 16 : 4;
    return plan;
}

Candidate candidate_of(const ConvProblem& problem, const DeviceInfo& device, const Choice& choice) {
    Candidate candidate{.plan = base_plan(problem, choice)};
    Plan& plan = candidate.plan;
    plan.tile = {choice.strips() * strip_rows * strip_columns, slab_channels, rows_of_pass(choice) * 16};
    plan.blocks = ceil_div(problem.c, slab_channels) * ceil_div(problem.q(), choice.columns()) *
                  ceil_div(problem.p(), choice.rows()) * ceil_div(problem.n, choice.images);
    if (const int64_t bytes = layout_of(problem, choice).shared_bytes; bytes > device.shared_per_block) {
        candidate.unsupported_reason = with_numbers("it needs", bytes, " bytes of shared memory", device.shared_per_block);
    } else if (plan.blocks > int_limit) {
        candidate.unsupported_reason = with_numbers("it needs", plan.blocks, " blocks", int_limit);
    } else {
        plan.estimate = estimate(problem, plan, device);
    }
    return candidate;
}

// How many images a tile of so many strips may hold: as many as fill it, or half, for more blocks. Several only where each
// image is whole.
std::vector<int> useful_images(const ConvProblem& problem, const Choice& choice) {
    if (choice.rows() < problem.p() || choice.columns() < problem.q()) return {1};
    const int most = static_cast<int>(std::min<int64_t>(problem.n, most_strips / choice.strips()));
    if (most <= 1) return {1};
    return {most, (most + 1) / 2};
}

void list_candidates(Kernel, const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all) {
    const auto padded_rows = [&](int rows) { return passes(problem, rows) * rows; };
    // The pass size that pads the filter with fewer rows of zeros.
    const int pass = padded_rows(filter_rows_of_pass[1]) <= padded_rows(filter_rows_of_pass[0]) ? 1 : 0;
    if (const std::string reason = unsupported_reason(problem, device); !reason.empty()) {
        all.push_back({base_plan(problem, {.pass = pass}), reason});
        return;
    }
    const int most_across = static_cast<int>(std::min<int64_t>(ceil_div(problem.q(), strip_columns), most_strips));
    for (int across = 1; across <= most_across; ++across) {
        const int most_down = static_cast<int>(std::min<int64_t>(ceil_div(problem.p(), strip_rows), most_strips / across));
        // Tiles that could be twice as high would only read more.
        for (int down = most_down / 2 + 1; down <= most_down; ++down) {
            Choice choice{pass, 1, down, across};
            for (const int images : useful_images(problem, choice)) {
                choice.images = images;
                all.push_back(candidate_of(problem, device, choice));
            }
        }
    }
}

std::string describe(const Plan& plan) {
    const Choice& choice = choice_of(plan);
    return " strips " + std::to_string(choice.images) + "x" + std::to_string(choice.down) + "x" +
           std::to_string(choice.across) + " " + std::to_string(plan.vector_bytes) + "-byte" + describe_copies(plan);
}

Tiles list_tiles(Kernel, DType dtype) {
    if (dtype == DType::float32) return {};
    return {{filter_rows_of_pass[0], threads}, {filter_rows_of_pass[1], threads}};
}

}  // namespace

extern const Family family{Kernel::depthwise_toeplitz, "depthwise_toeplitz", list_candidates, describe, list_tiles};

}  // namespace fused_cna::depthwise_toeplitz
