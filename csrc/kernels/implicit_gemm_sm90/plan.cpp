// When the Hopper kernel is legal, and the estimated time of each tile, fetch and split.
#include <algorithm>
#include <string>

#include "kernels/implicit_gemm_sm90/hardware.h"
#include "kernels/implicit_gemm_sm90/layout.h"
#include "plan/cost.h"
#include "plan/families.h"

namespace fused_cna::implicit_gemm_sm90 {

namespace {

// Assumptions, not measured yet; times in multiprocessor cycles.
constexpr double wgmma_share = 0.85;           // of the tensor cores' rate, in a main loop that never waits for operands
constexpr double map_l2_bytes_per_cycle = 40;  // to one multiprocessor, by bulk copies; plain reads reach 42, measured
constexpr double turn_instructions = 50, residual_instructions = 16;  // per warp, for 8 outputs per lane
constexpr double turn_latency = 150;                                  // for a lone warp
constexpr double cluster_latency = 400;                               // per barrier
constexpr double share_latency = 250;                                 // for 16 sums per thread from other blocks
constexpr int shares_at_once = 2;
constexpr int most_blocks_of_cluster = 8;           // the limit on every device
constexpr int64_t multiprocessors_of_cluster = 16;  // that can form a cluster; some devices have a few more
constexpr double map_latency = 1000;   // from a bulk copy's start until a barrier has counted its bytes, and threads see it
constexpr double start_and_end = 700;  // barriers, maps and registers before the first copy; the last output's store

const Choice& choice_of(const Plan& plan) { return std::get<Choice>(plan.choice); }
const Tile& tile_of(const Plan& plan) { return tiles[choice_of(plan).tile]; }

// mma.sync reaches five eighths of this rate, see plan/device.h.
double products_per_clock(const ConvProblem& problem, const DeviceInfo& device) {
    const double half = mma_per_clock(device) * 8 / 5 * wgmma_share;
    return problem.dtype == DType::float32 ? half / 2 : half;
}

int64_t tiles_in(const ConvProblem& problem, const Tile& tile) {
    return ceil_div(problem.gemm_m(), tile.m) * ceil_div(problem.gemm_n(), tile.n) * problem.groups;
}

int64_t steps_in(const ConvProblem& problem, int64_t k) {
    return problem.r * problem.s * ceil_div(problem.c_per_group(), k);
}

// The most of: a step's products; shared memory traffic (operands written and read, the weight once per 64 rows of x,
// float32 once more both ways for rounding); L2 traffic; the copies of a gather.
double step_cycles(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const Tile& tile = tile_of(plan);
    const bool rounds = problem.dtype == DType::float32, gathers = choice_of(plan).fetch == Fetch::gather;
    const double bytes = static_cast<double>(tile.stage_bytes());
    const double read = (tile.m + tile.m / 64.0 * tile.n) * Tile::k_bytes;
    return std::max({static_cast<double>(tile.m) * tile.n * plan.tile.k / products_per_clock(problem, device),
                     (bytes * (rounds ? 3 : 1) + read) / shared_bytes_per_cycle,
                     bytes / (gathers ? l2_bytes_per_cycle : map_l2_bytes_per_cycle),
                     gathers ? bytes / plan.vector_bytes / copies_per_cycle : 0});
}

// Time to finish `outputs` after their products: of the whole multiprocessor, and of a lone warpgroup.
EpilogueCycles finish_cycles(const ConvProblem& problem, double outputs, int warps) {
    const double turns = outputs / 8 / 32;
    const double moved = outputs * static_cast<double>(size_in_bytes(problem.dtype)) * (problem.has_residual ? 2 : 1);
    const double busy =
        std::max(turns * (turn_instructions + (problem.has_residual ? residual_instructions : 0)) / issued_per_cycle,
                 moved / map_l2_bytes_per_cycle);
    return {busy, std::max(busy, turns / warps * turn_latency)};
}

// How many tiles the device computes at once.
int64_t tiles_at_once(int split, const DeviceInfo& device) {
    return device.multiprocessors / multiprocessors_of_cluster * (multiprocessors_of_cluster / split) +
           device.multiprocessors % multiprocessors_of_cluster / split;
}

// Like finish_cycles, for a block that finishes its part of a split tile. The others' shares arrive a few at a time.
EpilogueCycles finish_split_cycles(const ConvProblem& problem, const Tile& tile, int split) {
    const int64_t slices = ceil_div(ceil_div(tile.n, Tile::slice), split);
    const double outputs = static_cast<double>(tile.m * slices * Tile::slice);
    const double loads = static_cast<double>(slices * ceil_div(split, shares_at_once)) * tile.m / (64 * tile.consumers());
    EpilogueCycles finish = finish_cycles(problem, outputs, 4 * tile.consumers());
    finish.alone +=
        2 * cluster_latency + loads * share_latency + static_cast<double>(tile.m * tile.n) * 4 / shared_bytes_per_cycle;
    return finish;
}

Estimate estimate(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const Tile& tile = tile_of(plan);
    const int split = choice_of(plan).split_k;
    const double steps = static_cast<double>(ceil_div(steps_in(problem, plan.tile.k), split));
    const double step = step_cycles(problem, plan, device);
    const double lone_step = std::max({step, step_latency, map_latency / (choice_of(plan).stages - 1)});
    const double outputs = static_cast<double>(tile.m) * tile.n;
    const bool is_pingpong = tile.schedule == Schedule::pingpong;
    const EpilogueCycles finish = split > 1 ? finish_split_cycles(problem, tile, split)
                                            : finish_cycles(problem, outputs, is_pingpong ? 4 : 4 * tile.consumers());

    // A block computes its tiles one after the other; those of two pingpong warpgroups overlap.
    const double in_turn = static_cast<double>(ceil_div(tiles_in(problem, tile), tiles_at_once(split, device)));
    const auto all = [&](double main_loop) {
        if (!is_pingpong) return in_turn * (main_loop + finish.alone);
        return in_turn * std::max({main_loop, finish.busy, (main_loop + finish.alone) / 2}) +
               std::max(finish.alone, (main_loop + finish.alone) / 2);
    };
    return {.products_us = as_us(all(steps * step), device),
            .bytes_us = transfer_us(compulsory_bytes(problem), device),
            .latency_us = as_us(block_start + start_and_end + map_latency + all(steps * lone_step), device),
            .overhead_us = launch_us + conversions_us(problem, plan, device)};
}

// Why no tile takes the problem; empty where some may.
std::string unsupported_reason(const ConvProblem& problem, const DeviceInfo& device) {
    if (!multiplies_right) return "its products were wrong on a GPU";
    if (device.compute_major != 9 || device.compute_minor != 0) {
        return "it is for compute capability 9.0, the device has " + std::to_string(device.compute_major) + "." +
               std::to_string(device.compute_minor);
    }
    if (!device.has_hopper_code) return "the extension was not compiled for sm_90a";
    if (problem.dtype == DType::float32 && !problem.allow_tf32) {
        return "float32 is to be exact, its tensor cores round to tf32";
    }
    if (problem.groups > 1 && problem.c_per_group() < 64) {
        return "groups have " + std::to_string(problem.c_per_group()) + " channels, it takes groups of 64 or more";
    }
    if (const std::string reason = no_copies_reason(problem); !reason.empty()) return reason;
    if (problem.gemm_k() == 0) return "there is nothing to multiply";
    return "";
}

// Why the tile does not take the problem, however x is fetched; empty where it may.
std::string unsupported_reason(const ConvProblem& problem, const DeviceInfo& device, const Plan& plan) {
    const Tile& tile = tile_of(plan);
    const int64_t bytes = size_in_bytes(problem.dtype);
    const int64_t rows = round_up(problem.gemm_m(), tile.m);
    if (!tile.takes(bytes)) {
        return "with " + std::to_string(bytes) + " bytes a value fewer than " + std::to_string(Tile::least_stages) +
               " stages fit shared memory";
    }
    if (tile.shared_bytes(bytes) > device.shared_per_block) {
        return with_numbers("it needs", tile.shared_bytes(bytes), " bytes of shared memory", device.shared_per_block);
    }
    if (const int64_t most = std::max(rows, tiles_in(problem, tile) * 8); most > int_limit) {
        return with_numbers("it needs", most, " rows or blocks", int_limit);
    }
    return no_gather_reason(problem, plan.vector_bytes, tile.takes_narrow_vectors, tile.takes_any_filter);
}

// Why bulk copies cannot fetch x; empty where they can.
std::string no_maps_reason(const ConvProblem& problem, const DeviceInfo& device, const Plan& plan) {
    const auto outside = [](const char* what, int64_t given, int64_t least, int64_t most) {
        return std::string(what) + " is " + std::to_string(given) + ", a tensor map takes " + std::to_string(least) +
               " to " + std::to_string(most);
    };
    if (!maps_bring_operands) return "bulk copies were wrong on a GPU";
    if (!device.has_tensor_maps) return "the driver does not encode tensor maps";
    if (plan.vector_bytes < 16) {
        return "channels allow accesses of " + std::to_string(plan.vector_bytes) + " bytes, a tensor map takes 16";
    }
    if (!fits_masks(problem)) return "the filter is larger than 32x32, which only a gather takes";
    if (problem.groups > 1 && problem.c_per_group() % plan.tile.k != 0) {
        return "a group's " + std::to_string(problem.c_per_group()) + " channels are no multiple of " +
               std::to_string(plan.tile.k) + ", and the copy would read the next group's";
    }
    if (is_pointwise(problem, plan)) return "";
    const Corners corners = corners_of(problem);
    for (const int64_t corner : {corners.lower_w, corners.lower_h, corners.upper_w, corners.upper_h}) {
        if (corner < least_corner || corner > most_corner) return outside("a corner", corner, least_corner, most_corner);
    }
    for (const int64_t stride : {problem.stride_h, problem.stride_w}) {
        if (stride > most_step) return outside("a stride", stride, 1, most_step);
    }
    for (const int64_t offset : {(problem.r - 1) * problem.dil_h, (problem.s - 1) * problem.dil_w}) {
        if (offset > most_offset) return outside("a tap's offset", offset, 0, most_offset);
    }
    return "";
}

// Splits to compare: each block keeps two steps or more, and fewer than with a smaller split, on a grid that does not fill
// the device.
std::vector<int> useful_splits(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const int64_t steps = steps_in(problem, plan.tile.k), in_all = tiles_in(problem, tile_of(plan));
    std::vector<int> splits{1};
    if (tile_of(plan).schedule == Schedule::pingpong) return splits;
    for (int split = 2; split <= most_blocks_of_cluster; ++split) {
        const bool has_fewer_steps = ceil_div(steps, split) < ceil_div(steps, split - 1);
        if (steps >= 2 * split && has_fewer_steps && in_all * split <= 2 * device.multiprocessors &&
            split <= device.multiprocessors)
            splits.push_back(split);
    }
    return splits;
}

void add_fetch(const ConvProblem& problem, const DeviceInfo& device, Plan plan, std::vector<Candidate>& all) {
    auto& choice = std::get<Choice>(plan.choice);
    const int64_t in_all = tiles_in(problem, tile_of(plan));
    for (const int split : useful_splits(problem, plan, device)) {
        choice.split_k = split;
        plan.blocks = split > 1 ? in_all * split : std::min<int64_t>(in_all, device.multiprocessors);
        plan.estimate = estimate(problem, plan, device);
        all.push_back({plan, ""});
    }
}

void add_tile(const ConvProblem& problem, const DeviceInfo& device, int index, std::vector<Candidate>& all) {
    const Tile& tile = tiles[index];
    const auto bytes = size_in_bytes(problem.dtype);
    Plan plan{.kernel = Kernel::implicit_gemm_sm90,
              .choice = Choice{.tile = index, .stages = tile.stages(bytes)},
              .tile = {tile.m, tile.n, Tile::k_bytes / static_cast<int>(bytes)}};
    auto& choice = std::get<Choice>(plan.choice);
    choose_access(problem, plan);
    std::string reason = unsupported_reason(problem, device);
    if (reason.empty()) reason = unsupported_reason(problem, device, plan);
    const std::string no_maps = reason.empty() ? no_maps_reason(problem, device, plan) : reason;
    choice.fetch = is_pointwise(problem, plan) ? Fetch::tiled : Fetch::im2col;
    if (no_maps.empty()) {
        add_fetch(problem, device, plan, all);
    } else {
        all.push_back({plan, no_maps});
    }
    choice.fetch = Fetch::gather;
    if (reason.empty() && !tile.gathers()) reason = "256 rows leave too few registers for a gather";
    if (!reason.empty()) {
        all.push_back({plan, reason});
        return;
    }
    if (!fits_masks(problem)) {
        // One version, with the narrowest loads, serves every alignment.
        choice.takes_any_filter = true;
        plan.vector_bytes = 4;
    }
    add_fetch(problem, device, plan, all);
}

void list_candidates(Kernel, const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all) {
    for (size_t i = 0; i < tiles.size(); ++i) add_tile(problem, device, static_cast<int>(i), all);
}

std::string describe(const Plan& plan) {
    const Choice& choice = choice_of(plan);
    return std::string(" ") + schedule_name(tile_of(plan).schedule) + " " + fetch_name(choice.fetch) +
           (choice.takes_any_filter ? " plain" : "") + " split " + std::to_string(choice.split_k) + " " +
           std::to_string(plan.vector_bytes) + "-byte" + describe_copies(plan);
}

Tiles list_tiles(Kernel, DType dtype) {
    Tiles all;
    const int64_t bytes = size_in_bytes(dtype);
    for (const Tile& tile : tiles) {
        const auto& [m, n, schedule, narrow, any_filter] = tile;
        if (!tile.takes(bytes)) continue;
        all.push_back({m, n, static_cast<int>(schedule), narrow, any_filter, tile.threads(), tile.shared_bytes(bytes)});
    }
    return all;
}

}  // namespace

extern const Family family{Kernel::implicit_gemm_sm90, "implicit_gemm_sm90", list_candidates, describe, list_tiles};

}  // namespace fused_cna::implicit_gemm_sm90
