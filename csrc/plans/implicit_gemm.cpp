#include <algorithm>
#include <span>
#include <string>

#include "../cost.h"
#include "families.h"

namespace fused_cna {

namespace {

using fused_cna::resident_blocks;

// Assumptions that no measurement has yet replaced.
constexpr double copies_per_cycle = 8;     // cp.async of single threads
constexpr double compensated_share = 0.7;  // of the tensor cores' rate, beside splitting operands and adding up in float32
constexpr double fma_share = 0.75;         // of the CUDA cores' rate: the share of multiply-adds among the instructions

// Where the error of three tf32 products is within that of a plain float32 sum, as measured; see docs/accuracy.md.
constexpr int64_t fewest_compensated = 64;

int64_t resident_blocks(const GemmTile& tile, const DeviceInfo& device) {
    return resident_blocks(tile.threads(), tile.shared_bytes(), tile.blocks_per_multiprocessor, device);
}

// The kernels differ in their arithmetic and their tiles.
std::span<const GemmTile> tiles_of(Kernel kernel) {
    if (kernel == Kernel::implicit_gemm_tf32x3) return implicit_gemm_tf32x3_tiles;
    if (kernel == Kernel::implicit_gemm_fp32) return implicit_gemm_fp32_tiles;
    return implicit_gemm_sm80_tiles;
}

// Multiply-adds per clock and multiprocessor.
double products_per_clock(const ConvProblem& problem, Kernel kernel, const DeviceInfo& device) {
    const double tf32 = mma_per_clock(device) / 2 * mma_share;
    if (kernel == Kernel::implicit_gemm_tf32x3) return mma_per_clock(device) / 2 * compensated_share / 3;
    if (kernel == Kernel::implicit_gemm_fp32) return fma_per_clock(device) * fma_share;
    return problem.dtype == DType::float32 ? tf32 : 2 * tf32;
}

Estimate estimate(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const GemmTile& tile = tiles_of(plan.kernel)[plan.tile_index];
    const double k = plan.tile.k;
    const double rate = products_per_clock(problem, plan.kernel, device);
    const double operand_bytes = static_cast<double>(tile.m + tile.n) * tile.k_bytes;
    const double fragment_bytes =
        (static_cast<double>(tile.m) * tile.warps_n + static_cast<double>(tile.n) * tile.warps_m) * tile.k_bytes;
    const double step = std::max({tile.m * tile.n * k / rate, (operand_bytes + fragment_bytes) / shared_bytes_per_cycle,
                                  operand_bytes / l2_bytes_per_cycle, operand_bytes / plan.access_bytes / copies_per_cycle});
    const int64_t all_steps = problem.r * problem.s * ceil_div(problem.c_per_group(), plan.tile.k);
    const double steps = static_cast<double>(ceil_div(all_steps, plan.split_k));

    // A split's blocks leave sums in the workspace, as floats; a second launch adds them up and finishes.
    const double outputs = static_cast<double>(tile.m) * tile.n;
    const bool is_split = plan.split_k > 1;
    const EpilogueCycles epilogue =
        is_split ? EpilogueCycles{outputs * 4 / l2_bytes_per_cycle, outputs * 4 / l2_bytes_per_cycle + memory_latency}
                 : epilogue_cycles(problem, outputs, tile.threads());
    // One block's epilogue hides behind the products of the others.
    const int64_t resident = std::min(resident_blocks(tile, device), ceil_div(plan.blocks, device.multiprocessors));
    const double products = steps * step;
    const double busy =
        std::max(products, epilogue.busy) + std::min(products, epilogue.busy) / static_cast<double>(resident);
    const double lone_step = std::max({step, step_latency, memory_latency / (tile.stages - 1)});
    const double alone = block_start + memory_latency + steps * lone_step + epilogue.alone;

    Estimate estimate{.products_us = as_us(waves(plan, 1, device) * busy, device),
                      .bytes_us = transfer_us(compulsory_bytes(problem), device),
                      .latency_us = as_us(waves(plan, resident_blocks(tile, device), device) * alone, device),
                      .overhead_us = launch_us + conversions_us(problem, plan, device)};
    if (is_split) {
        const double finished = static_cast<double>(plan.blocks / plan.split_k) * outputs;
        estimate.overhead_us += launch_us + l2_us(static_cast<double>(plan.workspace_bytes) + finished * 2, device) +
                                as_us(2 * memory_latency, device);
    }
    return estimate;
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
Candidate base_of_tile(const ConvProblem& problem, const DeviceInfo& device, Kernel kernel, int tile_index) {
    const GemmTile& tile = tiles_of(kernel)[tile_index];
    Candidate candidate;
    Plan& plan = candidate.plan;
    const int k = tile.k_bytes / static_cast<int>(size_in_bytes(problem.dtype));
    plan = {.kernel = kernel, .tile_index = tile_index, .tile = {tile.m, tile.n, k}, .stages = tile.stages};
    // Copying to dense memory pays where it widens the loads or makes tensor cores possible at all; it is costed like
    // anything else.
    plan.convert_x = problem.x_access < 4;
    plan.convert_weight = problem.weight_access < 4;
    plan.access_bytes = static_cast<int>(std::min(plan.convert_x ? problem.dense_access() : problem.x_access,
                                                  plan.convert_weight ? problem.dense_access() : problem.weight_access));
    plan.blocks = ceil_div(problem.gemm_m(), tile.m) * ceil_div(problem.gemm_n(), tile.n) * problem.groups;
    const int64_t padded_rows = ceil_div(problem.gemm_m(), tile.m) * tile.m;
    if (!too_old(device).empty()) {
        candidate.illegal = too_old(device);
    } else if (kernel != Kernel::implicit_gemm_sm80 && problem.dtype != DType::float32) {
        candidate.illegal = std::string("it is for float32, the tensors are ") + dtype_name(problem.dtype);
    } else if (kernel == Kernel::implicit_gemm_sm80 && problem.dtype == DType::float32 && !problem.allow_tf32) {
        candidate.illegal = "float32 is to be exact, its tensor cores round to tf32";
    } else if (kernel == Kernel::implicit_gemm_tf32x3 && problem.gemm_k() < fewest_compensated) {
        candidate.illegal = "a float32 sum of " + std::to_string(problem.gemm_k()) +
                            " products is more accurate, it wants " + std::to_string(fewest_compensated) + " or more";
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

void add_tile(const ConvProblem& problem, const DeviceInfo& device, Kernel kernel, int tile_index,
              std::vector<Candidate>& all) {
    const Candidate base = base_of_tile(problem, device, kernel, tile_index);
    const GemmTile& tile = tiles_of(kernel)[tile_index];
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
            plan.estimate = estimate(problem, plan, device);
            all.push_back({plan, ""});
        }
    }
}

}  // namespace

void add_implicit_gemm(const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all) {
    for (const Kernel kernel : {Kernel::implicit_gemm_sm80, Kernel::implicit_gemm_tf32x3, Kernel::implicit_gemm_fp32}) {
        for (size_t i = 0; i < tiles_of(kernel).size(); ++i) add_tile(problem, device, kernel, static_cast<int>(i), all);
    }
}

std::string describe_implicit_gemm(const Plan& plan) {
    return " split " + std::to_string(plan.split_k) + " " + rows_name(plan.rows) + " " + std::to_string(plan.access_bytes) +
           "-byte" + describe_copies(plan);
}

}  // namespace fused_cna
