// The tile of `depthwise_toeplitz` and its layout in shared memory, read by its plan and its kernel.
#pragma once

#include <cstdint>

namespace fused_cna::depthwise_toeplitz {

// Filter rows per pass; a larger filter takes several passes.
inline constexpr int filter_rows_of_pass[] = {5, 7};

// Output pixels are counted in strips; each strip is one row of the MMAs' left operand.
inline constexpr int strip_rows = 4, strip_columns = 8;  // output pixels
inline constexpr int most_strips = 16;                   // per block
inline constexpr int most_pixels = most_strips * strip_rows * strip_columns;
inline constexpr int slab_channels = 16;  // per block: a whole 32-byte sector of every pixel
inline constexpr int widest_filter = 9;
inline constexpr int threads = 256;
inline constexpr int blocks_per_multiprocessor = 3;  // the launch bound, set by registers

struct Choice {
    int pass = 0;                          // index in filter_rows_of_pass
    int images = 0, down = 0, across = 0;  // images, strips down, strips across

    constexpr int rows() const { return down * strip_rows; }
    constexpr int columns() const { return across * strip_columns; }
    constexpr int strips() const { return images * down * across; }
};

// A filter row in the form that the MMAs read: two words for every distance from an input back to an output. The pitch, in
// words, keeps neighbouring rows' stores free of bank conflicts.
inline constexpr int farthest_back = 7, filter_row_pitch = 30;
// Strides of the accumulators, in floats: from pixel to pixel, odd to avoid bank conflicts, and from one row of all strips
// to the next.
inline constexpr int pitch = slab_channels + 1;
inline constexpr int row_pitch = most_pixels / strip_rows * pitch;
inline constexpr int chunk_bytes = 16;
inline constexpr int tables_bytes = 512;
// The two halves of the slab are stored together; the skew puts them into different banks.
inline constexpr int half_skew = 64;

// A block's shared memory: tables, then the planes, then the filter. A plane holds a channel's input pixels in chunks of 8
// columns: images of rows, with a skew after every strip_rows rows. Strips that one load_matrices reads together are in
// distinct banks: from one strip to the next the chunk advances by `step`, modulo the 8 chunks that fill all banks.
struct Layout {
    int rows = 0;                                 // per image
    int row = 0, skew = 0, image = 0, plane = 0;  // distances from one to the next, in chunks
    int64_t filter_at = 0, shared_bytes = 0;      // the accumulators reuse the memory of planes and filter

    // `filter_rows` must be whole passes.
    static constexpr Layout of(const Choice& tile, int filter_rows) {
        Layout layout;
        layout.rows = tile.rows() + filter_rows - 1;
        layout.row = tile.across + 1;  // an MMA reads 8 columns more than it computes
        // Where rows of strips divide the banks evenly, any odd step works: take the one that costs the least memory.
        const int last_step = banks % tile.across == 0 ? 7 : 1;
        int step = 1;
        layout.skew = banks;
        for (int odd = 1; odd <= last_step; odd += 2) {
            const int skew = remainder(odd * tile.across - strip_rows * layout.row);
            if (skew < layout.skew) {
                layout.skew = skew;
                step = odd;
            }
        }
        const int used = layout.rows * layout.row + (layout.rows - 1) / strip_rows * layout.skew;
        layout.image = used + remainder(step * tile.across * tile.down - used);
        layout.plane = layout.image * tile.images;

        const int64_t planes = int64_t{layout.plane} * chunk_bytes * slab_channels + half_skew;
        const int64_t filter = int64_t{slab_channels} * filter_rows * filter_row_pitch * 4;
        const int64_t operands = planes + filter, results = most_pixels * pitch * 4;
        layout.filter_at = tables_bytes + planes;
        layout.shared_bytes = tables_bytes + (operands > results ? operands : results);
        return layout;
    }

    // The first chunk of a strip.
    constexpr int strip_chunk(const Choice& tile, int strip) const {
        const int position = strip / tile.across;
        return position / tile.down * image + position % tile.down * (strip_rows * row + skew) + strip % tile.across;
    }

   private:
    static constexpr int banks = 8;  // 16 bytes each
    static constexpr int remainder(int chunks) { return (chunks % banks + banks) % banks; }
};

}  // namespace fused_cna::depthwise_toeplitz
