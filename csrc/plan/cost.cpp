#include "plan/cost.h"

#include <algorithm>
#include <tuple>

namespace fused_cna {

namespace {

constexpr double bandwidth_share = 0.9;  // of the datasheet's, that a kernel reaches
constexpr double clock_share = 0.86;     // of the highest clock, under load: 1.7 of 1.98 GHz on an H100

double conversion_us(double bytes, const DeviceInfo& device) { return launch_us + transfer_us(2 * bytes, device); }

}  // namespace

double Estimate::total_us() const { return std::max({products_us, bytes_us, latency_us}) + overhead_us; }

bool Estimate::operator<(const Estimate& other) const {
    return std::tuple(total_us(), products_us, latency_us) <
           std::tuple(other.total_us(), other.products_us, other.latency_us);
}

double as_us(double cycles, const DeviceInfo& device) { return cycles / (device.clock_ghz * clock_share * 1e3); }

double transfer_us(double bytes, const DeviceInfo& device) { return bytes / (device.bandwidth_gbs * bandwidth_share * 1e3); }

double l2_us(double bytes, const DeviceInfo& device) {
    return as_us(bytes / (l2_bytes_per_cycle * device.multiprocessors), device);
}

double l2_bytes_per_cycle_of(int64_t blocks, const DeviceInfo& device) {
    const double all_that_share = device.multiprocessors * 0.8;  // from this many blocks on the rate is the same
    return std::clamp(l2_bytes_per_cycle * all_that_share / static_cast<double>(blocks), l2_bytes_per_cycle,
                      lone_l2_bytes_per_cycle);
}

double second_launch_us(const DeviceInfo& device) {
    return launch_behind_us - (starts_early(device) ? hidden_launch_us : 0);
}

double x_bytes(const ConvProblem& p) { return static_cast<double>(p.n * p.c * p.h * p.w * size_in_bytes(p.dtype)); }
double weight_bytes(const ConvProblem& p) { return static_cast<double>(p.k * p.gemm_k() * size_in_bytes(p.dtype)); }
double y_bytes(const ConvProblem& p) { return static_cast<double>(p.gemm_m() * p.k * size_in_bytes(p.dtype)); }

double compulsory_bytes(const ConvProblem& p) {
    const double pixels_read = std::min<double>(p.h * p.w, p.p() * p.q() * p.r * p.s);
    return x_bytes(p) * pixels_read / static_cast<double>(p.h * p.w) + weight_bytes(p) +
           y_bytes(p) * (p.has_residual ? 2 : 1);
}

EpilogueCycles epilogue_cycles(const ConvProblem& problem, double outputs, int threads) {
    // For one turn of a warp, 8 channels per lane; counted in the compiled kernel, with a cheap activation.
    const double instructions = problem.has_residual ? 120 : 85;
    constexpr double turn_latency = 400;
    const double turns = outputs / 8 / 32, warps = threads / 32.0;
    // Accumulators are written and read as float; a residual copied ahead goes through shared memory in its own type.
    const double residual_bytes = problem.has_residual ? static_cast<double>(size_in_bytes(problem.dtype)) : 0;
    const double busy =
        std::max(turns * instructions / issued_per_cycle, outputs * 2 * (4 + residual_bytes) / shared_bytes_per_cycle);
    return {busy, std::max(busy, turns / warps * turn_latency)};
}

double conversions_us(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    double total = 0;
    if (plan.convert_x) total += conversion_us(x_bytes(problem), device);
    if (plan.convert_weight) total += conversion_us(weight_bytes(problem), device);
    return total;
}

int64_t resident_blocks(int threads, int64_t shared_bytes, int by_registers, const DeviceInfo& device) {
    constexpr int64_t reserved_bytes = 1024;  // shared memory that the system takes per block
    if (shared_bytes > device.shared_per_block) return 0;
    const int64_t by_threads = architecture_of(device).threads_per_multiprocessor / threads;
    const int64_t by_shared = device.shared_per_multiprocessor / (shared_bytes + reserved_bytes);
    return std::min<int64_t>({by_registers, by_threads, by_shared});
}

double waves(const Plan& plan, int64_t resident, const DeviceInfo& device) {
    return static_cast<double>(ceil_div(plan.blocks, resident * device.multiprocessors));
}

}  // namespace fused_cna
