// Reads the MMA fragments of `grouped` from shared memory.
#pragma once

#include <device/device.cuh>

#include "kernels/grouped/operands.cuh"

namespace fused_cna::grouped {

// Byte offset in the halo of the first position that a slot's output pixel reads. Slots without a pixel read position 0.
__device__ __forceinline__ int halo_of_slot(const Args& args, int slot) {
    const SlotPlace place = place_of_slot(args, slot);
    return place.exists ? (place.p * args.stride_h * args.row_positions + place.q) * args.pixel_pitch : 0;
}

// Reads x in 16-byte chunks by ldmatrix. A step is two consecutive entries in the list of all taps' chunks; each lane gives
// the address of one chunk of one pixel.
template <int Fragments>
class ChunkReader {
   public:
    static constexpr int offsets_per_step = 2;

    __device__ ChunkReader(const Args& args, const Memory& memory, int first_slot, int group_byte)
        : offsets_(memory.offsets + device::lane() / 16), next_(*offsets_) {
        const uint32_t halo = device::shared_address(memory.halo) + group_byte;
#pragma unroll
        for (int i = 0; i < Fragments; ++i) {
            pixels_[i] = halo + halo_of_slot(args, first_slot + i * 16 + device::lane() % 16);
        }
    }

    __device__ __forceinline__ void read(uint32_t (&words)[Fragments][4]) {
        const int offset = next_;
        offsets_ += offsets_per_step;
        next_ = *offsets_;
#pragma unroll
        for (int i = 0; i < Fragments; ++i) device::load_matrices(pixels_[i] + offset, words[i]);
    }

   private:
    const int* offsets_;
    int next_;
    uint32_t pixels_[Fragments];
};

// Reads x in 4-byte words, each a register of a fragment and of any tap.
template <int Fragments>
class WordReader {
   public:
    static constexpr int offsets_per_step = 8;

    __device__ WordReader(const Args& args, const Memory& memory, int first_slot, int group_byte)
        : offsets_(memory.offsets + device::lane() % 4), next_{offsets_[0], offsets_[4]}, halo_(memory.halo + group_byte) {
#pragma unroll
        for (int i = 0; i < Fragments * 2; ++i) pixels_[i] = halo_of_slot(args, first_slot + i * 8 + device::lane() / 4);
    }

    __device__ __forceinline__ void read(uint32_t (&words)[Fragments][4]) {
        const int offsets[2] = {next_[0], next_[1]};
        offsets_ += offsets_per_step;
        next_[0] = offsets_[0];
        next_[1] = offsets_[4];
#pragma unroll
        for (int i = 0; i < Fragments * 4; ++i) {
            const unsigned char* word = halo_ + (pixels_[i / 4 * 2 + i % 2] + offsets[i / 2 % 2]);
            words[i / 4][i % 4] = *reinterpret_cast<const uint32_t*>(word);
        }
    }

   private:
    const int* offsets_;
    int next_[2];
    const unsigned char* halo_;
    int pixels_[Fragments * 2];
};

// Zeroes what the last step reads beyond the end of the reduction. It belongs to another tap; an infinity there times the
// weight's zero would be a NaN.
template <int Fragments>
__device__ __forceinline__ void clear_tail(int tail_words, uint32_t (&words)[Fragments][4]) {
    const int word = device::lane() % 4;
#pragma unroll
    for (int i = 0; i < Fragments; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) words[i][j] = word + j / 2 * 4 < tail_words ? words[i][j] : 0;
    }
}

// Reads the weights of a unit's columns, step by step. Columns that do not exist read the last one that does.
template <int Blocks>
class WeightReader {
   public:
    __device__ WeightReader(const Args& args, const Memory& memory, int first_column, int columns) {
        const auto row = [&](int column) {
            const int last = columns - 1;
            return (first_column + (column < last ? column : last)) * args.weight_pitch;
        };
        const uint32_t weights = device::shared_address(memory.weights);
        const int lane = device::lane();
#pragma unroll
        for (int i = 0; i < Blocks / 2; ++i) {
            pairs_[i] = weights + row(i * 16 + lane / 16 * 8 + lane % 8) + lane / 8 % 2 * 16;
        }
        last_ = reinterpret_cast<const uint32_t*>(memory.weights + row((Blocks - 1) * 8 + lane / 4)) + lane % 4;
    }

    __device__ __forceinline__ void read(uint32_t (&words)[Blocks][2]) {
#pragma unroll
        for (int i = 0; i < Blocks / 2; ++i) {
            uint32_t both[4];
            device::load_matrices(pairs_[i], both);
            pairs_[i] += 32;
            words[i * 2][0] = both[0];
            words[i * 2][1] = both[1];
            words[i * 2 + 1][0] = both[2];
            words[i * 2 + 1][1] = both[3];
        }
        if constexpr (Blocks % 2 == 1) {
            words[Blocks - 1][0] = last_[0];
            words[Blocks - 1][1] = last_[4];
            last_ += 8;
        }
    }

   private:
    uint32_t pairs_[Blocks / 2 + 1];
    const uint32_t* last_;  // for the last block, where the number of blocks is odd
};

}  // namespace fused_cna::grouped
