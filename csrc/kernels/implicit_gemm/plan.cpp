// When the implicit GEMMs for 8.0 and newer are legal, and the estimated time of each tile, addressing and split.
#include <algorithm>
#include <span>
#include <string>

#include "plan/cost.h"
#include "plan/families.h"

namespace fused_cna::implicit_gemm {

namespace {

using fused_cna::resident_blocks;

// Assumptions, not measured yet.
constexpr double compensated_share = 0.7;  // of the tensor cores' rate, while splitting operands and adding up in float32
constexpr double fma_share = 0.75;         // of the CUDA cores' rate: the share of multiply-adds among all instructions

// In cycles, measured on an H200: a block's setup of its rows' offsets and masks, which plain matrix products do not have,
// and each step's computation of coordinates.
constexpr double masks_latency = 900, coordinates_latency = 360;

// From here on the error of three tf32 products was measured to be within a plain float32 sum's; see docs/accuracy.md.
constexpr int64_t fewest_compensated = 64;

int64_t resident_blocks(const Tile& tile, const DeviceInfo& device) {
    return resident_blocks(tile.threads(), tile.shared_bytes(), tile.blocks_per_multiprocessor, device);
}

// The three kernels differ in their arithmetic and their tiles.
std::span<const Tile> tiles_of(Kernel kernel) {
    if (kernel == Kernel::implicit_gemm_tf32x3) return tf32x3_tiles;
    if (kernel == Kernel::implicit_gemm_fp32) return fp32_tiles;
    return sm80_tiles;
}

const Choice& choice_of(const Plan& plan) { return std::get<Choice>(plan.choice); }
const Tile& tile_of(const Plan& plan) { return tiles_of(plan.kernel)[choice_of(plan).tile]; }

// Multiply-adds per clock and multiprocessor.
double products_per_clock(const ConvProblem& problem, Kernel kernel, const DeviceInfo& device) {
    const double tf32 = mma_per_clock(device) / 2 * mma_share;
    if (kernel == Kernel::implicit_gemm_tf32x3) return mma_per_clock(device) / 2 * compensated_share / 3;
    if (kernel == Kernel::implicit_gemm_fp32) return fma_per_clock(device) * fma_share;
    return problem.dtype == DType::float32 ? tf32 : 2 * tf32;
}

Estimate estimate(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const Tile& tile = tile_of(plan);
    const int split_k = choice_of(plan).split_k;
    const double k = plan.tile.k;
    const double rate = products_per_clock(problem, plan.kernel, device);
    const double l2_rate = l2_bytes_per_cycle_of(plan.blocks, device);
    const double operand_bytes = static_cast<double>(tile.m + tile.n) * tile.k_bytes;
    const double fragment_bytes =
        (static_cast<double>(tile.m) * tile.warps_n + static_cast<double>(tile.n) * tile.warps_m) * tile.k_bytes;
    const double step = std::max({tile.m * tile.n * k / rate, (operand_bytes + fragment_bytes) / shared_bytes_per_cycle,
                                  operand_bytes / l2_rate, operand_bytes / plan.vector_bytes / copies_per_cycle});
    const int64_t all_steps = problem.r * problem.s * ceil_div(problem.c_per_group(), plan.tile.k);
    const double steps = static_cast<double>(ceil_div(all_steps, split_k));

    // A split's blocks write float sums to the workspace; a second launch adds them up and finishes.
    const double outputs = static_cast<double>(tile.m) * tile.n;
    const bool is_split = split_k > 1;
    const EpilogueCycles epilogue = is_split ? EpilogueCycles{outputs * 4 / l2_rate, outputs * 4 / l2_rate + l2_latency}
                                             : epilogue_cycles(problem, outputs, tile.threads());
    const bool has_masks = choice_of(plan).addressing != Addressing::pointwise;
    // One block's epilogue overlaps the products of the others.
    const int64_t resident = std::min(resident_blocks(tile, device), ceil_div(plan.blocks, device.multiprocessors));
    const double products = steps * step;
    const double busy =
        std::max(products, epilogue.busy) + std::min(products, epilogue.busy) / static_cast<double>(resident);
    const double coordinates = choice_of(plan).addressing == Addressing::plain ? coordinates_latency : 0;
    const double lone_step = std::max({step, step_latency, memory_latency / (tile.stages - 1)}) + coordinates;
    const double alone = block_start + (has_masks ? masks_latency : 0) + memory_latency + steps * lone_step + epilogue.alone;

    Estimate estimate{.products_us = as_us(waves(plan, 1, device) * busy, device),
                      .bytes_us = transfer_us(compulsory_bytes(problem), device),
                      .latency_us = as_us(waves(plan, resident_blocks(tile, device), device) * alone, device),
                      .overhead_us = launch_us + conversions_us(problem, plan, device)};
    // The shares are read one after the other.
    if (is_split) {
        estimate.overhead_us += second_launch_us(device) + l2_us(static_cast<double>(plan.workspace_bytes), device) +
                                as_us((2 + split_k) * l2_latency, device);
    }
    return estimate;
}

// The addressing modes that the problem's geometry and the tile's instantiations allow, fastest first.
std::vector<Addressing> supported_addressing(const ConvProblem& problem, const Plan& plan) {
    std::vector<Addressing> ways;
    if (is_pointwise(problem, plan) && plan.vector_bytes == 16) ways.push_back(Addressing::pointwise);
    if (fits_masks(problem)) ways.push_back(Addressing::masked);
    if (tile_of(plan).takes_any_filter) ways.push_back(Addressing::plain);
    return ways;
}

// Splits to compare: each block keeps about four steps or more, and the grid does not fill the device.
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

// Why the tile cannot run the problem, whatever the addressing and split; empty where it can.
std::string unsupported_reason(const ConvProblem& problem, const DeviceInfo& device, const Plan& plan) {
    const Tile& tile = tile_of(plan);
    const int64_t padded_rows = ceil_div(problem.gemm_m(), tile.m) * tile.m;
    if (!too_old(device).empty()) return too_old(device);
    if (plan.kernel != Kernel::implicit_gemm_sm80 && problem.dtype != DType::float32) {
        return std::string("it is for float32, the tensors are ") + dtype_name(problem.dtype);
    }
    if (plan.kernel == Kernel::implicit_gemm_sm80 && problem.dtype == DType::float32 && !problem.allow_tf32) {
        return "float32 is to be exact, its tensor cores round to tf32";
    }
    if (plan.kernel == Kernel::implicit_gemm_tf32x3 && problem.gemm_k() < fewest_compensated) {
        return "a float32 sum of " + std::to_string(problem.gemm_k()) + " products is more accurate, it wants " +
               std::to_string(fewest_compensated) + " or more";
    }
    if (const std::string reason = no_copies_reason(problem); !reason.empty()) return reason;
    if (problem.gemm_k() == 0) return "there is nothing to multiply";
    if (resident_blocks(tile, device) == 0) {
        return with_numbers("it needs", tile.shared_bytes(), " bytes of shared memory", device.shared_per_block);
    }
    if (const int64_t most = std::max(padded_rows, plan.blocks); most > int_limit) {
        return with_numbers("it needs", most, " rows or blocks", int_limit);
    }
    return no_gather_reason(problem, plan.vector_bytes, tile.takes_narrow_vectors, tile.takes_any_filter);
}

// The plan except for addressing and split.
Plan base_of_tile(const ConvProblem& problem, Kernel kernel, int index) {
    const Tile& tile = tiles_of(kernel)[index];
    const int k = tile.k_bytes / static_cast<int>(size_in_bytes(problem.dtype));
    Plan plan{.kernel = kernel, .choice = Choice{.tile = index, .stages = tile.stages}, .tile = {tile.m, tile.n, k}};
    choose_access(problem, plan);
    plan.blocks = ceil_div(problem.gemm_m(), tile.m) * ceil_div(problem.gemm_n(), tile.n) * problem.groups;
    return plan;
}

void add_tile(const ConvProblem& problem, const DeviceInfo& device, Kernel kernel, int index, std::vector<Candidate>& all) {
    const Plan base = base_of_tile(problem, kernel, index);
    const Tile& tile = tile_of(base);
    if (const std::string reason = unsupported_reason(problem, device, base); !reason.empty()) {
        all.push_back({base, reason});
        return;
    }
    for (const Addressing addressing : supported_addressing(problem, base)) {
        for (const int split : useful_splits(problem, base, device)) {
            Plan plan = base;
            auto& choice = std::get<Choice>(plan.choice);
            choice.addressing = addressing;
            choice.split_k = split;
            // One version, with the narrowest loads, serves every alignment.
            if (addressing == Addressing::plain) plan.vector_bytes = 4;
            if (split > 1) plan.workspace_bytes = plan.blocks * split * tile.m * tile.n * int64_t{sizeof(float)};
            plan.blocks *= split;
            plan.estimate = estimate(problem, plan, device);
            all.push_back({plan, ""});
        }
    }
}

void list_candidates(Kernel kernel, const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all) {
    for (size_t i = 0; i < tiles_of(kernel).size(); ++i) add_tile(problem, device, kernel, static_cast<int>(i), all);
}

std::string describe(const Plan& plan) {
    const Choice& choice = choice_of(plan);
    return " split " + std::to_string(choice.split_k) + " " + addressing_name(choice.addressing) + " " +
           std::to_string(plan.vector_bytes) + "-byte" + describe_copies(plan);
}

Tiles list_tiles(Kernel kernel, DType dtype) {
    Tiles all;
    if (kernel != Kernel::implicit_gemm_sm80 && dtype != DType::float32) return all;
    for (const Tile& tile : tiles_of(kernel)) {
        const auto& [m, n, k_bytes, stages, warps_m, warps_n, blocks, narrow, any_filter] = tile;
        all.push_back(
            {m, n, k_bytes, stages, warps_m, warps_n, blocks, narrow, any_filter, tile.threads(), tile.shared_bytes()});
    }
    return all;
}

}  // namespace

extern const Family sm80{Kernel::implicit_gemm_sm80, "implicit_gemm_sm80", list_candidates, describe, list_tiles};
extern const Family tf32x3{Kernel::implicit_gemm_tf32x3, "implicit_gemm_tf32x3", list_candidates, describe, list_tiles};
extern const Family fp32{Kernel::implicit_gemm_fp32, "implicit_gemm_fp32", list_candidates, describe, list_tiles};

}  // namespace fused_cna::implicit_gemm
