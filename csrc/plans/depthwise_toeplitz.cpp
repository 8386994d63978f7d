#include <algorithm>

#include "../cost.h"
#include "families.h"

namespace fused_cna {

namespace {

// Warp instructions, counted in the compiled kernel.
constexpr double instructions_per_block = 3500;   // coordinates, the table of the filter, folds, staging
constexpr double instructions_per_item = 133;     // four pixels of 8 channels brought and transposed
constexpr double instructions_per_multiply = 5;   // with its share of loads and of the check for infinities
constexpr double instructions_per_result = 12.5;  // fold, a cheap activation, rounding, store

// Assumptions that no measurement has yet replaced.
constexpr double instructions_per_cycle = 2.5;

int filter_rows_of_pass(const Plan& plan) { return toeplitz_filter_rows[plan.tile_index]; }

int64_t passes(const ConvProblem& problem, int filter_rows) { return ceil_div(problem.r, filter_rows); }

int padded_filter_rows(const ConvProblem& problem, const Plan& plan) {
    return static_cast<int>(passes(problem, filter_rows_of_pass(plan))) * filter_rows_of_pass(plan);
}

int64_t shared_bytes(const ConvProblem& problem, const Plan& plan) {
    return StripMemory::of(plan.strips, padded_filter_rows(problem, plan)).total;
}

Estimate estimate(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const StripPlanes planes = StripPlanes::of(plan.strips, padded_filter_rows(problem, plan));
    const double rows = filter_rows_of_pass(plan), channels = StripTile::channels;
    const double channel_passes = channels * static_cast<double>(passes(problem, filter_rows_of_pass(plan)));
    // Warps that have no strip of the tile store nothing.
    const double results = static_cast<double>(ceil_div(plan.strips.strips(), 4)) * 4 * StripTile::strip_rows *
                           StripTile::strip_columns * channels;
    const double multiplies = channel_passes * rows * StripTile::strip_rows;
    constexpr double products_per_multiply = 16 * 8 * 16;

    const double x_matrices = channel_passes * (rows + StripTile::strip_rows - 1) * 512;
    const double filter_words = channel_passes * rows * shared_bytes_per_cycle;
    // All accumulators are written once, the results read with two lanes to a bank.
    const double staged = (StripTile::pixels * channels + results * 2) * 4;
    const double shared = (planes.plane * 16 * channels + x_matrices + filter_words + staged) / shared_bytes_per_cycle;
    const double items = plan.strips.images * planes.rows * planes.row * 2 * channels / 8;
    const double issue = (instructions_per_block + (items * instructions_per_item + results * instructions_per_result) / 32 +
                          multiplies * instructions_per_multiply) /
                         instructions_per_cycle;
    const double cycles =
        std::max({multiplies * products_per_multiply / (mma_per_clock(device) * mma_share), shared, issue});
    // The phases of a block wait for each other, which only other blocks can hide.
    const double lone = 2 * memory_latency + shared + issue;
    const int64_t resident =
        resident_blocks(StripTile::threads, shared_bytes(problem, plan), StripTile::blocks_per_multiprocessor, device);
    return {.products_us = as_us(waves(plan, 1, device) * cycles, device),
            .bytes_us = transfer_us(compulsory_bytes(problem), device),
            .latency_us = as_us(waves(plan, resident, device) * lone, device),
            .overhead_us = launch_us + conversions_us(problem, plan, device)};
}

// Why the kernel cannot run the problem, whatever the tile; empty where it can.
std::string unfit(const ConvProblem& problem, const DeviceInfo& device) {
    if (!too_old(device).empty()) return too_old(device);
    if (problem.dtype == DType::float32) return "its tensor cores take float16 and bfloat16, not float32";
    if (problem.groups != problem.c || problem.groups != problem.k) {
        return "it is depthwise with as many output as input channels, this is " + std::to_string(problem.c) + " to " +
               std::to_string(problem.k) + " channels in " + std::to_string(problem.groups) + " groups";
    }
    if (problem.stride_h != 1 || problem.stride_w != 1 || problem.dil_h != 1 || problem.dil_w != 1) {
        return "strides and dilations must be 1";
    }
    if (problem.s < 2 || problem.s > StripMemory::widest_filter) {
        return "the filter is " + std::to_string(problem.s) + " wide, it takes widths from 2 to " +
               std::to_string(StripMemory::widest_filter);
    }
    // no higher filter's table fits any device's shared memory
    if (constexpr int64_t highest = 128; problem.r > highest)
        return with_numbers("the filter has", problem.r, " rows", highest);
    if (constexpr int64_t most_images = int_limit - StripTile::most_strips; problem.n > most_images) {
        return with_numbers("it counts", problem.n, " images", most_images);
    }
    if (problem.dense_pixel_access() < 4) {
        return "a pixel's " + std::to_string(problem.c) + " channels allow loads of 2 bytes, it takes 16 or 4";
    }
    return "";
}

Plan base_plan(const ConvProblem& problem) {
    Plan plan{.kernel = Kernel::depthwise_toeplitz};
    // The one with fewer rows of zeros behind the filter's last.
    plan.tile_index = passes(problem, toeplitz_filter_rows[1]) * toeplitz_filter_rows[1] <=
                              passes(problem, toeplitz_filter_rows[0]) * toeplitz_filter_rows[0]
                          ? 1
                          : 0;
    plan.convert_x = problem.x_pixel_access < 4;
    const int64_t access = plan.convert_x ? problem.dense_pixel_access() : problem.x_pixel_access;
    plan.access_bytes = access == 16 ? 16 : 4;
    return plan;
}

Candidate candidate_of_tile(const ConvProblem& problem, const DeviceInfo& device, const Plan& base, const StripTile& tile) {
    Candidate candidate{.plan = base};
    Plan& plan = candidate.plan;
    plan.strips = tile;
    plan.tile = {tile.strips() * StripTile::strip_rows * StripTile::strip_columns, StripTile::channels,
                 filter_rows_of_pass(plan) * 16};
    plan.blocks = ceil_div(problem.c, StripTile::channels) * ceil_div(problem.q(), tile.columns()) *
                  ceil_div(problem.p(), tile.rows()) * ceil_div(problem.n, tile.images);
    if (const int64_t bytes = shared_bytes(problem, plan); bytes > device.shared_per_block) {
        candidate.illegal = with_numbers("it needs", bytes, " bytes of shared memory", device.shared_per_block);
    } else if (plan.blocks > int_limit) {
        candidate.illegal = with_numbers("it needs", plan.blocks, " blocks", int_limit);
    } else {
        plan.estimate = estimate(problem, plan, device);
    }
    return candidate;
}

// How many images a tile of so many strips may hold: as many as fill it, and half of that where blocks may be few. Several
// only where they are whole.
std::vector<int> useful_images(const ConvProblem& problem, const StripTile& strips) {
    if (strips.rows() < problem.p() || strips.columns() < problem.q()) return {1};
    const int most = static_cast<int>(std::min<int64_t>(problem.n, StripTile::most_strips / strips.strips()));
    if (most <= 1) return {1};
    return {most, (most + 1) / 2};
}

}  // namespace

void add_depthwise_toeplitz(const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all) {
    const Plan base = base_plan(problem);
    if (const std::string illegal = unfit(problem, device); !illegal.empty()) {
        all.push_back({base, illegal});
        return;
    }
    const int most_across =
        static_cast<int>(std::min<int64_t>(ceil_div(problem.q(), StripTile::strip_columns), StripTile::most_strips));
    for (int across = 1; across <= most_across; ++across) {
        const int most_down = static_cast<int>(
            std::min<int64_t>(ceil_div(problem.p(), StripTile::strip_rows), StripTile::most_strips / across));
        // Tiles that could be twice as high only read more.
        for (int down = most_down / 2 + 1; down <= most_down; ++down) {
            StripTile tile{1, down, across};
            for (const int images : useful_images(problem, tile)) {
                tile.images = images;
                all.push_back(candidate_of_tile(problem, device, base, tile));
            }
        }
    }
}

std::string describe_depthwise_toeplitz(const Plan& plan) {
    const StripTile& tile = plan.strips;
    std::string text = " strips " + std::to_string(tile.images) + "x" + std::to_string(tile.down) + "x" +
                       std::to_string(tile.across) + " " + std::to_string(plan.access_bytes) + "-byte";
    if (plan.convert_x) text += " after a copy of x";
    return text;
}

}  // namespace fused_cna
