#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <vector>

#include <simt/report.h>
#include <device/tensor_map.cuh>

namespace simt {

// Copies of boxes between a tensor in global memory and shared memory. PTX ISA, "Data Movement and Conversion Instructions:
// cp.async.bulk.tensor"; "Tensors" in "State Spaces, Types, and Variables". "Once an asynchronous copy operation is
// initiated, modifying the source memory location or tensor descriptor or reading from the destination memory location
// before the asynchronous operation completes, exhibits undefined behavior." So here a load
//   - poisons its destination when it starts, as it may land at once;
//   - lands at later switches, in pieces of any order, and reads its source only then;
//   - is reported if its destination no longer holds the poison then;
//   - completes its bytes at its barrier with the last piece.
// And a store
//   - reads shared memory, as the async proxy sees it, when its thread waits for it or the block ends, as it may take that
//   long;
//   - is reported if shared memory, as threads see it, has changed since the store started.
// Reported for both: a map that was never encoded, or has another rank or kind; an address that is not aligned as the
// swizzle needs; a box that is not entirely inside shared memory; rows that do not fill the swizzle's span, as the manual
// does not say how such rows are laid out; a start before the earlier kernels have ended.
class TensorCopies {
   public:
    using TensorMap = fused_cna::device::TensorMap;

    // 2 to 4 coordinates of the first element, dense dimension first.
    void load_tile(int thread, uint32_t destination, const TensorMap& map, uint32_t barrier, std::initializer_list<int> at,
                   const Site& site);

    // "Im2col mode". Reported: a first pixel outside the bounding box, an offset outside 0 to 255.
    void load_im2col(int thread, uint32_t destination, const TensorMap& map, uint32_t barrier, int c, int w, int h, int n,
                     int offset_w, int offset_h, const Site& site);

    // Reported: a negative coordinate.
    void store_tile(int thread, const TensorMap& map, uint32_t source, std::initializer_list<int> at, const Site& site);

    // "cp.async.bulk.commit_group", "cp.async.bulk.wait_group", .read.
    void commit_stores(int thread);
    void wait_stores_read(int thread, int pending);

    void reset(int threads);

    // Must be called when all threads of the block have exited. Lands the stores that nobody waited for. Reported: a store
    // that was not committed.
    void check_end() const;

    // A box by its rows, each a run of the dense dimension, in their order in shared memory.
    struct Box {
        uint32_t address = 0;         // in shared memory
        std::byte* shared = nullptr;  // the memory at that address
        std::vector<std::byte*>
            rows;  // in global memory, each at the box's first coordinate; null where the row is outside the tensor
        int first_byte = 0, end_byte = 0;  // the part of every row that is inside the tensor
        int row_bytes = 0;                 // the swizzle's span

        bool is_whole() const { return first_byte == 0 && end_byte == row_bytes; }
        int64_t bytes() const { return int64_t{row_bytes} * static_cast<int64_t>(rows.size()); }
    };

   private:
    struct Store {
        Box box;
        std::vector<std::byte> source;  // as threads saw it when the store started
        Site site;
    };

    struct Queue {
        std::deque<std::vector<Store>> groups;
        std::vector<Store> uncommitted;
    };

    std::vector<Queue> queues_;  // by thread
};

}  // namespace simt
