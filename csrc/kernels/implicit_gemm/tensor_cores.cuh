// A warp's arithmetic on tensor cores, for the implicit GEMM: mma.sync on float16, bfloat16 and float32. float32 is rounded
// to tf32 or, compensated, has products as accurate as float32's own.
#pragma once

#include <cstring>

#include <device/device.cuh>

#include "kernels/common/tf32.cuh"
#include "kernels/implicit_gemm/exact_sum.cuh"

namespace fused_cna::implicit_gemm {

// A float32 as a sum of two tf32, each rounded to nearest: the remainder is below 2^-23 of it. Where the big part is not
// finite the small one is meaningless; repair_sums then corrects the result.
struct SplitWord {
    uint32_t big, small;
};

__device__ __forceinline__ SplitWord split_word(uint32_t word) {
    constexpr uint32_t tf32_bits = 0xFFFFE000, half_a_step = 0x1000;
    const uint32_t big = device::round_to_tf32(word) & tf32_bits;
    float value, big_value;
    memcpy(&value, &word, sizeof(value));
    memcpy(&big_value, &big, sizeof(big_value));
    const float rest = value - big_value;
    uint32_t rest_word;
    memcpy(&rest_word, &rest, sizeof(rest_word));
    // Adding half a step is enough to round, because tensor cores ignore the bits below.
    return {big, rest_word + half_a_step};
}

template <int Count>
__device__ __forceinline__ void split_words(const uint32_t (&words)[Count], uint32_t (&big)[Count],
                                            uint32_t (&small)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        const SplitWord split = split_word(words[i]);
        big[i] = split.big;
        small[i] = split.small;
    }
}

template <class Traits, bool compensated>
class TensorCoreMath {
    using T = typename Traits::Value;
    static constexpr int fragments_m = Traits::warp_m / 16, fragments_n = Traits::warp_n / 8;
    static_assert(Traits::warp_m % 16 == 0 && Traits::warp_n % 16 == 0, "a warp makes whole 16 x 16 fragments");
    static_assert(!compensated || sizeof(T) == 4, "only float32 products need compensation");

   public:
    // The lane's addresses for load_matrices in stage 0. Later k steps flip bits of the chunk number by an exclusive or,
    // which commutes with the swizzle; fragments further down share their swizzle, because it repeats every 8 rows.
    __device__ explicit TensorCoreMath(const unsigned char* stages) {
        const uint32_t shared = device::shared_address(stages);
        const int lane = device::lane();
        const int x_row = device::warp() / Traits::warps_n * Traits::warp_m + lane % 16;
        const int weight_row = device::warp() % Traits::warps_n * Traits::warp_n + lane % 8 + lane / 16 * 8;
        x_address_ = shared + x_row * Traits::row_bytes + swizzle<Traits::row_bytes>(x_row, lane / 16) * 16;
        weight_address_ = shared + Traits::weight_start + weight_row * Traits::row_bytes +
                          swizzle<Traits::row_bytes>(weight_row, lane / 8 % 2) * 16;
    }

    __device__ __forceinline__ void read(int buffer, uint32_t stage, int k) {
        Fragments& fragments = fragments_[buffer];
        const uint32_t x = (x_address_ + stage) ^ (k * 32);
        const uint32_t weight = (weight_address_ + stage) ^ (k * 32);
#pragma unroll
        for (int i = 0; i < fragments_m; ++i) device::load_matrices(x + i * 16 * Traits::row_bytes, fragments.x[i]);
#pragma unroll
        for (int j = 0; j < fragments_n; j += 2) {
            uint32_t words[4];
            device::load_matrices(weight + j * 8 * Traits::row_bytes, words);
            fragments.weight[j][0] = words[0];
            fragments.weight[j][1] = words[1];
            fragments.weight[j + 1][0] = words[2];
            fragments.weight[j + 1][1] = words[3];
        }
        if constexpr (sizeof(T) == 4 && !compensated) {
            round_to_tf32(fragments.x);
            round_to_tf32(fragments.weight);
        }
    }

    __device__ __forceinline__ void multiply(int buffer) {
        if constexpr (compensated) {
            multiply_compensated(fragments_[buffer]);
        } else {
#pragma unroll
            for (int i = 0; i < fragments_m; ++i) {
#pragma unroll
                for (int j = 0; j < fragments_n; ++j) {
                    device::multiply_add<T>(total_[i][j], fragments_[buffer].x[i], fragments_[buffer].weight[j]);
                }
            }
        }
    }

    __device__ __forceinline__ void end_chunk() {
#pragma unroll
        for (int i = 0; i < fragments_m; ++i) {
#pragma unroll
            for (int j = 0; j < fragments_n; ++j) add_chunk(total_[i][j], chunk_[i][j]);
        }
    }

    __device__ __forceinline__ void write(int slice, float* rows, int64_t pitch) const {
        const int row = device::lane() / 4, column = device::lane() % 4 * 2;
#pragma unroll
        for (int i = 0; i < fragments_m; ++i) {
            if (i != slice) continue;
#pragma unroll
            for (int j = 0; j < fragments_n; ++j) {
                float* pair = rows + row * pitch + j * 8 + column;
                device::store_pair(pair, total_[i][j][0], total_[i][j][1]);
                device::store_pair(pair + 8 * pitch, total_[i][j][2], total_[i][j][3]);
            }
        }
    }

    template <class RowOfTile>
    static __device__ __forceinline__ void repair(const Args& args, const Block& block, float* sums, int64_t pitch, int rows,
                                                  const RowOfTile& row_of_tile) {
        if constexpr (compensated) {
            device::sync_threads();
            repair_sums<Traits>(args, block, sums, pitch, rows, row_of_tile);
            device::sync_threads();
        }
    }

   private:
    // A warp's operands of one step.
    struct Fragments {
        uint32_t x[fragments_m][4];
        uint32_t weight[fragments_n][2];
    };

    // Three products instead of one: big x big, and big x small both ways. They start from zero, and the CUDA cores add them
    // to the chunk, because tensor cores truncate when they add to a larger sum. Ootomo and Yokota, "Recovering single
    // precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", 2022.
    __device__ __forceinline__ void multiply_compensated(const Fragments& fragments) {
        uint32_t weight_big[fragments_n][2], weight_small[fragments_n][2];
#pragma unroll
        for (int j = 0; j < fragments_n; ++j) split_words(fragments.weight[j], weight_big[j], weight_small[j]);
#pragma unroll
        for (int i = 0; i < fragments_m; ++i) {
            uint32_t x_big[4], x_small[4];
            split_words(fragments.x[i], x_big, x_small);
            // one product of every column fragment in turn, so that none depends on the one before it
            float parts[fragments_n][4] = {};
#pragma unroll
            for (int j = 0; j < fragments_n; ++j) device::multiply_add<T>(parts[j], x_small, weight_big[j]);
#pragma unroll
            for (int j = 0; j < fragments_n; ++j) device::multiply_add<T>(parts[j], x_big, weight_small[j]);
#pragma unroll
            for (int j = 0; j < fragments_n; ++j) device::multiply_add<T>(parts[j], x_big, weight_big[j]);
#pragma unroll
            for (int j = 0; j < fragments_n; ++j) {
#pragma unroll
                for (int l = 0; l < 4; ++l) chunk_[i][j][l] += parts[j][l];
            }
        }
    }

    uint32_t x_address_, weight_address_;
    Fragments fragments_[Traits::reads_ahead ? 2 : 1];
    float total_[fragments_m][fragments_n][4] = {};
    float chunk_[fragments_m][fragments_n][4] = {};  // of compensated products
};

// float16, bfloat16, and float32 rounded to tf32.
struct TensorCores {
    static constexpr int bytes_per_step = 32;  // one MMA
    static constexpr int rows_per_slice = 16;
    static constexpr bool reads_ahead = true;
    template <class Traits>
    using Math = TensorCoreMath<Traits, false>;
};

// float32 as three tf32 products.
struct CompensatedTensorCores {
    static constexpr int bytes_per_step = 32;
    static constexpr int rows_per_slice = 16;
    static constexpr bool reads_ahead = false;
    template <class Traits>
    using Math = TensorCoreMath<Traits, true>;
};

}  // namespace fused_cna::implicit_gemm
