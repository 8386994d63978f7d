// When `small_m` is legal, and its estimated time for each size of team.
#include <algorithm>
#include <cmath>
#include <vector>

#include "plan/cost.h"
#include "plan/families.h"

namespace fused_cna::small_m {

namespace {

// With more rows, so many blocks read and convert the same filters that tensor cores are faster, or nearly as fast.
constexpr int64_t most_rows = 256;

// In cycles, measured on an H200.
constexpr double turn_latency = 520;          // to finish and store one output per thread; a few take no longer
constexpr double shuffle_latency = 19;        // to sum the values of all lanes into half of them
constexpr double instructions_of_ends = 250;  // outside the loop, where many blocks share a multiprocessor

// Instructions counted in the machine code.
constexpr double chunk_instructions = 16;  // addresses and masks of one chunk
constexpr double coordinates = 17;         // more, for a filter of several taps
constexpr double piece_instructions = 8;   // for each further load of a chunk
constexpr double sector_bytes = 32;        // moved by the L2 for a single value

int64_t chunks_of(const ConvProblem& problem) {
    return problem.r * problem.s * ceil_div(problem.c_per_group() * size_in_bytes(problem.dtype), 16);
}

const Choice& choice_of(const Plan& plan) { return std::get<Choice>(plan.choice); }
const Tile& tile_of(const Plan& plan) { return tiles[choice_of(plan).tile]; }

int64_t steps_of(const ConvProblem& problem, const Plan& plan) {
    return ceil_div(chunks_of(problem), choice_of(plan).lanes * tile_of(plan).unroll_of(plan.vector_bytes));
}

// A warp's instructions in the main loop. Addresses are made for every chunk of a step, products only for those with values.
double instructions(const ConvProblem& problem, const Plan& plan) {
    const Tile& tile = tile_of(plan);
    const double values = 16.0 / static_cast<double>(size_in_bytes(problem.dtype)), pieces = 16.0 / plan.vector_bytes;
    const double to_float = problem.dtype == DType::float32 ? 0 : values;
    const double address =
        chunk_instructions + (choice_of(plan).is_pointwise ? 0 : coordinates) + (pieces - 1) * piece_instructions;
    const double steps = static_cast<double>(steps_of(problem, plan));
    const double with_values = static_cast<double>(ceil_div(chunks_of(problem), choice_of(plan).lanes));
    const double operands = tile.rows + tile.channels, sums = tile.rows * tile.channels;
    return steps * (tile.unroll_of(plan.vector_bytes) * operands * address + sums) +
           with_values * (operands * to_float + sums * values);
}

// Bytes of one block through the L2: each team reads its own filters, and all read the same rows, which the L1 keeps.
double block_bytes(const ConvProblem& problem, const Plan& plan) {
    const double values = 16.0 / static_cast<double>(size_in_bytes(problem.dtype));
    const auto moved = [&](int64_t filters_or_rows, bool is_dense) {
        return static_cast<double>(filters_or_rows * chunks_of(problem)) * (is_dense ? 16 : values * sector_bytes);
    };
    return moved(std::min<int64_t>(plan.tile.n, problem.gemm_n()), plan.convert_weight || problem.weight_vector_bytes > 0) +
           moved(std::min<int64_t>(plan.tile.m, problem.gemm_m()), plan.convert_x || problem.x_vector_bytes > 0);
}

// Cycles of a lone block after its loop: sums over the lanes of a warp, then outputs, per thread a tile row at a time.
double end_latency(const Plan& plan) {
    const Tile& tile = tile_of(plan);
    const double shuffles = tile.rows * tile.channels * std::log2(std::min(choice_of(plan).lanes, 32));
    const double turns = static_cast<double>(ceil_div(int64_t{plan.tile.m} * plan.tile.n, Tile::threads * tile.channels));
    return shuffles * shuffle_latency + turns * turn_latency;
}

Estimate estimate(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    constexpr double warps = Tile::threads / 32.0;
    const double loop = instructions(problem, plan), steps = static_cast<double>(steps_of(problem, plan));
    const double arrival = block_bytes(problem, plan) / l2_bytes_per_cycle;
    const double blocks = waves(plan, 1, device);  // per multiprocessor
    return {.products_us = as_us(blocks * warps * (loop + instructions_of_ends) / issued_per_cycle, device),
            .bytes_us = std::max(transfer_us(compulsory_bytes(problem), device), as_us(blocks * arrival, device)),
            // Nothing is loaded ahead of a step; each step starts many loads instead.
            .latency_us = as_us(waves(plan, Tile::blocks_per_multiprocessor, device) *
                                    (steps * memory_latency + arrival + loop + end_latency(plan)),
                                device),
            .overhead_us = launch_us + conversions_us(problem, plan, device)};
}

// Team sizes to compare: every lane has work, and none takes too long.
std::vector<int> useful_lanes(const ConvProblem& problem, const Plan& plan) {
    constexpr int64_t most_steps = 16;
    std::vector<int> useful;
    for (int lanes = 1; lanes <= Tile::threads; lanes *= 2) {
        Plan with_lanes = plan;
        std::get<Choice>(with_lanes.choice).lanes = lanes;
        const bool all_work = lanes == 1 || lanes / 2 < chunks_of(problem);
        if (all_work && (lanes == Tile::threads || steps_of(problem, with_lanes) <= most_steps)) {
            useful.push_back(lanes);
        }
    }
    return useful;
}

std::string unsupported_reason(const ConvProblem& problem, const Plan& plan) {
    constexpr int64_t reach = 8 * 1024;  // lanes without a chunk compute an index this far beyond the end
    if (problem.gemm_k() == 0) return "there is nothing to multiply";
    if (problem.gemm_m() > most_rows) return with_numbers("output pixels number", problem.gemm_m(), "", most_rows);
    if (std::max(problem.gemm_k() + reach, plan.blocks) > int_limit) {
        return with_numbers("it needs", std::max(problem.gemm_k() + reach, plan.blocks), " products or blocks", int_limit);
    }
    return "";
}

// A plan for every team size. Without dense channels it loads value by value, or copies first where `convert`.
void add_form(const ConvProblem& problem, const DeviceInfo& device, int index, bool convert, std::vector<Candidate>& all) {
    const Tile& tile = tiles[index];
    const bool has_one_tap =
        problem.r == 1 && problem.s == 1 && problem.padded_h() == problem.h && problem.padded_w() == problem.w;
    Plan plan{.kernel = Kernel::small_m, .choice = Choice{.tile = index}};
    auto& choice = std::get<Choice>(plan.choice);
    plan.convert_x = convert && problem.x_vector_bytes == 0;
    plan.convert_weight = convert && problem.weight_vector_bytes == 0;
    const int64_t widest = std::min(plan.convert_x ? problem.dense_vector_bytes() : problem.x_vector_bytes,
                                    plan.convert_weight ? problem.dense_vector_bytes() : problem.weight_vector_bytes);
    plan.vector_bytes = static_cast<int>(std::max(widest, size_in_bytes(problem.dtype)));
    choice.is_pointwise = has_one_tap && widest == 16;
    for (const int lanes : useful_lanes(problem, plan)) {
        choice.lanes = lanes;
        plan.tile = {tile.rows, Tile::threads / lanes * tile.channels,
                     lanes * tile.unroll_of(plan.vector_bytes) * static_cast<int>(16 / size_in_bytes(problem.dtype))};
        plan.blocks = ceil_div(problem.gemm_m(), tile.rows) * ceil_div(problem.gemm_n(), plan.tile.n) * problem.groups;
        plan.estimate = estimate(problem, plan, device);
        all.push_back({plan, unsupported_reason(problem, plan)});
        if (!all.back().is_supported()) return;  // the reason is the same for all
    }
}

void list_candidates(Kernel, const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all) {
    for (int i = 0; i < static_cast<int>(tiles.size()); ++i) {
        add_form(problem, device, i, false, all);
        if (problem.x_vector_bytes == 0 || problem.weight_vector_bytes == 0) add_form(problem, device, i, true, all);
    }
}

std::string describe(const Plan& plan) {
    return " lanes " + std::to_string(choice_of(plan).lanes) + (choice_of(plan).is_pointwise ? " pointwise " : " plain ") +
           std::to_string(plan.vector_bytes) + "-byte" + describe_copies(plan);
}

Tiles list_tiles(Kernel, DType) {
    Tiles all;
    for (const Tile& tile : tiles) all.push_back({tile.rows, tile.channels, tile.unroll, Tile::threads});
    return all;
}

}  // namespace

extern const Family family{Kernel::small_m, "small_m", list_candidates, describe, list_tiles};

}  // namespace fused_cna::small_m
