#include "cost.h"

#include <algorithm>

namespace fused_cna {

namespace {

// Assumptions that no measurement has yet replaced; times in multiprocessor cycles unless the name says otherwise.
constexpr double launch_us = 2.5;
constexpr double bandwidth_share = 0.9;  // of the datasheet's, that a kernel reaches
constexpr double mma_share = 0.85;       // of the tensor cores' rate, in a main loop that is fed
constexpr double memory_latency = 800;   // from a copy's start to its landing
constexpr double step_latency = 120;     // barrier, ldmatrix and first mma of a lone block's step
constexpr double prologue_and_epilogue = 3000;
constexpr double shared_bytes_per_cycle = 128;
constexpr double l2_bytes_per_cycle = 40;  // to one multiprocessor while all read
constexpr double copies_per_cycle = 8;     // cp.async of single threads
constexpr double direct_share = 0.25;      // of the CUDA cores' rate, in the main loop of `direct`
constexpr int64_t direct_blocks_per_multiprocessor = 3;
constexpr double load_cost = 10;  // multiply-adds in the time of one address and load, there

double as_us(double cycles, const DeviceInfo& device) { return cycles / (device.clock_ghz * 1e3); }

double transfer_us(double bytes, const DeviceInfo& device) { return bytes / (device.bandwidth_gbs * bandwidth_share * 1e3); }

double x_bytes(const ConvProblem& p) { return static_cast<double>(p.n * p.c * p.h * p.w * size_in_bytes(p.dtype)); }
double weight_bytes(const ConvProblem& p) { return static_cast<double>(p.k * p.gemm_k() * size_in_bytes(p.dtype)); }
double y_bytes(const ConvProblem& p) { return static_cast<double>(p.gemm_m() * p.k * size_in_bytes(p.dtype)); }

// What any kernel moves: each operand once. Pixels that a strided 1x1 filter skips are not read.
double compulsory_bytes(const ConvProblem& p) {
    const double pixels_read = std::min<double>(p.h * p.w, p.p() * p.q() * p.r * p.s);
    return x_bytes(p) * pixels_read / static_cast<double>(p.h * p.w) + weight_bytes(p) + y_bytes(p);
}

double conversion_us(double bytes, const DeviceInfo& device) { return launch_us + transfer_us(2 * bytes, device); }

}  // namespace

double Estimate::total_us() const { return std::max({products_us, bytes_us, latency_us}) + overhead_us; }

int64_t resident_blocks(const GemmTile& tile, const DeviceInfo& device) {
    constexpr int64_t reserved_bytes = 1024;  // shared memory that the system takes per block
    const int64_t by_threads = 2048 / tile.threads();
    const int64_t by_shared = device.shared_per_multiprocessor / (tile.shared_bytes() + reserved_bytes);
    if (tile.shared_bytes() > device.shared_per_block) return 0;
    return std::min<int64_t>({tile.blocks_per_multiprocessor, by_threads, by_shared});
}

Estimate estimate_direct(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const double m = plan.tile.m, n = plan.tile.n;
    const double products_per_block = m * n * static_cast<double>(problem.gemm_k());
    const double cycles = products_per_block * (1 + load_cost * (m + n) / (m * n)) / (fma_per_clock(device) * direct_share);
    const double rounds = static_cast<double>(ceil_div(plan.blocks, device.multiprocessors));
    const double waves =
        static_cast<double>(ceil_div(plan.blocks, direct_blocks_per_multiprocessor * device.multiprocessors));
    // Nothing is loaded ahead: every step waits for its own operands.
    const double steps = static_cast<double>(ceil_div(problem.gemm_k(), plan.tile.k));
    return {.products_us = as_us(rounds * cycles, device),
            .bytes_us = transfer_us(compulsory_bytes(problem), device),
            .latency_us = as_us(waves * (prologue_and_epilogue + steps * (memory_latency + step_latency)), device),
            .overhead_us = launch_us};
}

Estimate estimate_implicit_gemm(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const GemmTile& tile = implicit_gemm_tiles[plan.tile_index];
    const double k = plan.tile.k;
    const double rate = mma_per_clock(device) * mma_share / (problem.dtype == DType::float32 ? 2 : 1);
    const double operand_bytes = static_cast<double>(tile.m + tile.n) * tile.k_bytes;
    const double fragment_bytes =
        (static_cast<double>(tile.m) * tile.warps_n + static_cast<double>(tile.n) * tile.warps_m) * tile.k_bytes;
    const double step = std::max({tile.m * tile.n * k / rate, (operand_bytes + fragment_bytes) / shared_bytes_per_cycle,
                                  operand_bytes / l2_bytes_per_cycle, operand_bytes / plan.access_bytes / copies_per_cycle});
    const int64_t all_steps = problem.r * problem.s * ceil_div(problem.c_per_group(), plan.tile.k);
    const double steps = static_cast<double>(ceil_div(all_steps, plan.split_k));

    const double rounds = static_cast<double>(ceil_div(plan.blocks, device.multiprocessors));
    const int64_t at_once = device.multiprocessors * resident_blocks(tile, device);
    const double waves = static_cast<double>(ceil_div(plan.blocks, at_once));
    const double lone_step = std::max({step, step_latency, memory_latency / (tile.stages - 1)});

    Estimate estimate{.products_us = as_us(rounds * steps * step, device),
                      .bytes_us = transfer_us(compulsory_bytes(problem), device),
                      .latency_us = as_us(waves * (prologue_and_epilogue + steps * lone_step), device),
                      .overhead_us = launch_us};
    if (plan.convert_x) estimate.overhead_us += conversion_us(x_bytes(problem), device);
    if (plan.convert_weight) estimate.overhead_us += conversion_us(weight_bytes(problem), device);
    if (plan.split_k > 1) {
        estimate.overhead_us += launch_us + transfer_us(2 * static_cast<double>(plan.workspace_bytes), device);
    }
    return estimate;
}

}  // namespace fused_cna
