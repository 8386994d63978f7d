// wgmma: a warpgroup's products on tensor cores, with operands in shared memory, asynchronous to its threads. Compute
// capability 9.0 alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include <device/types.cuh>

namespace fused_cna::device {

// PTX ISA, "Matrix Descriptor Format", for a matrix with the 128-byte swizzle whose 128-byte rows are contiguous from a
// multiple of 1,024 on. The stride offset is eight rows, 1,024 bytes; the leading offset is ignored. A step of 32 bytes
// along the rows adds 2 to the descriptor, a step of eight rows adds 64.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
    constexpr uint64_t eight_rows = 1024, swizzle_128 = 1;
    return (address & 0x3FFFF) >> 4 | uint64_t{1} << 16 | eight_rows >> 4 << 32 | swizzle_128 << 62;
}

// Needed before the first product on registers that the threads have written.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of products since the last commit.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all but the latest Pending groups are done; their operands may then be overwritten.
template <int Pending>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving uses of the sums across a wait for them.
template <int Count>
__device__ __forceinline__ void hold_sums(float (&d)[Count]) {
#pragma unroll
    for (float& value : d) asm volatile("" : "+f"(value)::"memory");
}

// wgmma.mma_async: d = a * b, or d += a * b, for 64 rows of a and N rows of b, 32 bytes of each. Thread t of the warpgroup
// holds pairs of columns of row t / 32 * 16 + t % 32 / 4 and of the row 8 below: d[4 i] and d[4 i + 1] are column
// 8 i + t % 4 * 2 and the next of the first row, d[4 i + 2] and d[4 i + 3] the same columns of the second.
template <class T, int N>
__device__ __forceinline__ void multiply_async(float (&d)[N / 2], uint64_t a, uint64_t b, bool add);

// clang-format off
#define FUSED_CNA_TEN(t) "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9,"
#define FUSED_CNA_NAMES_16 FUSED_CNA_TEN("") "%10,%11,%12,%13,%14,%15"
#define FUSED_CNA_NAMES_32 FUSED_CNA_TEN("") FUSED_CNA_TEN("1") FUSED_CNA_TEN("2") "%30,%31"
#define FUSED_CNA_NAMES_64 FUSED_CNA_TEN("") FUSED_CNA_TEN("1") FUSED_CNA_TEN("2") FUSED_CNA_TEN("3") FUSED_CNA_TEN("4") \
    FUSED_CNA_TEN("5") "%60,%61,%62,%63"
#define FUSED_CNA_NAMES_96 FUSED_CNA_TEN("") FUSED_CNA_TEN("1") FUSED_CNA_TEN("2") FUSED_CNA_TEN("3") FUSED_CNA_TEN("4") \
    FUSED_CNA_TEN("5") FUSED_CNA_TEN("6") FUSED_CNA_TEN("7") FUSED_CNA_TEN("8") "%90,%91,%92,%93,%94,%95"
#define FUSED_CNA_NAMES_128 FUSED_CNA_TEN("") FUSED_CNA_TEN("1") FUSED_CNA_TEN("2") FUSED_CNA_TEN("3") \
    FUSED_CNA_TEN("4") FUSED_CNA_TEN("5") FUSED_CNA_TEN("6") FUSED_CNA_TEN("7") FUSED_CNA_TEN("8") FUSED_CNA_TEN("9") \
    FUSED_CNA_TEN("10") FUSED_CNA_TEN("11") "%120,%121,%122,%123,%124,%125,%126,%127"
#define FUSED_CNA_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FUSED_CNA_SUMS_16(i) FUSED_CNA_SUMS_4(i), FUSED_CNA_SUMS_4(i + 4), FUSED_CNA_SUMS_4(i + 8), FUSED_CNA_SUMS_4(i + 12)
#define FUSED_CNA_SUMS_32(i) FUSED_CNA_SUMS_16(i), FUSED_CNA_SUMS_16(i + 16)
#define FUSED_CNA_SUMS_64(i) FUSED_CNA_SUMS_32(i), FUSED_CNA_SUMS_32(i + 32)
#define FUSED_CNA_SUMS_96(i) FUSED_CNA_SUMS_64(i), FUSED_CNA_SUMS_32(i + 64)
#define FUSED_CNA_SUMS_128(i) FUSED_CNA_SUMS_64(i), FUSED_CNA_SUMS_64(i + 64)
// clang-format on

// A, B and ADD number the operands after the sums; REST says that both operands are contiguous along the reduction.
#define FUSED_CNA_MULTIPLY_ASYNC(T, TYPES, N, COUNT, A, B, ADD, REST)                                                \
    template <>                                                                                                      \
    __device__ __forceinline__ void multiply_async<T, N>(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {      \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N TYPES \
                     " {" FUSED_CNA_NAMES_##COUNT "}, %" A ", %" B ", add, 1, 1" REST ";\n}"                         \
                     : FUSED_CNA_SUMS_##COUNT(0)                                                                     \
                     : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                  \
    }
#define FUSED_CNA_MULTIPLY_ASYNC_OF(N, COUNT, A, B, ADD)                                   \
    FUSED_CNA_MULTIPLY_ASYNC(half, "k16.f32.f16.f16", N, COUNT, A, B, ADD, ", 0, 0")       \
    FUSED_CNA_MULTIPLY_ASYNC(bfloat16, "k16.f32.bf16.bf16", N, COUNT, A, B, ADD, ", 0, 0") \
    FUSED_CNA_MULTIPLY_ASYNC(float, "k8.f32.tf32.tf32", N, COUNT, A, B, ADD, "")
FUSED_CNA_MULTIPLY_ASYNC_OF(32, 16, "16", "17", "18")
FUSED_CNA_MULTIPLY_ASYNC_OF(64, 32, "32", "33", "34")
FUSED_CNA_MULTIPLY_ASYNC_OF(128, 64, "64", "65", "66")
FUSED_CNA_MULTIPLY_ASYNC_OF(192, 96, "96", "97", "98")
FUSED_CNA_MULTIPLY_ASYNC_OF(256, 128, "128", "129", "130")
#undef FUSED_CNA_MULTIPLY_ASYNC_OF
#undef FUSED_CNA_MULTIPLY_ASYNC
#undef FUSED_CNA_SUMS_128
#undef FUSED_CNA_SUMS_96
#undef FUSED_CNA_SUMS_64
#undef FUSED_CNA_SUMS_32
#undef FUSED_CNA_SUMS_16
#undef FUSED_CNA_SUMS_4
#undef FUSED_CNA_NAMES_128
#undef FUSED_CNA_NAMES_96
#undef FUSED_CNA_NAMES_64
#undef FUSED_CNA_NAMES_32
#undef FUSED_CNA_NAMES_16
#undef FUSED_CNA_TEN

}  // namespace fused_cna::device
