#pragma once
#include <cstdint>

#include <simt/async_proxy.h>
#include <simt/collective.h>
#include <simt/shared_memory.h>

namespace simt {

struct LoadMatricesSlot {
    uint32_t row_address;
    uint32_t* words;  // one word of each matrix
};

// PTX ISA, "Warp Level Matrix Instructions: ldmatrix", .m8n8.x4.b16: lanes 8i to 8i + 7 address the rows of matrix i, 16
// bytes each, and lane l receives word l % 4 of row l / 4 of every matrix.
// Reported: a row that is not 16-byte aligned or not inside shared memory.
void load_matrices(const Lanes<LoadMatricesSlot>& lanes, const SharedMemory& shared, const Site& site);

struct StoreMatricesSlot {
    uint32_t row_address;
    const uint32_t* words;
    int thread;
};

// PTX ISA, "Warp-level matrix store instruction: stmatrix", .m8n8.x4.b16: the inverse. Each lane writes its own words.
void store_matrices(const Lanes<StoreMatricesSlot>& lanes, const SharedMemory& shared, AsyncProxy& proxy, const Site& site);

}  // namespace simt
