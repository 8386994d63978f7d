// One hardware feature per function. Blocks and grids are one-dimensional; warp functions need all 32 lanes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include <device/types.cuh>

namespace fused_cna::device {

// Whether this compilation targets 9.0a, which has the features of compute capability 9.0. For any other target a kernel
// that needs them compiles to nothing.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool is_hopper = true;
#else
inline constexpr bool is_hopper = false;
#endif

__device__ __forceinline__ int thread_x() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int64_t block_x() { return blockIdx.x; }
__device__ __forceinline__ int64_t grid_x() { return gridDim.x; }
__device__ __forceinline__ int lane() { return thread_x() % 32; }
__device__ __forceinline__ int warp() { return thread_x() / 32; }

__device__ __forceinline__ void sync_threads() { __syncthreads(); }

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// max.NaN, min.NaN: x clamped to the bounds. A NaN stays a NaN, unlike with fmaxf and fminf; -0 is less than +0.
__device__ __forceinline__ float clamp(float x, float low, float high) {
    float raised, clamped;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(raised) : "f"(x), "f"(low));
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(raised), "f"(high));
    return clamped;
}

// ex2.approx.ftz of x log2(e): e^x, off by 2 ulp and those that the rounded product makes of it, |x| / 2. expf is more
// accurate for large |x| and takes four times the instructions. What is below the normal numbers becomes 0.
__device__ __forceinline__ float exponential(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
    return result;
}

// rcp.approx.ftz: 1 / x, at most 1 ulp off, where division takes four times the instructions and a branch. 0 for what is
// above 2^126.
__device__ __forceinline__ float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// The 32-bit shared-memory address that the instructions below take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// prefetch.global.L2: asks the L2 for the line at a global address, without waiting.
__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}

// griddepcontrol.wait: waits until all earlier kernels on the stream have ended, and sees all that they wrote; returns at
// once where the launch could not start early. Before it, a kernel must not write, nor read what an earlier kernel may have
// written, network parameters included. Every thread that reads or writes must call it, and no thread may exit without: the
// next kernel takes the end of this one for the end of all earlier ones.
__device__ __forceinline__ void await_prerequisites() {
    if constexpr (is_hopper) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// griddepcontrol.launch_dependents: once every block has called it or ended, the next kernel on the stream may start, as far
// as it fits beside this one.
__device__ __forceinline__ void launch_dependents() {
    if constexpr (is_hopper) asm volatile("griddepcontrol.launch_dependents;");
}

// cp.async: copies Bytes to shared memory without waiting; where `valid` is false it reads nothing and writes zeros. Copies
// of 16 bytes bypass the L1; narrower ones cannot.
template <int Bytes>
__device__ __forceinline__ void copy_async(uint32_t destination, const void* source, bool valid) {
    const int source_bytes = valid ? Bytes : 0;
    if constexpr (Bytes == 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
                     "r"(source_bytes)
                     : "memory");
    } else {
        static_assert(Bytes == 4 || Bytes == 8, "cp.async copies 4, 8 or 16 bytes");
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(Bytes),
                     "r"(source_bytes)
                     : "memory");
    }
}

// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most Pending of this thread's groups are in flight.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ldmatrix.x4: four matrices of 8 rows of 16 bytes. Lanes 8i to 8i + 7 give the row addresses of matrix i; lane l receives
// word l % 4 of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t row_address, uint32_t (&words)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row_address)
                 : "memory");
}

// mma.sync: d += a * b on tensor cores. 16 x 8 results; 32 bytes of each row of a and column of b: 16 half or bfloat16
// values, or 8 tf32. Fragment layouts are those of load_matrices.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define FUSED_CNA_MULTIPLY_ADD(T, INSTRUCTION)                                                                          \
    template <>                                                                                                         \
    __device__ __forceinline__ void multiply_add<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {    \
        asm volatile("mma.sync.aligned." INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                               \
    }
FUSED_CNA_MULTIPLY_ADD(half, "m16n8k16.row.col.f32.f16.f16.f32")
FUSED_CNA_MULTIPLY_ADD(bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FUSED_CNA_MULTIPLY_ADD(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FUSED_CNA_MULTIPLY_ADD

// cvt.rna.tf32.f32 on the bits of a float: 10 bits of fraction, ties away from zero. The lower 13 bits are not part of the
// result, and need not be zero.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
}

}  // namespace fused_cna::device
