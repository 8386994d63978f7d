#pragma once
#include <cstdint>

#include <simt/collective.h>
#include <simt/operand.h>

namespace simt {

// One lane's fragments of a tensor-core product.
template <Operand type>
struct MultiplyAddSlot {
    float* d;           // 4 accumulators
    const uint32_t* a;  // 4 words
    const uint32_t* b;  // 2 words
};

// PTX ISA, "Warp Level Matrix Instructions: mma": d += a * b, m16n8k16 for half and bfloat16, m16n8k8 for tf32, where the
// low 13 bits of words are ignored. Products are exact. They are added in the order of k in double precision, then to the
// accumulator with one rounding to nearest. The manual leaves order, precision and rounding open: real tensor cores align
// the terms to the largest and truncate, so results differ from these in the last bits, except where every partial sum is
// exact.
template <Operand type>
void multiply_add(const Lanes<MultiplyAddSlot<type>>& lanes);

}  // namespace simt
