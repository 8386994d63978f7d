// Loads and stores of several values in 16-byte pieces, converted to and from float. Portable.
#pragma once

#include <cstdint>
#include <cstring>

#include <device/types.cuh>

namespace fused_cna::device {

// 16 bytes of memory, moved by one load or store instruction.
struct alignas(16) Vector16 {
    uint32_t words[4];
};

template <class T>
inline constexpr int values_per_vector = 16 / sizeof(T);

__device__ __forceinline__ bool is_aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

struct alignas(8) FloatPair {
    float first, second;
};

// One 8-byte store; the address must be a multiple of 8.
__device__ __forceinline__ void store_pair(float* destination, float first, float second) {
    *reinterpret_cast<FloatPair*>(destination) = {first, second};
}

// Reads 16 bytes in pieces of Bytes, to which memory must be aligned. Only pieces that hold one of the first `valid` values
// are read; the others are zeros.
template <int Bytes, class T>
__device__ __forceinline__ Vector16 load_pieces(const T* source, int valid) {
    struct alignas(Bytes) Piece {
        uint32_t words[Bytes / 4];
    };
    Vector16 whole{};
#pragma unroll
    for (int i = 0; i < 16 / Bytes; ++i) {
        constexpr int per_piece = Bytes / static_cast<int>(sizeof(T));
        if (i * per_piece >= valid) continue;
        const Piece piece = reinterpret_cast<const Piece*>(source)[i];
#pragma unroll
        for (int j = 0; j < Bytes / 4; ++j) whole.words[i * Bytes / 4 + j] = piece.words[j];
    }
    return whole;
}

template <class T>
__device__ __forceinline__ void convert_vector(const Vector16& whole, float (&values)[values_per_vector<T>]) {
    T parts[values_per_vector<T>];
    memcpy(parts, &whole, sizeof(whole));
#pragma unroll
    for (int i = 0; i < values_per_vector<T>; ++i) values[i] = to_float(parts[i]);
}

// Reads Count values from 16-byte aligned memory.
template <int Count, class T>
__device__ __forceinline__ void load_vector(const T* source, float (&values)[Count]) {
    constexpr int per_vector = values_per_vector<T>;
    static_assert(Count % per_vector == 0, "a vector access moves whole 16-byte pieces");
#pragma unroll
    for (int i = 0; i < Count; i += per_vector) {
        const Vector16 piece = *reinterpret_cast<const Vector16*>(source + i);
        T parts[per_vector];
        memcpy(parts, &piece, sizeof(piece));
#pragma unroll
        for (int j = 0; j < per_vector; ++j) values[i + j] = to_float(parts[j]);
    }
}

// Values in their storage type: two 16-bit values share a register, and a load does not wait for a conversion.
template <int Count, class T>
struct Packed {
    static constexpr int per_vector = values_per_vector<T>;
    uint32_t words[(Count * sizeof(T) + 3) / 4];

    __device__ __forceinline__ float value(int i) const {
        T value;
        memcpy(&value, reinterpret_cast<const unsigned char*>(words) + i * sizeof(T), sizeof(T));
        return to_float(value);
    }

    // The i-th 16 bytes. By value and word by word: the compiler turns a memcpy through memory into single-byte accesses.
    __device__ __forceinline__ void set_vector(int i, Vector16 vector) {
#pragma unroll
        for (int j = 0; j < 4; ++j) words[i * 4 + j] = vector.words[j];
    }
    __device__ __forceinline__ Vector16 vector(int i) const {
        return {words[i * 4], words[i * 4 + 1], words[i * 4 + 2], words[i * 4 + 3]};
    }

    // To 16-byte aligned memory.
    __device__ __forceinline__ void store(T* destination) const {
        static_assert(Count % per_vector == 0, "a vector access moves whole 16-byte pieces");
#pragma unroll
        for (int i = 0; i < Count / per_vector; ++i) reinterpret_cast<Vector16*>(destination)[i] = vector(i);
    }
};

// Rounds each value once.
template <int Count, class T>
__device__ __forceinline__ Packed<Count, T> round_values(const float* values) {
    Packed<Count, T> rounded;
    T parts[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i) parts[i] = from_float<T>(values[i]);
    memcpy(rounded.words, parts, sizeof(parts));
    return rounded;
}

// Rounds Count values and writes them to 16-byte aligned memory.
template <int Count, class T>
__device__ __forceinline__ void store_vector(T* destination, const float (&values)[Count]) {
    round_values<Count, T>(values).store(destination);
}

}  // namespace fused_cna::device
