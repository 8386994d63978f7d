// The residual of a thread's coming turns of the epilogue, under way while it finishes this one: consumed as soon as it is
// asked for, it would leave a multiprocessor with too little of it under way to fill device memory's bandwidth.
#pragma once

#include <cstdint>
#include <cstring>

#include <device/ptx.cuh>
#include <device/types.cuh>
#include <device/vector.cuh>

#include "epilogue.cuh"

namespace fused_cna::kernels {

// Depth turns ahead, in shared memory: dense channels on 16-byte boundaries only. A thread reads nothing but what it has
// copied itself, so no barrier is needed.
template <int Width, class T, int Threads, int Depth>
class ResidualQueue {
    static constexpr int per_piece = device::values_per_vector<T>, pieces = Width / per_piece;
    static constexpr int piece_bytes = Threads * 16, turn_bytes = pieces * piece_bytes, bytes = Depth * turn_bytes;
    static_assert(Width % per_piece == 0, "a turn's channels must be whole 16-byte pieces");
    static_assert((bytes & (bytes - 1)) == 0, "places in the queue are counted modulo its size");

   public:
    // [turn modulo Depth][piece][thread] of 16 bytes.
    struct Slots {
        alignas(16) unsigned char bytes[ResidualQueue::bytes];
    };

    __device__ explicit ResidualQueue(const Slots& slots) : slots_(slots.bytes), position_(device::thread_x() * 16) {}

    // Starts the copies of a turn's channels, if there are any to be copied, and goes on to the place of the next turn.
    __device__ __forceinline__ void ask(bool is_vector, const T* source) {
        if (is_vector) {
            const uint32_t slot = device::shared_address(slots_ + position_ % bytes);
#pragma unroll
            for (int i = 0; i < pieces; ++i) device::copy_async<16>(slot + i * piece_bytes, source + i * per_piece, true);
        }
        device::commit_copies();
        position_ += turn_bytes;
    }

    // Waits for the turn that was asked for Depth turns ago, whose place it is.
    __device__ __forceinline__ void wait() const { device::wait_copies<Depth - 1>(); }

    // What was copied for that turn.
    __device__ __forceinline__ void take(float (&values)[Width]) const {
#pragma unroll
        for (int i = 0; i < pieces; ++i) {
            float piece[per_piece];
            device::load_vector(reinterpret_cast<const T*>(slots_ + position_ % bytes + i * piece_bytes), piece);
#pragma unroll
            for (int j = 0; j < per_piece; ++j) values[i * per_piece + j] = piece[j];
        }
    }

   private:
    const unsigned char* slots_;
    uint32_t position_;
};

}  // namespace fused_cna::kernels
