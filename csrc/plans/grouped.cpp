#include <algorithm>

#include "../cost.h"
#include "../grouped_shape.h"
#include "families.h"

namespace fused_cna {

namespace {

// Instructions of a warp, counted in the compiled kernel.
constexpr double block_instructions = 700;                                   // coordinates, tables
constexpr double copy_instructions = 50;                                     // of 32 copies
constexpr double chunk_step_instructions = 36, word_step_instructions = 80;  // of a step, beside its products
constexpr double product_instructions = 5.5;  // of 16 x 8 results, with its share of the weights' fragments
constexpr double staging_instructions = 6;    // of 32 pairs of accumulators

// Assumptions that no measurement has yet replaced; times in multiprocessor cycles.
constexpr double lone_step = 70;               // offsets, fragments and first products of a lone warp's step
constexpr double lone_instruction = 2;         // of a lone warp outside of the main loop
constexpr double staging_cycles = 24.0 / 256;  // of shared memory, for one staged accumulator
constexpr double slot_cost = 4;                // a slot's time, in that of one position of the halo

int64_t resident_blocks(const GroupedTile& tile, const GroupedShape& shape, const DeviceInfo& device) {
    const int64_t by_registers = tile.blocks_per_multiprocessor * GroupedTile::most_warps / shape.warps;
    return fused_cna::resident_blocks(static_cast<int>(shape.warps * 32), shape.shared_bytes, static_cast<int>(by_registers),
                                      device);
}

Estimate estimate(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const GroupedTile& tile = grouped_tiles[plan.tile_index];
    const GroupedShape shape = grouped_shape(problem, tile, plan.grouped);
    // ldmatrix and 32-bit loads both take four cycles for a fragment of x.
    const double fragment_cycles = GroupedTile::fragments * 4 + tile.column_blocks * 2 + (tile.column_blocks > 1 ? 1 : 2);
    const double mma_cycles = 16 * 8 * 16 / (mma_per_clock(device) * mma_share);
    const double warp_steps = static_cast<double>(shape.warps * shape.steps);
    const double halo_bytes = static_cast<double>(shape.halo_rows * shape.halo_columns * shape.pixel_bytes);
    const double weights_bytes = static_cast<double>(shape.columns * shape.weight_bytes);
    const double staged = static_cast<double>(shape.slots * shape.columns);
    const double copies = (halo_bytes + weights_bytes) / plan.access_bytes;
    const EpilogueCycles epilogue = epilogue_cycles(problem, staged, static_cast<int>(shape.warps * 32));
    const double step_instructions =
        (tile.reader == GroupReader::chunks ? chunk_step_instructions : word_step_instructions) +
        tile.column_blocks * product_instructions;
    const double warps = static_cast<double>(shape.warps);
    const double ahead = warps * block_instructions + copies / 32 * copy_instructions;
    const double instructions = ahead + warp_steps * step_instructions + staged / 64 * staging_instructions;
    const double cycles = std::max({
        warp_steps * GroupedTile::fragments * tile.column_blocks * mma_cycles,
        warp_steps * fragment_cycles + staged * staging_cycles + (halo_bytes + weights_bytes) / shared_bytes_per_cycle,
        (halo_bytes + weights_bytes) / l2_bytes_per_cycle,
        instructions / issued_per_cycle + epilogue.busy,
    });
    // Positions of the halo are known behind the weights' copies, fragments behind the halo's.
    const double alone = ahead / warps * lone_instruction + 2 * memory_latency +
                         static_cast<double>(shape.steps) * lone_step + epilogue.alone;
    const int64_t resident = resident_blocks(tile, shape, device);
    return {.products_us = as_us(waves(plan, 1, device) * cycles, device),
            .bytes_us = transfer_us(compulsory_bytes(problem), device),
            .latency_us = as_us(waves(plan, resident, device) * alone, device),
            .overhead_us = launch_us + conversions_us(problem, plan, device)};
}

// Why no tile of the kernel takes the problem; empty where some may.
std::string why_none(const ConvProblem& problem, const DeviceInfo& device) {
    if (!too_old(device).empty()) return too_old(device);
    if (problem.c_per_group() == 1) return "a group of one channel has too few products for tensor cores";
    if (problem.dtype == DType::float32 && !problem.allow_tf32) {
        return "float32 is to be exact, its tensor cores round to tf32";
    }
    if (problem.gemm_k() == 0) return "there is nothing to multiply";
    if (problem.dense_access() < 4) {
        return "a group's " + std::to_string(problem.c_per_group()) +
               " channels allow loads of 2 bytes, cp.async copies at least 4";
    }
    return too_far(problem);
}

// Why this tile does not; empty where it may.
std::string why_not(const ConvProblem& problem, const GroupedTile& tile) {
    if (tile.reader == GroupReader::chunks && problem.dense_access() < 16) {
        return "a group's " + std::to_string(problem.c_per_group()) + " channels are not whole chunks of 16 bytes";
    }
    if (problem.k_per_group() <= tile.columns() - 8) {
        return "groups have " + std::to_string(problem.k_per_group()) + " output channels, this tile takes " +
               std::to_string(tile.columns()) + " at a time";
    }
    return "";
}

// The rectangle of at most so many octets that covers the output at the least cost of slots and halo.
GroupedPart best_rectangle(const ConvProblem& problem, const GroupedTile& tile, int64_t sets) {
    const int64_t octets = sets * tile.slots() / octet;
    GroupedPart best;
    double least = 0;
    const auto consider = [&](int64_t q) {
        const int64_t rows = std::min(octets / ceil_div(q, octet), problem.p());
        const int64_t p = ceil_div(problem.p(), ceil_div(problem.p(), rows));
        const GroupedPart part{static_cast<int>(p), static_cast<int>(q), 1, 1};
        const GroupedShape shape = grouped_shape(problem, tile, part);
        const double halo = static_cast<double>(shape.halo_rows * shape.halo_columns);
        const double cost =
            static_cast<double>(shape.tiles_p * shape.tiles_q) * (slot_cost * static_cast<double>(shape.slots) + halo);
        if (best.p == 0 || cost < least) {
            best = part;
            least = cost;
        }
    };
    for (int64_t per_row = 1; per_row <= std::min(octets, ceil_div(problem.q(), octet)); ++per_row) {
        const int64_t most = std::min(per_row * octet, problem.q());
        consider(most);
        consider(ceil_div(problem.q(), ceil_div(problem.q(), most)));
    }
    return best;
}

// The shares of the channels worth a thought for a number of pixel sets: as many groups as there are warps for, then fewer,
// for more blocks; where one group has too many output channels, a part of them.
std::vector<GroupedPart> useful_parts(const ConvProblem& problem, const GroupedTile& tile, int64_t sets) {
    const GroupedPart rectangle = best_rectangle(problem, tile, sets);
    const int64_t units = GroupedTile::most_warps / sets, columns = problem.k_per_group();
    const int64_t units_per_group = ceil_div(columns, tile.columns());
    std::vector<GroupedPart> parts;
    const auto add = [&](int64_t groups, int64_t columns_per_group) {
        GroupedPart part = rectangle;
        part.groups = static_cast<int>(groups);
        part.columns_per_group = static_cast<int>(columns_per_group);
        if (std::find(parts.begin(), parts.end(), part) == parts.end()) parts.push_back(part);
    };
    for (int64_t groups = std::min(units / units_per_group, problem.groups); groups > 0; groups /= 2) {
        add(groups, columns);
        int64_t divisor = groups;
        while (problem.groups % divisor != 0) --divisor;
        add(divisor, columns);
    }
    for (int64_t share = std::min(units, units_per_group - 1); share > 0; share /= 2) {
        add(1, share * tile.columns());
    }
    return parts;
}

Candidate candidate_of_part(const ConvProblem& problem, const DeviceInfo& device, int tile_index, const GroupedPart& part) {
    const GroupedTile& tile = grouped_tiles[tile_index];
    const GroupedShape shape = grouped_shape(problem, tile, part);
    Candidate candidate;
    Plan& plan = candidate.plan;
    plan = {.kernel = Kernel::grouped,
            .tile_index = tile_index,
            .tile = {static_cast<int>(shape.slots), static_cast<int>(shape.columns),
                     32 / static_cast<int>(size_in_bytes(problem.dtype))},
            .grouped = part,
            .convert_x = problem.x_pixel_access < 4,
            .convert_weight = problem.weight_access < 4,
            .blocks = shape.blocks};
    plan.access_bytes = static_cast<int>(
        std::min(problem.dense_access(), plan.convert_x ? problem.dense_pixel_access() : problem.x_pixel_access));
    if (resident_blocks(tile, shape, device) == 0) {
        candidate.illegal =
            with_numbers("its operands need", shape.shared_bytes, " bytes of shared memory", device.shared_per_block);
    } else if (plan.blocks > int_limit) {
        candidate.illegal = with_numbers("it needs", plan.blocks, " blocks", int_limit);
    } else {
        plan.estimate = estimate(problem, plan, device);
    }
    return candidate;
}

}  // namespace

void add_grouped(const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all) {
    const std::string none = why_none(problem, device);
    for (int i = 0; i < static_cast<int>(grouped_tiles.size()); ++i) {
        const GroupedTile& tile = grouped_tiles[i];
        const std::string illegal = none.empty() ? why_not(problem, tile) : none;
        if (!illegal.empty()) {
            const Plan plan{.kernel = Kernel::grouped, .tile_index = i, .tile = {tile.slots(), tile.columns(), 0}};
            all.push_back({plan, illegal});
            continue;
        }
        std::vector<Candidate> parts;
        for (const int64_t sets : {1, 2, 4}) {
            for (const GroupedPart& part : useful_parts(problem, tile, sets)) {
                // On a small output twice the pixels are no more pixels.
                const auto is_same = [&](const Candidate& other) { return other.plan.grouped == part; };
                if (std::any_of(parts.begin(), parts.end(), is_same)) continue;
                parts.push_back(candidate_of_part(problem, device, i, part));
            }
        }
        // Of wide groups no part fits shared memory, and the one that needs least says so for all.
        const auto needed = [&](const Candidate& candidate) {
            return grouped_shape(problem, tile, candidate.plan.grouped).shared_bytes;
        };
        const auto needs_less = [&](const Candidate& a, const Candidate& b) { return needed(a) < needed(b); };
        const auto is_legal = [](const Candidate& candidate) { return candidate.illegal.empty(); };
        if (std::none_of(parts.begin(), parts.end(), is_legal)) {
            parts = {*std::min_element(parts.begin(), parts.end(), needs_less)};
        }
        all.insert(all.end(), parts.begin(), parts.end());
    }
}

std::string describe_grouped(const Plan& plan) {
    const GroupedTile& tile = grouped_tiles[plan.tile_index];
    std::string text = " " + std::to_string(plan.grouped.p) + "x" + std::to_string(plan.grouped.q) + " " +
                       reader_name(tile.reader) + " x" + std::to_string(tile.column_blocks) + " " +
                       std::to_string(plan.access_bytes) + "-byte";
    if (plan.convert_x) text += " after a copy of x";
    if (plan.convert_weight) text += " after a copy of the weight";
    return text;
}

}  // namespace fused_cna
