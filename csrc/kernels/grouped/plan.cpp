// When `grouped` is legal, its tiles and rectangles, and their estimated time.
#include <algorithm>

#include "kernels/grouped/layout.h"
#include "plan/cost.h"
#include "plan/families.h"

namespace fused_cna::grouped {

namespace {

const char* reader_name(Reader reader) { return reader == Reader::chunks ? "chunks" : "words"; }

// Instructions of a warp, counted in the compiled kernel.
constexpr double block_instructions = 700;                                   // coordinates, tables
constexpr double copy_instructions = 50;                                     // of 32 copies
constexpr double chunk_step_instructions = 36, word_step_instructions = 80;  // of a step, besides its products
constexpr double product_instructions = 5.5;  // of 16 x 8 results, with its share of the weights' fragments
constexpr double staging_instructions = 6;    // of 32 pairs of accumulators

// Assumptions, not measured yet; times in multiprocessor cycles.
constexpr double lone_step = 70;               // offsets, fragments and first products of a lone warp's step
constexpr double lone_instruction = 2;         // of a lone warp outside the main loop
constexpr double staging_cycles = 24.0 / 256;  // of shared memory, for one staged accumulator
constexpr double slot_cost = 4;                // a slot's time, in units of one halo position's

int64_t resident_blocks(const Tile& tile, const Layout& layout, const DeviceInfo& device) {
    const int64_t by_registers = tile.blocks_per_multiprocessor * Tile::most_warps / layout.warps;
    return fused_cna::resident_blocks(static_cast<int>(layout.warps * 32), layout.shared_bytes,
                                      static_cast<int>(by_registers), device);
}

const Choice& choice_of(const Plan& plan) { return std::get<Choice>(plan.choice); }
const Tile& tile_of(const Plan& plan) { return tiles[choice_of(plan).tile]; }
Layout layout_of(const ConvProblem& problem, const Plan& plan) {
    return make_layout(problem, tile_of(plan), choice_of(plan));
}

Estimate estimate(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device) {
    const Tile& tile = tile_of(plan);
    const Layout layout = layout_of(problem, plan);
    // ldmatrix and 32-bit loads both take four cycles for a fragment of x.
    const double fragment_cycles = Tile::fragments * 4 + tile.column_blocks * 2 + (tile.column_blocks > 1 ? 1 : 2);
    const double mma_cycles = 16 * 8 * 16 / (mma_per_clock(device) * mma_share);
    const double warp_steps = static_cast<double>(layout.warps * layout.steps);
    const double halo_bytes = static_cast<double>(layout.halo_rows * layout.halo_columns * layout.pixel_bytes);
    const double weights_bytes = static_cast<double>(layout.columns * layout.weight_bytes);
    const double staged = static_cast<double>(layout.slots * layout.columns);
    const double copies = (halo_bytes + weights_bytes) / plan.vector_bytes;
    const EpilogueCycles epilogue = epilogue_cycles(problem, staged, static_cast<int>(layout.warps * 32));
    const double step_instructions = (tile.reader == Reader::chunks ? chunk_step_instructions : word_step_instructions) +
                                     tile.column_blocks * product_instructions;
    const double warps = static_cast<double>(layout.warps);
    const double ahead = warps * block_instructions + copies / 32 * copy_instructions;
    const double instructions = ahead + warp_steps * step_instructions + staged / 64 * staging_instructions;
    const double cycles = std::max({
        warp_steps * Tile::fragments * tile.column_blocks * mma_cycles,
        warp_steps * fragment_cycles + staged * staging_cycles + (halo_bytes + weights_bytes) / shared_bytes_per_cycle,
        (halo_bytes + weights_bytes) / l2_bytes_per_cycle,
        instructions / issued_per_cycle + epilogue.busy,
    });
    // Halo positions are known after the weights' copies, fragments after the halo's.
    const double alone = ahead / warps * lone_instruction + 2 * memory_latency +
                         static_cast<double>(layout.steps) * lone_step + epilogue.alone;
    const int64_t resident = resident_blocks(tile, layout, device);
    return {.products_us = as_us(waves(plan, 1, device) * cycles, device),
            .bytes_us = transfer_us(compulsory_bytes(problem), device),
            .latency_us = as_us(waves(plan, resident, device) * alone, device),
            .overhead_us = launch_us + conversions_us(problem, plan, device)};
}

// Why no tile takes the problem; empty where some may.
std::string unsupported_reason(const ConvProblem& problem, const DeviceInfo& device) {
    if (!too_old(device).empty()) return too_old(device);
    if (problem.c_per_group() == 1) return "a group of one channel has too few products for tensor cores";
    if (problem.dtype == DType::float32 && !problem.allow_tf32) {
        return "float32 is to be exact, its tensor cores round to tf32";
    }
    if (problem.gemm_k() == 0) return "there is nothing to multiply";
    if (const std::string reason = no_copies_reason(problem); !reason.empty()) return reason;
    return too_far(problem);
}

// Why this tile does not take the problem; empty where it may.
std::string unsupported_reason(const ConvProblem& problem, const Tile& tile) {
    if (tile.reader == Reader::chunks && problem.dense_vector_bytes() < 16) {
        return "a group's " + std::to_string(problem.c_per_group()) + " channels are not whole chunks of 16 bytes";
    }
    if (problem.k_per_group() <= tile.columns() - 8) {
        return "groups have " + std::to_string(problem.k_per_group()) + " output channels, this tile takes " +
               std::to_string(tile.columns()) + " at a time";
    }
    return "";
}

// The rectangle of at most `sets` pixel sets that covers the output at the least cost of slots and halo.
Choice best_rectangle(const ConvProblem& problem, const Tile& tile, int64_t sets) {
    const int64_t octets = sets * tile.slots() / octet;
    Choice best;
    double least = 0;
    const auto consider = [&](int64_t q) {
        const int64_t rows = std::min(octets / ceil_div(q, octet), problem.p());
        const int64_t p = ceil_div(problem.p(), ceil_div(problem.p(), rows));
        const Choice choice{.p = static_cast<int>(p), .q = static_cast<int>(q), .groups = 1, .columns_per_group = 1};
        const Layout layout = make_layout(problem, tile, choice);
        const double halo = static_cast<double>(layout.halo_rows * layout.halo_columns);
        const double cost =
            static_cast<double>(layout.tiles_p * layout.tiles_q) * (slot_cost * static_cast<double>(layout.slots) + halo);
        if (best.p == 0 || cost < least) {
            best = choice;
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

// Shares of the channels to compare for a number of pixel sets: as many groups as there are warps, then fewer, for more
// blocks; where one group has too many output channels, a part of them.
std::vector<Choice> useful_choices(const ConvProblem& problem, int index, int64_t sets) {
    const Tile& tile = tiles[index];
    Choice rectangle = best_rectangle(problem, tile, sets);
    rectangle.tile = index;
    const int64_t units = Tile::most_warps / sets, columns = problem.k_per_group();
    const int64_t units_per_group = ceil_div(columns, tile.columns());
    std::vector<Choice> choices;
    const auto add = [&](int64_t groups, int64_t columns_per_group) {
        Choice choice = rectangle;
        choice.groups = static_cast<int>(groups);
        choice.columns_per_group = static_cast<int>(columns_per_group);
        if (std::find(choices.begin(), choices.end(), choice) == choices.end()) choices.push_back(choice);
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
    return choices;
}

Candidate candidate_of(const ConvProblem& problem, const DeviceInfo& device, const Choice& choice) {
    const Tile& tile = tiles[choice.tile];
    const Layout layout = make_layout(problem, tile, choice);
    Candidate candidate{.plan = {.kernel = Kernel::grouped,
                                 .choice = choice,
                                 .tile = {static_cast<int>(layout.slots), static_cast<int>(layout.columns),
                                          32 / static_cast<int>(size_in_bytes(problem.dtype))},
                                 .convert_x = problem.x_pixel_vector_bytes < 4,
                                 .convert_weight = problem.weight_vector_bytes < 4,
                                 .blocks = layout.blocks}};
    Plan& plan = candidate.plan;
    const int64_t of_pixel = plan.convert_x ? problem.dense_pixel_vector_bytes() : problem.x_pixel_vector_bytes;
    plan.vector_bytes = static_cast<int>(std::min(problem.dense_vector_bytes(), of_pixel));
    if (resident_blocks(tile, layout, device) == 0) {
        candidate.unsupported_reason =
            with_numbers("its operands need", layout.shared_bytes, " bytes of shared memory", device.shared_per_block);
    } else if (plan.blocks > int_limit) {
        candidate.unsupported_reason = with_numbers("it needs", plan.blocks, " blocks", int_limit);
    } else {
        plan.estimate = estimate(problem, plan, device);
    }
    return candidate;
}

void list_candidates(Kernel, const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all) {
    const std::string none = unsupported_reason(problem, device);
    for (int i = 0; i < static_cast<int>(tiles.size()); ++i) {
        const std::string reason = none.empty() ? unsupported_reason(problem, tiles[i]) : none;
        if (!reason.empty()) {
            const BlockTile tile{tiles[i].slots(), tiles[i].columns(), 0};
            all.push_back({{.kernel = Kernel::grouped, .choice = Choice{.tile = i}, .tile = tile}, reason});
            continue;
        }
        std::vector<Candidate> found;
        for (const int64_t sets : {1, 2, 4}) {
            for (const Choice& choice : useful_choices(problem, i, sets)) {
                // On a small output, more pixel sets may give the same choice again.
                const auto is_same = [&](const Candidate& other) { return choice_of(other.plan) == choice; };
                if (std::ranges::none_of(found, is_same)) found.push_back(candidate_of(problem, device, choice));
            }
        }
        // With wide groups no share may fit shared memory; then only the smallest is listed, with its reason.
        const auto needed = [&](const Candidate& candidate) { return layout_of(problem, candidate.plan).shared_bytes; };
        if (std::ranges::none_of(found, &Candidate::is_supported)) found = {*std::ranges::min_element(found, {}, needed)};
        all.insert(all.end(), found.begin(), found.end());
    }
}

std::string describe(const Plan& plan) {
    const Choice& choice = choice_of(plan);
    return " " + std::to_string(choice.p) + "x" + std::to_string(choice.q) + " " + reader_name(tile_of(plan).reader) + " x" +
           std::to_string(tile_of(plan).column_blocks) + " " + std::to_string(plan.vector_bytes) + "-byte" +
           describe_copies(plan);
}

Tiles list_tiles(Kernel, DType) {
    Tiles all;
    for (const auto& [reader, column_blocks, blocks] : tiles) {
        all.push_back({static_cast<int>(reader), column_blocks, blocks, Tile::most_threads});
    }
    return all;
}

}  // namespace

extern const Family family{Kernel::grouped, "grouped", list_candidates, describe, list_tiles};

}  // namespace fused_cna::grouped
