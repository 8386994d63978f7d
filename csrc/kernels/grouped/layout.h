// The layout of a problem for `grouped`: what a block reads, and where it lies in shared memory. The plan needs the sizes,
// the launcher passes the offsets to the kernel.
#pragma once

#include <algorithm>

#include "kernels/grouped/tile.h"
#include "problem.h"

namespace fused_cna::grouped {

// Output pixels are taken in octets: eight neighbours of one row, the rows of one ldmatrix matrix. A row's last octet may be
// partly empty. A slot is a place for an output pixel in an octet.
inline constexpr int octet = 8;

struct Layout {
    // The halo: the input that the rectangle of output pixels reads. Its columns are sorted by their index modulo the stride
    // (their phase), so that neighbouring outputs read neighbouring positions of a row whatever the stride.
    int64_t halo_rows = 0, halo_columns = 0, phases = 0, phase_columns = 0, row_positions = 0;
    // Bytes of one group's channels, of all the block's groups, and from one position to the next. The last is an odd
    // multiple of a group's widest access, so that the reads of an octet have no bank conflicts.
    int64_t tap_bytes = 0, pixel_bytes = 0, pixel_pitch = 0;
    // The reduction of one output channel, (r, s, c). A step takes 32 bytes, the last `tail_words` words of 4 bytes.
    int64_t weight_bytes = 0, weight_pitch = 0, steps = 0, tail_words = 0;
    int64_t octets_per_row = 0, pixel_sets = 0, slots = 0;  // a set is one warp's share of the slots
    int64_t units_per_group = 0, units = 0, warps = 0;      // a unit is one warp's share of the columns
    int64_t columns = 0, staging_pitch = 0;                 // output channels; floats from one slot to the next
    int64_t slabs_per_group = 0, slabs = 0;                 // a slab is a block's share of the channels
    int64_t tiles_p = 0, tiles_q = 0, blocks = 0;

    // Offsets in shared memory. The staged accumulators reuse the operands' memory.
    int64_t weights_at = 0, offsets_at = 0, columns_at = 0, places_at = 0, folds_at = 0, shared_bytes = 0;
};

// Entries per step in the table of offsets.
constexpr int64_t offsets_per_step(Reader reader) { return reader == Reader::chunks ? 2 : 8; }

inline constexpr int64_t bytes_per_place = 16, bytes_per_fold = 12;

constexpr Layout make_layout(const ConvProblem& problem, const Tile& tile, const Choice& choice) {
    Layout layout;
    layout.halo_rows = (choice.p - 1) * problem.stride_h + (problem.r - 1) * problem.dil_h + 1;
    layout.halo_columns = (choice.q - 1) * problem.stride_w + (problem.s - 1) * problem.dil_w + 1;
    layout.phases = choice.q > 1 ? problem.stride_w : 1;
    layout.phase_columns = ceil_div(layout.halo_columns, layout.phases);
    layout.row_positions = layout.phases * layout.phase_columns;

    const int64_t granule = problem.dense_vector_bytes();
    layout.tap_bytes = problem.c_per_group() * size_in_bytes(problem.dtype);
    layout.pixel_bytes = choice.groups * layout.tap_bytes;
    layout.pixel_pitch = (layout.pixel_bytes / granule | 1) * granule;

    layout.weight_bytes = problem.r * problem.s * layout.tap_bytes;
    layout.weight_pitch = round_up(layout.weight_bytes, 32) + 16;
    layout.steps = ceil_div(layout.weight_bytes, 32);
    layout.tail_words = (layout.weight_bytes - (layout.steps - 1) * 32) / 4;

    layout.octets_per_row = ceil_div(choice.q, octet);
    layout.pixel_sets = ceil_div(choice.p * layout.octets_per_row * octet, tile.slots());
    layout.slots = layout.pixel_sets * tile.slots();
    layout.units_per_group = ceil_div(choice.columns_per_group, tile.columns());
    layout.units = choice.groups * layout.units_per_group;
    layout.warps = layout.pixel_sets * layout.units;
    layout.columns = int64_t{choice.groups} * choice.columns_per_group;
    layout.staging_pitch = (ceil_div(layout.columns, 8) | 1) * 8;

    layout.slabs_per_group = ceil_div(problem.k_per_group(), choice.columns_per_group);
    layout.slabs = ceil_div(problem.groups, choice.groups) * layout.slabs_per_group;
    layout.tiles_p = ceil_div(problem.p(), choice.p);
    layout.tiles_q = ceil_div(problem.q(), choice.q);
    layout.blocks = problem.n * layout.tiles_p * layout.tiles_q * layout.slabs;

    // Clamped to more than any shared memory holds, so that the product cannot overflow.
    constexpr int64_t most_positions = int64_t{1} << 24;
    const int64_t positions = std::min(layout.halo_rows * layout.row_positions, most_positions);
    layout.weights_at = round_up(positions * layout.pixel_pitch, 16);
    const int64_t operands = layout.weights_at + layout.columns * layout.weight_pitch;
    const int64_t staged = layout.slots * layout.staging_pitch * int64_t{sizeof(float)};
    layout.offsets_at = std::max(operands, staged);
    // One step more than there are, because the next step's offsets are read ahead.
    layout.columns_at = layout.offsets_at + (layout.steps + 1) * offsets_per_step(tile.reader) * int64_t{sizeof(int)};
    layout.places_at = round_up(layout.columns_at + layout.row_positions * int64_t{sizeof(int)}, 16);
    layout.folds_at = layout.places_at + layout.slots * bytes_per_place;
    layout.shared_bytes = layout.folds_at + round_up(layout.columns, 8) * bytes_per_fold;
    return layout;
}

}  // namespace fused_cna::grouped
