// A warp's arithmetic on the CUDA cores, for the implicit GEMM: exact float32.
#pragma once

#include <cmath>

#include <device/device.cuh>

#include "kernels/implicit_gemm/operands.cuh"

namespace fused_cna::implicit_gemm {

// The lanes of a warp form 4 rows x 8 columns. A thread computes every fourth row and every eighth column of the warp's
// tile, so that a warp reads neighbouring rows of shared memory, which the swizzle keeps in distinct banks.
template <class Traits>
class CudaCoreMath {
    static constexpr int lanes_m = 4, lanes_n = 8;
    static constexpr int thread_m = Traits::warp_m / lanes_m, thread_n = Traits::warp_n / lanes_n;
    static constexpr int values_per_step = 4;
    static_assert(sizeof(typename Traits::Value) == 4, "the CUDA cores are for float32");
    static_assert(Traits::row_bytes == 64, "the addresses below are made for the swizzle of rows of 64 bytes");
    static_assert(Traits::warp_m % 8 == 0 && Traits::warp_n % 8 == 0, "threads must tile the warp's tile");

   public:
    __device__ explicit CudaCoreMath(const unsigned char* stages) : stages_(stages) {
        const int x_row = device::warp() / Traits::warps_n * Traits::warp_m + device::lane() / lanes_n;
        const int weight_row = device::warp() % Traits::warps_n * Traits::warp_n + device::lane() % lanes_n;
        x_offset_ = x_row * Traits::row_bytes + swizzle<Traits::row_bytes>(x_row, 0) * 16;
        weight_offset_ =
            Traits::weight_start + weight_row * Traits::row_bytes + swizzle<Traits::row_bytes>(weight_row, 0) * 16;
    }

    // Step k differs from step 0 in bits of the chunk number, which an exclusive or flips in the swizzled offset. The
    // swizzle repeats every 8 rows; 4 rows further it differs in one bit.
    __device__ __forceinline__ void read(int, uint32_t stage, int k) {
        constexpr int swizzle_of_row_4 = swizzle<Traits::row_bytes>(4, 0) * 16;
        const uint32_t x = (x_offset_ + stage) ^ (k * 16), weight = (weight_offset_ + stage) ^ (k * 16);
#pragma unroll
        for (int i = 0; i < thread_m; ++i) {
            const uint32_t swizzled = i % 2 == 0 ? x : x ^ swizzle_of_row_4;
            load(swizzled + i * lanes_m * Traits::row_bytes, x_[i]);
        }
#pragma unroll
        for (int j = 0; j < thread_n; ++j) load(weight + j * lanes_n * Traits::row_bytes, weight_[j]);
    }

    __device__ __forceinline__ void multiply(int) {
#pragma unroll
        for (int k = 0; k < values_per_step; ++k) {
#pragma unroll
            for (int i = 0; i < thread_m; ++i) {
#pragma unroll
                for (int j = 0; j < thread_n; ++j) chunk_[i][j] = fmaf(x_[i][k], weight_[j][k], chunk_[i][j]);
            }
        }
    }

    __device__ __forceinline__ void end_chunk() {
#pragma unroll
        for (int i = 0; i < thread_m; ++i) add_chunk(total_[i], chunk_[i]);
    }

    __device__ __forceinline__ void write(int slice, float* rows, int64_t pitch) const {
        const int row = device::lane() / lanes_n, column = device::lane() % lanes_n;
#pragma unroll
        for (int i = 0; i < thread_m; ++i) {
            if (i / 2 != slice) continue;
#pragma unroll
            for (int j = 0; j < thread_n; ++j) rows[(row + i % 2 * lanes_m) * pitch + j * lanes_n + column] = total_[i][j];
        }
    }

    template <class RowOfTile>
    static __device__ __forceinline__ void repair(const Args&, const Block&, float*, int64_t, int, const RowOfTile&) {}

   private:
    __device__ __forceinline__ void load(uint32_t offset, float (&values)[values_per_step]) const {
        device::load_vector(reinterpret_cast<const float*>(stages_ + offset), values);
    }

    const unsigned char* stages_;
    uint32_t x_offset_, weight_offset_;
    float x_[thread_m][values_per_step], weight_[thread_n][values_per_step];
    float chunk_[thread_m][thread_n] = {}, total_[thread_m][thread_n] = {};
};

struct CudaCores {
    static constexpr int bytes_per_step = 16;  // one load from every row
    static constexpr int rows_per_slice = 8;
    static constexpr bool reads_ahead = false;
    template <class Traits>
    using Math = CudaCoreMath<Traits>;
};

}  // namespace fused_cna::implicit_gemm
