// When `direct` is legal, and its estimated time.
#include <algorithm>

#include "plan/cost.h"
#include "plan/families.h"

namespace fused_cna::direct {

namespace {

constexpr double fma_share = 0.15;  // of the CUDA cores' rate, in the main loop; measured on an H200
constexpr double load_cost = 28;    // multiply-adds in the time of one address and load, 110 instructions; on an H200

Estimate estimate(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const double m = plan.tile.m, n = plan.tile.n;
    const double products_per_block = m * n * static_cast<double>(problem.gemm_k());
    const double cycles = products_per_block * (1 + load_cost * (m + n) / (m * n)) / (fma_per_clock(device) * fma_share);
    // Nothing is loaded ahead: every step waits for its own operands. Steps are counted whole, also the last.
    const double steps = static_cast<double>(ceil_div(problem.gemm_k(), plan.tile.k));
    const double loads = load_cost * (m + n) * plan.tile.k / (fma_per_clock(device) * fma_share);
    return {.products_us = as_us(waves(plan, 1, device) * cycles, device),
            .bytes_us = transfer_us(compulsory_bytes(problem), device),
            .latency_us = as_us(waves(plan, blocks_per_multiprocessor, device) *
                                    (block_ends + steps * (loads + memory_latency + step_latency)),
                                device),
            .overhead_us = launch_us};
}

Candidate candidate_of_tile(const ConvProblem& problem, const DeviceInfo& device, int index) {
    const BlockTile& tile = tiles[index];
    Candidate candidate{.plan = {.kernel = Kernel::direct, .choice = Choice{index}, .tile = tile}};
    Plan& plan = candidate.plan;
    plan.blocks = ceil_div(problem.gemm_m(), tile.m) * ceil_div(problem.gemm_n(), tile.n) * problem.groups;
    plan.estimate = estimate(problem, plan, device);
    if (plan.blocks > int_limit) candidate.unsupported_reason = with_numbers("it needs", plan.blocks, " blocks", int_limit);
    return candidate;
}

void list_candidates(Kernel, const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all) {
    for (int i = 0; i < static_cast<int>(tiles.size()); ++i) all.push_back(candidate_of_tile(problem, device, i));
}

std::string describe(const Plan&) { return ""; }

Tiles list_tiles(Kernel, DType) {
    Tiles all;
    for (const BlockTile& tile : tiles) all.push_back({tile.m, tile.n, tile.k, threads});
    return all;
}

}  // namespace

extern const Family family{Kernel::direct, "direct", list_candidates, describe, list_tiles};

}  // namespace fused_cna::direct
