// The tile of depthwise_toeplitz, and how it lies in shared memory: read by the plan and by the kernel.
#pragma once

#include <cstdint>

namespace fused_cna {

// Filter rows that the kernel takes in one pass; a larger filter takes several.
inline constexpr int toeplitz_filter_rows[] = {5, 7};

// A block's output pixels, counted in strips; each strip is one row of the MMAs' left operand.
struct StripTile {
    static constexpr int strip_rows = 4, strip_columns = 8;  // output pixels
    static constexpr int most_strips = 16;
    static constexpr int pixels = most_strips * strip_rows * strip_columns;
    static constexpr int channels = 16;  // a whole 32-byte sector of every pixel
    static constexpr int threads = 256;
    static constexpr int blocks_per_multiprocessor = 3;  // that registers allow: the launch bound

    int images = 0, down = 0, across = 0;  // strips one below and one beside the other

    constexpr int rows() const { return down * strip_rows; }
    constexpr int columns() const { return across * strip_columns; }
    constexpr int strips() const { return images * down * across; }

    bool operator==(const StripTile&) const = default;
};

// A channel's input pixels in shared memory, in 16-byte chunks of 8 columns: images of rows, with a skew after every
// strip_rows of them. Strips that one load_matrices reads together lie in distinct banks: from one strip to the next the
// chunk goes on by `step`, modulo the 8 chunks that fill all banks.
struct StripPlanes {
    int rows = 0;                                 // of an image
    int row = 0, skew = 0, image = 0, plane = 0;  // from one to the next, in chunks

    // `filter_rows` in whole passes.
    static constexpr StripPlanes of(const StripTile& tile, int filter_rows) {
        StripPlanes planes;
        planes.rows = tile.rows() + filter_rows - 1;
        planes.row = tile.across + 1;  // an MMA takes 8 columns more than it gives
        // Where a row of strips fills the banks in whole parts, any odd step will do: the one that costs least memory.
        const int last_step = banks % tile.across == 0 ? 7 : 1;
        int step = 1;
        planes.skew = banks;
        for (int odd = 1; odd <= last_step; odd += 2) {
            const int skew = remainder(odd * tile.across - StripTile::strip_rows * planes.row);
            if (skew < planes.skew) {
                planes.skew = skew;
                step = odd;
            }
        }
        const int used = planes.rows * planes.row + (planes.rows - 1) / StripTile::strip_rows * planes.skew;
        planes.image = used + remainder(step * tile.across * tile.down - used);
        planes.plane = planes.image * tile.images;
        return planes;
    }

    // Where a strip begins.
    constexpr int strip_chunk(const StripTile& tile, int strip) const {
        const int position = strip / tile.across;
        return position / tile.down * image + position % tile.down * (StripTile::strip_rows * row + skew) +
               strip % tile.across;
    }

   private:
    static constexpr int banks = 8;  // of 16 bytes
    static constexpr int remainder(int chunks) { return (chunks % banks + banks) % banks; }
};

// The dynamic shared memory of a block, in bytes. The accumulators take it over from the operands.
struct StripMemory {
    static constexpr int widest_filter = 9;
    // A filter row as the MMAs take it: for every distance from an input back to an output, two words. The pitch, in words,
    // keeps neighbouring rows' stores free of bank conflicts.
    static constexpr int farthest_back = 7, filter_row_pitch = 30;
    // Of the accumulators, in floats: from pixel to pixel, odd against bank conflicts; from one row of all strips to the
    // next.
    static constexpr int pitch = StripTile::channels + 1;
    static constexpr int row_pitch = StripTile::pixels / StripTile::strip_rows * pitch;
    static constexpr int tables_bytes = 512;
    // Halves of the slab are stored together; this puts them into different banks.
    static constexpr int half_skew = 64;

    int64_t filter = 0;  // where it lies
    int64_t total = 0;

    static constexpr StripMemory of(const StripTile& tile, int filter_rows) {
        constexpr int chunk = 16;
        const int64_t planes = int64_t{StripPlanes::of(tile, filter_rows).plane} * chunk * StripTile::channels + half_skew;
        const int64_t filter = int64_t{StripTile::channels} * filter_rows * filter_row_pitch * 4;
        const int64_t operands = planes + filter, results = StripTile::pixels * pitch * 4;
        return {tables_bytes + planes, tables_bytes + (operands > results ? operands : results)};
    }
};

}  // namespace fused_cna
