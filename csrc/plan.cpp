#include "plan.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "cost.h"

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

std::string with_numbers(const char* text, int64_t given, const char* unit, int64_t limit) {
    return std::string(text) + " " + std::to_string(given) + unit + ", at most " + std::to_string(limit) + unit;
}

Candidate direct_candidate(const ConvProblem& problem, const DeviceInfo& device, int tile_index) {
    const Tile& tile = direct_tiles[tile_index];
    Candidate candidate;
    Plan& plan = candidate.plan;
    plan = {.kernel = Kernel::direct, .tile_index = tile_index, .tile = tile};
    plan.blocks = ceil_div(problem.gemm_m(), tile.m) * ceil_div(problem.gemm_n(), tile.n) * problem.groups;
    plan.estimate = estimate_direct(problem, plan, device);
    if (plan.blocks > int_limit) candidate.illegal = with_numbers("it needs", plan.blocks, " blocks", int_limit);
    return candidate;
}

// The rows that a problem's geometry and the tile's instantiations leave, the fastest first; the reason where there is none.
std::vector<Rows> legal_rows(const ConvProblem& problem, const GemmTile& tile, const Plan& plan, std::string& illegal) {
    constexpr int64_t widest_mask = 32;
    const bool narrow = plan.access_bytes < 16;
    const bool pointwise = problem.r == 1 && problem.s == 1 && problem.stride_h == 1 && problem.stride_w == 1 &&
                           problem.padded_h() == problem.h && problem.padded_w() == problem.w &&
                           (problem.x_pixels_even || plan.convert_x);
    const bool masked = problem.r <= widest_mask && problem.s <= widest_mask;
    if (narrow && !tile.takes_narrow_accesses) {
        illegal = "channels allow loads of " + std::to_string(plan.access_bytes) + " bytes, this tile takes 16";
    } else if (!masked && !tile.takes_any_filter) {
        illegal = "the filter is larger than 32x32, this tile has masked rows only";
    }
    std::vector<Rows> rows;
    if (!illegal.empty()) return rows;
    if (pointwise && !narrow) rows.push_back(Rows::pointwise);
    if (masked) rows.push_back(Rows::masked);
    if (tile.takes_any_filter) rows.push_back(Rows::plain);
    return rows;
}

// Splits worth a thought: those that leave every block about four steps or more, on a grid that does not fill the device.
std::vector<int> useful_splits(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const int64_t steps = problem.r * problem.s * ceil_div(problem.c_per_group(), plan.tile.k);
    std::vector<int> splits{1};
    for (const int split : {2, 3, 4, 6, 8, 12, 16}) {
        const bool none_is_empty = (split - 1) * ceil_div(steps, split) < steps;
        if (steps >= 4 * split && none_is_empty && plan.blocks * split <= 4 * device.multiprocessors)
            splits.push_back(split);
    }
    return splits;
}

// Everything but rows and split, with the reason where the tile cannot run the problem at all.
Candidate implicit_gemm_base(const ConvProblem& problem, const DeviceInfo& device, int tile_index) {
    const GemmTile& tile = implicit_gemm_tiles[tile_index];
    Candidate candidate;
    Plan& plan = candidate.plan;
    const int k = tile.k_bytes / static_cast<int>(size_in_bytes(problem.dtype));
    plan = {
        .kernel = Kernel::implicit_gemm_sm80, .tile_index = tile_index, .tile = {tile.m, tile.n, k}, .stages = tile.stages};
    // Copying to dense memory pays where it widens the loads or makes tensor cores possible at all; it is costed like
    // anything else.
    plan.convert_x = problem.x_access < 4;
    plan.convert_weight = problem.weight_access < 4;
    plan.access_bytes = static_cast<int>(std::min(plan.convert_x ? problem.dense_access() : problem.x_access,
                                                  plan.convert_weight ? problem.dense_access() : problem.weight_access));
    plan.blocks = ceil_div(problem.gemm_m(), tile.m) * ceil_div(problem.gemm_n(), tile.n) * problem.groups;
    const int64_t padded_rows = ceil_div(problem.gemm_m(), tile.m) * tile.m;
    if (device.compute_major < 8) {
        candidate.illegal = "it needs compute capability 8.0, the device has " + std::to_string(device.compute_major) + "." +
                            std::to_string(device.compute_minor);
    } else if (problem.dtype == DType::float32 && !problem.allow_tf32) {
        candidate.illegal = "float32 is to be exact, its tensor cores round to tf32";
    } else if (problem.dense_access() < 4) {
        candidate.illegal = "a group's " + std::to_string(problem.c_per_group()) +
                            " channels allow loads of 2 bytes, cp.async "
                            "copies at least 4";
    } else if (problem.gemm_k() == 0) {
        candidate.illegal = "there is nothing to multiply";
    } else if (resident_blocks(tile, device) == 0) {
        candidate.illegal =
            with_numbers("it needs", tile.shared_bytes(), " bytes of shared memory", device.shared_per_block);
    } else if (std::max(padded_rows, plan.blocks) > int_limit) {
        candidate.illegal = with_numbers("it needs", std::max(padded_rows, plan.blocks), " rows or blocks", int_limit);
    }
    return candidate;
}

void add_implicit_gemm(const ConvProblem& problem, const DeviceInfo& device, int tile_index, std::vector<Candidate>& all) {
    const Candidate base = implicit_gemm_base(problem, device, tile_index);
    const GemmTile& tile = implicit_gemm_tiles[tile_index];
    std::string illegal = base.illegal;
    const std::vector<Rows> rows = illegal.empty() ? legal_rows(problem, tile, base.plan, illegal) : std::vector<Rows>{};
    if (!illegal.empty()) {
        all.push_back({base.plan, illegal});
        return;
    }
    for (const Rows each : rows) {
        for (const int split : useful_splits(problem, base.plan, device)) {
            Plan plan = base.plan;
            plan.rows = each;
            // One version with the narrowest accesses serves every alignment.
            if (each == Rows::plain) plan.access_bytes = 4;
            plan.split_k = split;
            if (split > 1) plan.workspace_bytes = plan.blocks * split * tile.m * tile.n * int64_t{sizeof(float)};
            plan.blocks *= split;
            plan.estimate = estimate_implicit_gemm(problem, plan, device);
            all.push_back({plan, ""});
        }
    }
}

// Legal before illegal, then by estimate; equal estimates keep the order in which they were listed, fastest rows first.
bool is_better(const Candidate& a, const Candidate& b) {
    if (a.illegal.empty() != b.illegal.empty()) return a.illegal.empty();
    return a.illegal.empty() && a.plan.estimate.total_us() < b.plan.estimate.total_us();
}

struct ForcedPlan {
    std::atomic<bool> active = false;
    std::mutex mutex;
    std::string name;
} forced;

}  // namespace

std::vector<Candidate> list_candidates(const ConvProblem& problem, const DeviceInfo& device) {
    check_extents(problem);
    std::vector<Candidate> all;
    for (int i = 0; i < static_cast<int>(implicit_gemm_tiles.size()); ++i) add_implicit_gemm(problem, device, i, all);
    for (int i = 0; i < static_cast<int>(direct_tiles.size()); ++i) all.push_back(direct_candidate(problem, device, i));
    std::stable_sort(all.begin(), all.end(), is_better);
    if (!all.front().illegal.empty()) refuse(problem, all.back().illegal + "; split the batch");
    return all;
}

Plan choose_plan(const ConvProblem& problem, const DeviceInfo& device) {
    return list_candidates(problem, device).front().plan;
}

Plan choose_plan_without_memory(const ConvProblem& problem, const DeviceInfo& device) {
    const std::vector<Candidate> all = list_candidates(problem, device);
    // direct never needs any, so there is always a match
    return std::find_if(all.begin(), all.end(), [](const Candidate& c) { return !c.plan.allocates(); })->plan;
}

Plan find_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name) {
    const std::vector<Candidate> all = list_candidates(problem, device);
    const auto matches = [&](const Candidate& candidate) {
        const std::string full = to_string(candidate.plan);
        return full.starts_with(name) && (full.size() == name.size() || full[name.size()] == ' ');
    };
    const auto found = std::find_if(all.begin(), all.end(), matches);
    if (found == all.end() || !found->illegal.empty()) {
        std::string message = "fused_cna: no plan \"" + name + "\" for " + to_string(problem);
        message += found == all.end() ? "; there are:" : ": " + found->illegal + "; legal are:";
        for (const Candidate& candidate : all) {
            if (candidate.illegal.empty()) message += " \"" + to_string(candidate.plan) + "\"";
        }
        throw std::runtime_error(message);
    }
    return found->plan;
}

void force_plan(const std::string& name) {
    const std::lock_guard lock(forced.mutex);
    forced.name = name;
    forced.active = !name.empty();
}

Plan memoised_plan(const ConvProblem& problem, const DeviceInfo& device) {
    if (forced.active) {
        const std::lock_guard lock(forced.mutex);
        return find_plan(problem, device, forced.name);
    }
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
    text << kernel_name(plan.kernel) << " " << plan.tile.m << "x" << plan.tile.n << "x" << plan.tile.k;
    if (plan.kernel == Kernel::implicit_gemm_sm80) {
        text << " split " << plan.split_k << " " << rows_name(plan.rows) << " " << plan.access_bytes << "-byte";
        if (plan.convert_x) text << " after a copy of x";
        if (plan.convert_weight) text << " after a copy of the weight";
    }
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
