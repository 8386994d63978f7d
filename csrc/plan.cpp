#include "plan.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace fused_cna {

namespace {

constexpr int64_t int_limit = std::numeric_limits<int32_t>::max();
constexpr int64_t extent_limit = int_limit - 1024;  // loops step by whole tiles, so they pass the end by less than one

[[noreturn]] void refuse(const ConvProblem& problem, const std::string& reason) {
    throw std::runtime_error("fused_cna: no kernel can take this convolution: " + reason + " (" + to_string(problem) + ")");
}

// Kernels hold coordinates, channels and product numbers in 32 bits, and offsets in 64.
void check_extents(const ConvProblem& problem) {
    const std::pair<const char*, int64_t> extents[] = {
        {"the padded input height", problem.padded_h()},
        {"the padded input width", problem.padded_w()},
        {"the number of input channels", problem.c},
        {"the number of output channels", problem.k},
        {"the number of products per output", problem.gemm_k()},
    };
    for (const auto& [name, extent] : extents) {
        if (extent > extent_limit) {
            refuse(problem, std::string(name) + " is " + std::to_string(extent) + ", at most " +
                                std::to_string(extent_limit) + " is allowed");
        }
    }
}

// Instructions per product and output, up to a common factor: one multiply-add, and the tile's share of loading its
// operands, where computing an address costs about as much as ten multiply-adds. Padding channels are paid for too.
double direct_cost(const ConvProblem& problem, const Tile& tile) {
    constexpr double cost_of_load = 10;
    const double outputs = static_cast<double>(tile.m) * tile.n;
    const double channels_made = static_cast<double>(ceil_div(problem.gemm_n(), tile.n) * tile.n);
    return channels_made * (1 + cost_of_load * (tile.m + tile.n) / outputs);
}

}  // namespace

Plan make_plan(const ConvProblem& problem, Kernel kernel, Tile tile) {
    check_extents(problem);
    if (std::find(direct_tiles.begin(), direct_tiles.end(), tile) == direct_tiles.end()) {
        std::ostringstream message;
        message << "fused_cna: kernel " << kernel_name(kernel) << " has no tile " << tile.m << "x" << tile.n << "x" << tile.k
                << "; it has";
        for (const Tile& known : direct_tiles) message << " " << known.m << "x" << known.n << "x" << known.k;
        throw std::runtime_error(message.str());
    }
    const int64_t blocks = ceil_div(problem.gemm_m(), tile.m) * ceil_div(problem.gemm_n(), tile.n) * problem.groups;
    if (blocks > int_limit) {
        refuse(problem, "it needs " + std::to_string(blocks) + " blocks, at most " + std::to_string(int_limit) +
                            " are allowed; split the batch");
    }
    return {kernel, tile, blocks};
}

Plan choose_plan(const ConvProblem& problem, const DeviceInfo&) {
    const Tile& tile = *std::min_element(direct_tiles.begin(), direct_tiles.end(), [&](const Tile& a, const Tile& b) {
        return direct_cost(problem, a) < direct_cost(problem, b);
    });
    return make_plan(problem, Kernel::direct, tile);
}

Plan memoised_plan(const ConvProblem& problem, const DeviceInfo& device) {
    // A server of ever new image sizes starts over now and then, rather than remembering them all.
    constexpr size_t most_plans = 10'000;
    static std::map<std::pair<ConvProblem, DeviceInfo>, Plan> plans;
    static std::shared_mutex mutex;
    const std::pair key(problem, device);
    {
        const std::shared_lock lock(mutex);
        if (const auto found = plans.find(key); found != plans.end()) return found->second;
    }
    const Plan plan = choose_plan(problem, device);
    const std::unique_lock lock(mutex);
    if (plans.size() >= most_plans) plans.clear();
    plans.emplace(key, plan);
    return plan;
}

std::string to_string(const Plan& plan) {
    std::ostringstream text;
    text << kernel_name(plan.kernel) << " " << plan.tile.m << "x" << plan.tile.n << "x" << plan.tile.k << ", " << plan.blocks
         << " blocks";
    return text.str();
}

std::string to_string(const ConvProblem& problem) {
    std::ostringstream text;
    text << dtype_name(problem.dtype) << " input [" << problem.n << ", " << problem.c << ", " << problem.h << ", "
         << problem.w << "], weight [" << problem.k << ", " << problem.c_per_group() << ", " << problem.r << ", "
         << problem.s << "], stride (" << problem.stride_h << ", " << problem.stride_w << "), padding (" << problem.pad_top
         << ", " << problem.pad_bottom << ", " << problem.pad_left << ", " << problem.pad_right << "), dilation ("
         << problem.dil_h << ", " << problem.dil_w << "), groups " << problem.groups;
    return text.str();
}

}  // namespace fused_cna
