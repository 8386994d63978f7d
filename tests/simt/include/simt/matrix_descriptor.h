#pragma once
#include <cstdint>

#include <simt/async_proxy.h>
#include <simt/shared_memory.h>

namespace simt {

// A matrix of wgmma in shared memory, K-major with the 128-byte swizzle: the one layout that is simulated. PTX ISA, "Matrix
// Descriptor Format", "Strides": rows of 128 bytes, of which a product takes 32; eight rows lie one behind the other.
class SharedMatrix {
   public:
    static constexpr int bytes_per_row = 32;

    // Reported: bits that mean another layout or nothing, groups of eight rows that do not start on 1,024 bytes, a matrix
    // that is not wholly inside shared memory. `name`: "a" or "b".
    SharedMatrix(uint64_t descriptor, int rows, const char* name, const SharedMemory& shared, const Site& site);

    int rows() const { return rows_; }

    // Copies a row's 32 bytes, as the async proxy sees them.
    void read_row(int row, const AsyncProxy& proxy, std::byte* destination) const;

   private:
    const std::byte* start_;
    int64_t stride_;  // of eight rows
    int rows_;
};

}  // namespace simt
