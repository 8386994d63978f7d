// How the kernel of narrow groups lays a problem out: what a block reads and where it keeps it. The plan asks for sizes,
// the kernel for places.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_problem.h"
#include "tiles.h"

namespace fused_cna {

// Output pixels are taken in octets, eight neighbours of one row: the rows of one matrix of ldmatrix. A row's last octet may
// be partly empty. A slot is a place for an output pixel in an octet.
inline constexpr int octet = 8;

struct GroupedShape {
    // The input that the rectangle of output pixels reads, its halo. Columns are sorted by their place modulo the stride, in
    // as many phases, so that neighbouring outputs read neighbouring positions of a row whatever the stride.
    int64_t halo_rows = 0, halo_columns = 0, phases = 0, phase_columns = 0, row_positions = 0;
    // Bytes of one group's channels, of all of a block's, and from one position to the next. The latter is an odd multiple
    // of the widest access to a group, so that the reads of an octet are free of bank conflicts.
    int64_t tap_bytes = 0, pixel_bytes = 0, pixel_pitch = 0;
    // The reduction of one output channel, (r, s, c). A step takes 32 bytes, the last one `tail_words` words of 4 bytes.
    int64_t weight_bytes = 0, weight_pitch = 0, steps = 0, tail_words = 0;
    int64_t octets_per_row = 0, pixel_sets = 0, slots = 0;  // a set is one warp's share of the slots
    int64_t units_per_group = 0, units = 0, warps = 0;      // a unit is one warp's share of the columns
    int64_t columns = 0, staging_pitch = 0;                 // output channels; floats from one slot to the next
    int64_t slabs_per_group = 0, slabs = 0;                 // a slab is a block's share of the channels
    int64_t tiles_p = 0, tiles_q = 0, blocks = 0;

    // Offsets in shared memory, where the staged accumulators take over the operands'.
    int64_t weights_at = 0, offsets_at = 0, columns_at = 0, places_at = 0, folds_at = 0, shared_bytes = 0;
};

// Entries of a step in the table of offsets.
constexpr int64_t offsets_per_step(GroupReader reader) { return reader == GroupReader::chunks ? 2 : 8; }

inline constexpr int64_t bytes_per_place = 16, bytes_per_fold = 12;

constexpr GroupedShape grouped_shape(const ConvProblem& problem, const GroupedTile& tile, const GroupedPart& part) {
    GroupedShape shape;
    shape.halo_rows = (part.p - 1) * problem.stride_h + (problem.r - 1) * problem.dil_h + 1;
    shape.halo_columns = (part.q - 1) * problem.stride_w + (problem.s - 1) * problem.dil_w + 1;
    shape.phases = part.q > 1 ? problem.stride_w : 1;
    shape.phase_columns = ceil_div(shape.halo_columns, shape.phases);
    shape.row_positions = shape.phases * shape.phase_columns;

    const int64_t granule = problem.dense_access();
    shape.tap_bytes = problem.c_per_group() * size_in_bytes(problem.dtype);
    shape.pixel_bytes = part.groups * shape.tap_bytes;
    shape.pixel_pitch = (shape.pixel_bytes / granule | 1) * granule;

    shape.weight_bytes = problem.r * problem.s * shape.tap_bytes;
    shape.weight_pitch = round_up(shape.weight_bytes, 32) + 16;
    shape.steps = ceil_div(shape.weight_bytes, 32);
    shape.tail_words = (shape.weight_bytes - (shape.steps - 1) * 32) / 4;

    shape.octets_per_row = ceil_div(part.q, octet);
    shape.pixel_sets = ceil_div(part.p * shape.octets_per_row * octet, tile.slots());
    shape.slots = shape.pixel_sets * tile.slots();
    shape.units_per_group = ceil_div(part.columns_per_group, tile.columns());
    shape.units = part.groups * shape.units_per_group;
    shape.warps = shape.pixel_sets * shape.units;
    shape.columns = int64_t{part.groups} * part.columns_per_group;
    shape.staging_pitch = (ceil_div(shape.columns, 8) | 1) * 8;

    shape.slabs_per_group = ceil_div(problem.k_per_group(), part.columns_per_group);
    shape.slabs = ceil_div(problem.groups, part.groups) * shape.slabs_per_group;
    shape.tiles_p = ceil_div(problem.p(), part.p);
    shape.tiles_q = ceil_div(problem.q(), part.q);
    shape.blocks = problem.n * shape.tiles_p * shape.tiles_q * shape.slabs;

    // More than any shared memory holds is too much, however much, and the product is not to overflow.
    constexpr int64_t most_positions = int64_t{1} << 24;
    const int64_t positions = std::min(shape.halo_rows * shape.row_positions, most_positions);
    shape.weights_at = round_up(positions * shape.pixel_pitch, 16);
    const int64_t operands = shape.weights_at + shape.columns * shape.weight_pitch;
    const int64_t staged = shape.slots * shape.staging_pitch * int64_t{sizeof(float)};
    shape.offsets_at = std::max(operands, staged);
    // One step more than there are, because the next step's offsets are read ahead.
    shape.columns_at = shape.offsets_at + (shape.steps + 1) * offsets_per_step(tile.reader) * int64_t{sizeof(int)};
    shape.places_at = round_up(shape.columns_at + shape.row_positions * int64_t{sizeof(int)}, 16);
    shape.folds_at = shape.places_at + shape.slots * bytes_per_place;
    shape.shared_bytes = shape.folds_at + round_up(shape.columns, 8) * bytes_per_fold;
    return shape;
}

}  // namespace fused_cna
