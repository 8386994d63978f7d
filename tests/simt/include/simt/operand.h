#pragma once
#include <bit>
#include <cstdint>

namespace simt {

// What tensor cores multiply.
enum class Operand { half, bfloat16, tf32 };

// The values of one 32-bit word, consecutive along k.
template <Operand type>
struct Word;

template <>
struct Word<Operand::half> {
    static constexpr int values = 2;
    static float value(uint32_t word, int i) {
        return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(word >> 16 * i)));
    }
};

template <>
struct Word<Operand::bfloat16> {
    static constexpr int values = 2;
    static float value(uint32_t word, int i) { return std::bit_cast<float>(i == 0 ? word << 16 : word & 0xFFFF0000); }
};

template <>
struct Word<Operand::tf32> {
    static constexpr int values = 1;
    static constexpr uint32_t ignored_bits = 0x1FFF;
    static float value(uint32_t word, int) { return std::bit_cast<float>(word & ~ignored_bits); }
};

}  // namespace simt
