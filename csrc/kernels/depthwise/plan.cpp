// When `depthwise` is legal, its versions, and their estimated time.
#include <algorithm>

#include "plan/cost.h"
#include "plan/families.h"

namespace fused_cna::depthwise {

namespace {

using fused_cna::resident_blocks;

// Counted in the machine code, for float32 and 16-bit types alike except for conversions; not measured yet.
constexpr double row_instructions = 25;         // for a filter row, or a tap of any filter, besides its loads
constexpr double load_instructions = 6;         // for a chunk: address, predicate, zeros and the load
constexpr double narrow_load_instructions = 9;  // more for a chunk in pieces
constexpr double value_load_instructions = 6;   // more per value loaded alone
constexpr double pixel_instructions = 90;       // to finish and store a chunk
constexpr double strip_instructions = 180;      // to find a strip and to stage its sums
constexpr double weight_instructions = 15;      // to copy one weight into shared memory
constexpr int64_t most_rounds = 16;             // per block: more would make blocks too long to balance the load

int64_t all_strips(const ConvProblem& problem) {
    const int64_t p = problem.p(), bands = bands_of(p);
    return problem.n * bands * ceil_div(p, bands) * ceil_div(problem.q(), strip_columns);
}

int64_t slabs(const ConvProblem& problem, const Plan& plan) { return ceil_div(problem.k, plan.tile.n); }

int64_t resident_blocks(const ConvProblem& problem, const Tile& tile, const DeviceInfo& device) {
    return resident_blocks(threads, tile.shared_bytes(size_in_bytes(problem.dtype)), tile.blocks_per_multiprocessor, device);
}

// The instructions of one thread for one strip: multiply-adds, the main loop including them, and all.
struct StripWork {
    double products, loop, all;
};

StripWork work_of_strip(const ConvProblem& problem, const Tile& tile, const Plan& plan) {
    const double values = static_cast<double>(16 / size_in_bytes(problem.dtype)), columns = strip_columns;
    const double taps = static_cast<double>(problem.r * problem.s);
    const double products = columns * values * taps;
    const double rows = tile.takes_any() ? taps : tile.filter;
    const double loads = rows * (tile.takes_any() ? columns : (columns - 1) * tile.stride + tile.filter);
    double load = load_instructions + (problem.dtype == DType::float32 ? 0 : values);
    if (plan.vector_bytes < 16) load += narrow_load_instructions;
    if (tile.by_value) load += value_load_instructions * values;
    const double loop = products + loads * load + rows * row_instructions;
    return {products, loop, loop + columns * pixel_instructions * values / 8 + strip_instructions};
}

Estimate estimate(const ConvProblem& problem, const Tile& tile, const Plan& plan, const DeviceInfo& device) {
    const StripWork work = work_of_strip(problem, tile, plan);
    const double cycles = std::max(work.all / 32 / issued_per_cycle, work.products / fma_per_clock(device)) * threads;
    const int64_t strips_of_block = plan.tile.m / strip_columns;
    const int64_t blocks_of_slab = std::max<int64_t>(1, plan.blocks / slabs(problem, plan));
    const double rounds = static_cast<double>(ceil_div(all_strips(problem), blocks_of_slab * strips_of_block));
    const double taps = static_cast<double>(problem.r * problem.s);
    const double weights = weight_instructions * taps * plan.tile.n / threads;
    // A strip's first row comes from memory; strips above and below have already requested the others.
    const double rows = tile.takes_any() ? taps : tile.filter;
    const double waits = (rounds - 1) * memory_latency + rounds * (rows - 1) * step_latency;
    return {
        .products_us = as_us(waves(plan, 1, device) * (weights + rounds * cycles), device),
        .bytes_us = transfer_us(compulsory_bytes(problem), device),
        .latency_us = as_us(
            waves(plan, resident_blocks(problem, tile, device), device) * (block_ends + waits + rounds * work.loop), device),
        .overhead_us = launch_us + conversions_us(problem, plan, device)};
}

std::string unsupported_reason(const ConvProblem& problem, const Tile& tile, const Plan& plan) {
    const std::string filter = std::to_string(tile.filter) + "x" + std::to_string(tile.filter);
    const bool fits_filter = problem.r == tile.filter && problem.s == tile.filter && problem.stride_h == tile.stride &&
                             problem.stride_w == tile.stride && problem.dil_h == 1 && problem.dil_w == 1;
    // Coordinates of the last strip's columns, and of the last band's surplus strips.
    const int64_t last = std::max(problem.padded_w() + strip_columns * problem.stride_w,
                                  problem.padded_h() + most_band_rows * problem.stride_h);
    const int64_t strips = all_strips(problem);
    if (!tile.takes_any() && !fits_filter) {
        return "this version takes " + filter + " filters with stride " + std::to_string(tile.stride) + " and dilation 1";
    }
    if (!tile.by_value && problem.k != problem.c) {
        return "this version takes one output channel per input channel, there are " + std::to_string(problem.k_per_group());
    }
    if (!tile.by_value && plan.vector_bytes < 4) {
        return "a pixel's " + std::to_string(problem.c) + " channels allow loads of " +
               std::to_string(problem.dense_pixel_vector_bytes()) + " bytes, this version takes at least 4";
    }
    if (last > int_limit) return with_numbers("the last strip ends at row or column", last, "", int_limit);
    if (std::max(strips, plan.blocks) > int_limit) {
        return with_numbers("it needs", std::max(strips, plan.blocks), " strips or blocks", int_limit);
    }
    return "";
}

Candidate candidate_of_tile(const ConvProblem& problem, const DeviceInfo& device, int index) {
    const Tile& tile = tiles[index];
    Candidate candidate{.plan = {.kernel = Kernel::depthwise, .choice = Choice{index}}};
    Plan& plan = candidate.plan;
    // A copy makes channels dense, which every version needs, and may widen the loads.
    plan.convert_x = problem.x_pixel_vector_bytes == 0 || (!tile.by_value && problem.x_pixel_vector_bytes < 4);
    const int64_t widest = plan.convert_x ? problem.dense_pixel_vector_bytes() : problem.x_pixel_vector_bytes;
    plan.vector_bytes = tile.by_value ? 0 : widest == 16 ? 16 : static_cast<int>(std::min<int64_t>(widest, 4));

    // Slabs of equal numbers of chunks, so that few threads idle on channels that do not exist.
    const int64_t values = 16 / size_in_bytes(problem.dtype), all_chunks = ceil_div(problem.k, values);
    const int64_t chunks = ceil_div(all_chunks, ceil_div(all_chunks, most_chunks));
    const int64_t strips = threads / chunks;
    const int64_t taps = problem.r * problem.s;
    plan.tile = {static_cast<int>(strips * strip_columns), static_cast<int>(chunks * values),
                 static_cast<int>(tile.takes_any() ? std::min<int64_t>(taps, most_taps) : taps)};

    // As many blocks as run at once, each with as many rounds as the others, so that each makes weights and folds only once.
    const int64_t blocks_of_slab = ceil_div(all_strips(problem), strips);
    const int64_t at_once = resident_blocks(problem, tile, device) * device.multiprocessors;
    const int64_t rounds = std::clamp<int64_t>(ceil_div(blocks_of_slab * slabs(problem, plan), at_once), 1, most_rounds);
    plan.blocks = ceil_div(blocks_of_slab, rounds) * slabs(problem, plan);
    plan.estimate = estimate(problem, tile, plan, device);
    candidate.unsupported_reason = unsupported_reason(problem, tile, plan);
    return candidate;
}

void list_candidates(Kernel, const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all) {
    if (problem.c_per_group() != 1) {
        const std::string given = std::to_string(problem.c_per_group());
        const Plan none{.kernel = Kernel::depthwise, .choice = Choice{}};
        all.push_back({none, "it takes one input channel a group, there are " + given});
        return;
    }
    for (int i = 0; i < static_cast<int>(tiles.size()); ++i) all.push_back(candidate_of_tile(problem, device, i));
}

std::string describe(const Plan& plan) {
    const Tile& tile = tiles[std::get<Choice>(plan.choice).tile];
    const std::string size = std::to_string(tile.filter);
    std::string text = " any filter";
    if (!tile.takes_any()) text = " " + size + "x" + size + " stride " + std::to_string(tile.stride);
    text += tile.by_value ? " by value" : " " + std::to_string(plan.vector_bytes) + "-byte";
    return text + describe_copies(plan);
}

Tiles list_tiles(Kernel, DType dtype) {
    Tiles all;
    for (const Tile& tile : tiles) {
        const auto& [filter, stride, blocks, by_value] = tile;
        all.push_back({filter, stride, blocks, by_value, threads, tile.shared_bytes(size_in_bytes(dtype))});
    }
    return all;
}

}  // namespace

extern const Family family{Kernel::depthwise, "depthwise", list_candidates, describe, list_tiles};

}  // namespace fused_cna::depthwise
