// Replaces csrc/device/warpgroup.cuh when the kernels are compiled for the simulator: wgmma.
#pragma once

#include <cstdint>
#include <type_traits>

#include <simt/block.h>
#include <device/ptx.cuh>
#include <device/types.cuh>

namespace fused_cna::device {

// PTX ISA, "Matrix Descriptor Format": contiguous rows of 128 bytes with the 128-byte swizzle.
inline uint64_t matrix_descriptor(uint32_t address) {
    constexpr uint64_t eight_rows = 1024, swizzle_128 = 1;
    return (address & 0x3FFFF) >> 4 | uint64_t{1} << 16 | eight_rows >> 4 << 32 | swizzle_128 << 62;
}

inline void fence_products(Where where = Where::current()) { simt::block().warpgroup().fence({"fence_products", where}); }

inline void commit_products(Where where = Where::current()) { simt::block().warpgroup().commit({"commit_products", where}); }

template <int Pending>
void wait_products(Where where = Where::current()) {
    static_assert(Pending >= 0);
    simt::block().warpgroup().wait(Pending, {"wait_products", where});
}

// Sums are in memory, and change only in the functions here.
template <int Count>
void hold_sums(float (&)[Count]) {}

template <class T, int N>
void multiply_async(float (&d)[N / 2], uint64_t a, uint64_t b, bool add, Where where = Where::current()) {
    static_assert(std::is_same_v<T, half> || std::is_same_v<T, bfloat16> || std::is_same_v<T, float>);
    static_assert(N == 32 || N == 64 || N == 128 || N == 192 || N == 256, "csrc/device/warpgroup.cuh has no other");
    simt::block().warpgroup().multiply_async({d, a, b, add, operand_of<T>, N}, {"multiply_async", where});
}

}  // namespace fused_cna::device
