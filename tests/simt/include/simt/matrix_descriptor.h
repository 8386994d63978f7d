#pragma once
#include <cstdint>

#include <simt/async_proxy.h>
#include <simt/shared_memory.h>

namespace simt {

// A matrix of wgmma in shared memory, K-major with the 128-byte swizzle: the only layout that is simulated. PTX ISA, "Matrix
// Descriptor Format", "Strides": rows of 128 bytes, of which a product takes 32; eight rows are contiguous.
class SharedMatrix {
   public:
    static constexpr int bytes_per_row = 32;

    // Reported: bits that are unused or mean another layout, groups of eight rows that do not start on 1,024 bytes, a matrix
    // that is not entirely inside shared memory. `name`: "a" or "b".
    SharedMatrix(uint64_t descriptor, int rows, const char* name, const SharedMemory& shared, const Site& site);

    int rows() const { return rows_; }

    // Copies a row's 32 bytes, as the async proxy sees them.
    void read_row(int row, const AsyncProxy& proxy, std::byte* destination) const;

   private:
    const std::byte* start_;
    int64_t stride_;  // from eight rows to the next eight
    int rows_;
};

}  // namespace simt
