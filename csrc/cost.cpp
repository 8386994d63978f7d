#include "cost.h"

#include <algorithm>

namespace fused_cna {

namespace {

constexpr double bandwidth_share = 0.9;  // of the datasheet's, that a kernel reaches

double conversion_us(double bytes, const DeviceInfo& device) { return launch_us + transfer_us(2 * bytes, device); }

}  // namespace

double Estimate::total_us() const { return std::max({products_us, bytes_us, latency_us}) + overhead_us; }

double as_us(double cycles, const DeviceInfo& device) { return cycles / (device.clock_ghz * 1e3); }

double transfer_us(double bytes, const DeviceInfo& device) { return bytes / (device.bandwidth_gbs * bandwidth_share * 1e3); }

double x_bytes(const ConvProblem& p) { return static_cast<double>(p.n * p.c * p.h * p.w * size_in_bytes(p.dtype)); }
double weight_bytes(const ConvProblem& p) { return static_cast<double>(p.k * p.gemm_k() * size_in_bytes(p.dtype)); }
double y_bytes(const ConvProblem& p) { return static_cast<double>(p.gemm_m() * p.k * size_in_bytes(p.dtype)); }

double compulsory_bytes(const ConvProblem& p) {
    const double pixels_read = std::min<double>(p.h * p.w, p.p() * p.q() * p.r * p.s);
    return x_bytes(p) * pixels_read / static_cast<double>(p.h * p.w) + weight_bytes(p) + y_bytes(p);
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
    const int64_t by_threads = 2048 / threads;
    const int64_t by_shared = device.shared_per_multiprocessor / (shared_bytes + reserved_bytes);
    return std::min<int64_t>({by_registers, by_threads, by_shared});
}

double waves(const Plan& plan, int64_t resident, const DeviceInfo& device) {
    return static_cast<double>(ceil_div(plan.blocks, resident * device.multiprocessors));
}

}  // namespace fused_cna
