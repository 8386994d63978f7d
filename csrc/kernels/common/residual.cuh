// Copies the residual of a thread's next epilogue turns while it finishes the current one. With a load and its use in the
// same turn, a multiprocessor would have too few bytes in flight to fill the device memory's bandwidth.
#pragma once

#include <cstdint>

#include <device/device.cuh>

namespace fused_cna {

// A queue of Depth turns in shared memory. A turn holds Width dense channels, 16-byte aligned, of each of Rows pixels. A
// thread reads only what it has copied itself, so no barrier is needed.
template <int Rows, int Width, class T, int Threads, int Depth>
class ResidualQueue {
    static constexpr int per_piece = device::values_per_vector<T>, row_pieces = Width / per_piece;
    static constexpr int piece_bytes = Threads * 16, row_bytes = row_pieces * piece_bytes, turn_bytes = Rows * row_bytes;
    static constexpr int bytes = Depth * turn_bytes;
    static_assert(Width % per_piece == 0, "a pixel's channels must be whole 16-byte pieces");
    static_assert((bytes & (bytes - 1)) == 0, "places in the queue are counted modulo its size");

   public:
    // [turn modulo Depth][row][piece][thread] of 16 bytes.
    struct Slots {
        alignas(16) unsigned char bytes[ResidualQueue::bytes];
    };

    __device__ explicit ResidualQueue(const Slots& slots) : slots_(slots.bytes), position_(device::thread_x() * 16) {}

    // Starts the copy of one row of the next turn.
    __device__ __forceinline__ void ask(int row, const T* source) const {
        const uint32_t slot = device::shared_address(slots_ + position_ % bytes) + row * row_bytes;
#pragma unroll
        for (int i = 0; i < row_pieces; ++i) device::copy_async<16>(slot + i * piece_bytes, source + i * per_piece, true);
    }

    // All copies of the next turn have been started. Its slot is that of the turn Depth turns ago.
    __device__ __forceinline__ void end_turn() { position_ += turn_bytes; }

    // Waits for the turn started Depth turns ago and reads it; rows that were not copied have any value. Each turn is one
    // group of copies, except turns that the caller has waited for already.
    __device__ __forceinline__ void take(device::Packed<Rows * Width, T>& values) const {
        device::wait_copies<Depth - 1>();
#pragma unroll
        for (int i = 0; i < Rows * row_pieces; ++i) {
            const auto* slot = slots_ + position_ % bytes + i * piece_bytes;
            values.set_vector(i, *reinterpret_cast<const device::Vector16*>(slot));
        }
    }

   private:
    const unsigned char* slots_;
    uint32_t position_;
};

}  // namespace fused_cna
