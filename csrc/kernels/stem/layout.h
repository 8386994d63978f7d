// How the stem kernel divides a problem: the words of its reduction, the window of x that a rectangle of outputs reads, and
// the shared memory for both. Host only: the plan chooses by it, the launcher passes it to the kernel.
#pragma once

#include <algorithm>

#include "kernels/stem/tile.h"
#include "problem.h"

namespace fused_cna::stem {

struct Layout {
    // The reduction is counted in words of 4 bytes, the unit of MMA fragments: a float or two 16-bit values. The taps of a
    // filter row, channel first, form one run of words, because they are contiguous in the window.
    int64_t values_per_word = 0;
    int64_t pixel_pitch = 0;    // values from one pixel of the window to the next
    int64_t lead = 0;           // values in a run's first word before its first tap
    int64_t words_per_row = 0;  // of the filter
    int64_t chunks = 0;         // each of filter_rows
    int64_t words = 0;          // per chunk, padded to whole MMAs
    int64_t weight_pitch = 0;   // words from one output channel to the next

    // The window leaves out rows that no output reads, between those of one output row and the next.
    int64_t row_step = 0;  // window rows between the first rows of neighbouring output rows
    int64_t window_rows = 0, window_columns = 0;
    int64_t pixels_per_unit = 0;  // pixels in 16 bytes of one channel; windows start and end on whole units

    int64_t shared_bytes = 0;
};

inline Layout make_layout(const ConvProblem& problem, const Tile& tile, const Choice& choice) {
    constexpr int64_t words_per_mma = 8;
    constexpr int64_t bytes_per_word = 4;
    Layout g;
    const int64_t value_bytes = size_in_bytes(problem.dtype);
    g.values_per_word = bytes_per_word / value_bytes;
    g.pixels_per_unit = 16 / value_bytes;
    // Words are read whole, so every output's runs must start on a word. Where pixels of an odd number of values would break
    // that, each gets one more value.
    const bool dense = g.values_per_word == 1 || (problem.stride_w % 2 == 0 && problem.dil_w == 1);
    g.pixel_pitch = dense ? problem.c : round_up(problem.c, g.values_per_word);
    g.lead = problem.pad_left * g.pixel_pitch % g.values_per_word;
    g.words_per_row = ceil_div(g.lead + problem.s * g.pixel_pitch, g.values_per_word);
    g.chunks = ceil_div(problem.r, choice.filter_rows);
    g.words = round_up(choice.filter_rows * g.words_per_row, words_per_mma);
    // Four more than a multiple of eight, so that eight neighbouring channels' words are in distinct banks.
    g.weight_pitch = g.words + 4;

    const int64_t chunk_extent = (choice.filter_rows - 1) * problem.dil_h + 1;
    g.row_step = std::min(problem.stride_h, chunk_extent);
    g.window_rows = (choice.tile_p - 1) * g.row_step + chunk_extent;
    const int64_t unit = g.pixels_per_unit;
    const bool all_start_alike = choice.tile_q >= problem.q() || choice.tile_q * problem.stride_w % unit == 0;
    const int64_t most_before = all_start_alike ? (unit - problem.pad_left % unit) % unit : unit - 1;
    const int64_t columns_read = (choice.tile_q - 1) * problem.stride_w + (problem.s - 1) * problem.dil_w + 1;
    g.window_columns = round_up(most_before + columns_read, unit);

    constexpr int64_t beyond_any_memory = 1 << 18;  // keeps the products within 64 bits
    const auto limited = [](int64_t extent) { return extent < beyond_any_memory ? extent : beyond_any_memory; };
    const int64_t tap_table_bytes = limited(g.words) * 8;
    const int64_t weight_bytes = tile.n * limited(g.weight_pitch) * bytes_per_word;
    const int64_t window_bytes = limited(g.window_rows) * limited(g.window_columns) * g.pixel_pitch * value_bytes;
    g.shared_bytes = tile.table_bytes() + tap_table_bytes + weight_bytes + window_bytes;
    return g;
}

}  // namespace fused_cna::stem
