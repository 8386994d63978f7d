// When `stem` is legal, its tiles and rectangles, and their estimated time.
#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels/stem/layout.h"
#include "plan/cost.h"
#include "plan/families.h"

namespace fused_cna::stem {

namespace {

// Assumptions, not measured yet; instructions are a warp's, counted in the compiled kernel.
constexpr double gather_instructions = 16;      // for 16 pixels' fragment in one MMA step: addresses, loads, masks
constexpr double store_instructions = 70;       // for one pixel's eight channels per lane: fold, activation, store
constexpr double unit_instructions = 60;        // for 16 bytes of three channels
constexpr double single_instructions = 60;      // for a pixel, value by value
constexpr double word_instructions = 100;       // to find a word's taps
constexpr double weight_instructions = 12;      // to pack one word of one channel
constexpr double tile_instructions = 200;       // for a warp, besides all these
constexpr double mma_latency = 70;              // gather and first products of a lone warp's step
constexpr int64_t most_words_of_a_chunk = 128;  // only where a filter is split into chunks

constexpr Choice smallest{.tile_p = 1, .tile_q = 1, .filter_rows = 1};

const Choice& choice_of(const Plan& plan) { return std::get<Choice>(plan.choice); }

int64_t resident_blocks(const Tile& tile, const Layout& layout, const DeviceInfo& device) {
    return fused_cna::resident_blocks(tile.threads(), layout.shared_bytes, tile.blocks_per_multiprocessor, device);
}

int64_t tiles_of(const ConvProblem& problem, const Choice& choice) {
    return problem.n * ceil_div(problem.p(), choice.tile_p) * ceil_div(problem.q(), choice.tile_q);
}

// Whether the window may be read in units; strides and alignment can still forbid it.
bool may_load_units(const ConvProblem& problem, const Layout& layout) {
    return problem.c == 3 && problem.w % layout.pixels_per_unit == 0;
}

// Cycles of a multiprocessor for one tile, while other blocks keep it busy during waits.
double tile_cycles(const ConvProblem& problem, const Tile& tile, const Layout& layout, const DeviceInfo& device) {
    const double mma_steps = static_cast<double>(layout.chunks * layout.words) / 8;
    const double fragments = tile.m / 16.0, fragments_per_warp = fragments / tile.warps;
    const double rate = mma_per_clock(device) * mma_share / (problem.dtype == DType::float32 ? 2 : 1);
    const double products = tile.m * tile.n * mma_steps * 8 * static_cast<double>(layout.values_per_word) / rate;

    const double weight_reads = tile.n * 32 / shared_bytes_per_cycle;
    const double shared = fragments * mma_steps * (4 + (weight_reads + 4) / fragments_per_warp);

    const double window_pixels = static_cast<double>(layout.chunks * layout.window_rows * layout.window_columns);
    const double load = may_load_units(problem, layout)
                            ? window_pixels / static_cast<double>(layout.pixels_per_unit) * unit_instructions
                            : window_pixels * single_instructions;
    const double step = gather_instructions + tile.n / 8 + (tile.n / 16 + 4) / fragments_per_warp;
    const double issued =
        fragments * (mma_steps * step + tile.n / 32 * 2 * store_instructions) + load / 32 + tile.warps * tile_instructions;
    return std::max({products, shared, issued / issued_per_cycle});
}

double pack_cycles(const Tile& tile, const Layout& layout) {
    const double passes = static_cast<double>(ceil_div(layout.words, 32));
    return passes * (tile.warps * word_instructions + tile.n * weight_instructions) / issued_per_cycle;
}

Estimate estimate(const ConvProblem& problem, const Plan& plan, const Layout& layout, const DeviceInfo& device) {
    const Choice& choice = choice_of(plan);
    const Tile& tile = tiles[choice.tile];
    const double tiles_n = static_cast<double>(ceil_div(problem.k, tile.n));
    const double tiles = static_cast<double>(tiles_of(problem, choice)) * tiles_n;
    const double rounds = plan.blocks > 0 ? std::ceil(tiles / static_cast<double>(plan.blocks)) : 0;
    const double packs = layout.chunks == 1 ? 1 : rounds * static_cast<double>(layout.chunks);
    const double pack = pack_cycles(tile, layout), per_tile = tile_cycles(problem, tile, layout, device);
    const double passes = static_cast<double>(ceil_div(layout.words, 32));
    const double mma_steps = static_cast<double>(layout.chunks * layout.words) / 8;
    const double lone_tile = static_cast<double>(layout.chunks) * memory_latency + mma_steps * mma_latency +
                             tile.n / 32.0 * 4 * store_instructions;
    return {.products_us = as_us(waves(plan, 1, device) * (packs * pack + rounds * per_tile), device),
            .bytes_us = transfer_us(compulsory_bytes(problem), device),
            .latency_us = as_us(waves(plan, resident_blocks(tile, layout, device), device) *
                                    (block_ends / 2 + packs * passes * memory_latency + rounds * lone_tile),
                                device),
            .overhead_us = launch_us};
}

// Rectangles to compare: sides that divide the output's evenly, and also widths of whole MMA fragments.
std::set<std::pair<int64_t, int64_t>> useful_rectangles(const ConvProblem& problem, const Tile& tile) {
    const int64_t p = problem.p(), q = problem.q();
    std::set<std::pair<int64_t, int64_t>> rectangles;
    for (const int64_t width : {4, 8, 16, 24, 32, 48, 64, 96, 128, 256}) {
        const int64_t even = ceil_div(q, ceil_div(q, width));
        for (const int64_t tile_q : {even, std::min(q, round_up(even, 8))}) {
            if (tile_q > tile.m) continue;
            for (int64_t most_p = std::min(p, tile.m / tile_q); most_p > 0; most_p /= 2) {
                rectangles.insert({ceil_div(p, ceil_div(p, most_p)), tile_q});
            }
        }
    }
    return rectangles;
}

std::set<int64_t> useful_filter_rows(const ConvProblem& problem, const Tile& tile) {
    const int64_t words_per_row = make_layout(problem, tile, smallest).words_per_row;
    const int64_t some = ceil_div(problem.r, ceil_div(problem.r * words_per_row, most_words_of_a_chunk));
    return {problem.r, std::max<int64_t>(some, 1), 1};
}

// The plan for one rectangle and chunk size, or nothing where shared memory is too small.
std::optional<Plan> plan_of(const ConvProblem& problem, const DeviceInfo& device, const Plan& base, const Choice& choice) {
    const Tile& tile = tiles[choice.tile];
    const Layout layout = make_layout(problem, tile, choice);
    const int64_t resident = resident_blocks(tile, layout, device);
    if (resident == 0) return std::nullopt;
    Plan plan = base;
    plan.choice = choice;
    const int64_t all_tiles = tiles_of(problem, choice), tiles_n = ceil_div(problem.k, tile.n);
    // As many blocks as run at once, or fewer where each would still compute as many tiles.
    const int64_t at_once = std::max<int64_t>(resident * device.multiprocessors / tiles_n, 1);
    plan.blocks = all_tiles > 0 ? tiles_n * ceil_div(all_tiles, ceil_div(all_tiles, at_once)) : 0;
    plan.estimate = estimate(problem, plan, layout, device);
    return plan;
}

std::string unsupported_reason(const ConvProblem& problem, const DeviceInfo& device) {
    if (!too_old(device).empty()) return too_old(device);
    if (problem.groups != 1) return with_numbers("it has", problem.groups, " groups", 1);
    if (problem.c > 4) return with_numbers("x has", problem.c, " channels", 4);
    if (problem.gemm_k() == 0) return "there is nothing to multiply";
    if (problem.dtype == DType::float32 && !problem.allow_tf32)
        return "float32 is to be exact, its tensor cores round to tf32";
    if (!too_far(problem).empty()) return too_far(problem);
    const int64_t most_tiles = problem.n * problem.p() * problem.q();
    if (most_tiles > int_limit) return with_numbers("it may need", most_tiles, " tiles", int_limit);
    return "";
}

Candidate candidate_of_tile(const ConvProblem& problem, const DeviceInfo& device, int index) {
    const Tile& tile = tiles[index];
    const int k = 32 / static_cast<int>(size_in_bytes(problem.dtype));
    Candidate candidate{.plan = {.kernel = Kernel::stem, .choice = Choice{.tile = index}, .tile = {tile.m, tile.n, k}},
                        .unsupported_reason = unsupported_reason(problem, device)};
    if (!candidate.is_supported()) return candidate;
    std::optional<Plan> best;
    for (const auto& [tile_p, tile_q] : useful_rectangles(problem, tile)) {
        for (const int64_t filter_rows : useful_filter_rows(problem, tile)) {
            const std::optional<Plan> plan = plan_of(problem, device, candidate.plan, {index, tile_p, tile_q, filter_rows});
            if (plan && (!best || plan->estimate < best->estimate)) best = plan;
        }
    }
    if (best) {
        candidate.plan = *best;
    } else {
        candidate.unsupported_reason = with_numbers("a filter row and the rows of x that it meets need",
                                                    make_layout(problem, tile, smallest).shared_bytes,
                                                    " bytes of shared memory", device.shared_per_block);
    }
    return candidate;
}

void list_candidates(Kernel, const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all) {
    for (int i = 0; i < static_cast<int>(tiles.size()); ++i) all.push_back(candidate_of_tile(problem, device, i));
}

std::string describe(const Plan& plan) {
    const Choice& choice = choice_of(plan);
    return " pixels " + std::to_string(choice.tile_p) + "x" + std::to_string(choice.tile_q) + " filter-rows " +
           std::to_string(choice.filter_rows);
}

Tiles list_tiles(Kernel, DType) {
    Tiles all;
    for (const Tile& tile : tiles) {
        all.push_back({tile.m, tile.n, tile.warps, tile.blocks_per_multiprocessor, tile.threads()});
    }
    return all;
}

}  // namespace

extern const Family family{Kernel::stem, "stem", list_candidates, describe, list_tiles};

}  // namespace fused_cna::stem
