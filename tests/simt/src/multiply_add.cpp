#include <simt/multiply_add.h>

namespace simt {

namespace {

constexpr int m = 16, n = 8, max_k = 16, lane_count = 32;

// Contiguous, so that the compiler vectorises loops over them.
struct Operands {
    alignas(64) float a[m * max_k];  // [m, k]
    alignas(64) float b[max_k * n];  // [k, n]
};

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "Matrix Fragments for mma.m16n8k8", which agree
// in terms of 32-bit words. With group = lane / 4 and member = lane % 4: words 0 and 2 of a are in row `group`, words 1 and
// 3 in row group + 8; words 0 and 1 are word `member` of their row, words 2 and 3 word member + 4. Words 0 and 1 of b are
// words `member` and member + 4 of column `group`.
template <Operand type>
void gather(const Lanes<MultiplyAddSlot<type>>& lanes, Operands& operands) {
    constexpr int per_word = Word<type>::values, k = 8 * per_word;
    for (int lane = 0; lane < lane_count; ++lane) {
        const int group = lane / 4, member = lane % 4;
        const MultiplyAddSlot<type>& slot = lanes[lane];
        for (int word = 0; word < 4; ++word) {
            const int row = group + word % 2 * 8, first = (member + word / 2 * 4) * per_word;
            for (int i = 0; i < per_word; ++i) operands.a[row * k + first + i] = Word<type>::value(slot.a[word], i);
        }
        for (int word = 0; word < 2; ++word) {
            const int first = (member + word * 4) * per_word;
            for (int i = 0; i < per_word; ++i) operands.b[(first + i) * n + group] = Word<type>::value(slot.b[word], i);
        }
    }
}

template <int k>
void multiply(const Operands& operands, double (&sums)[m * n]) {
    alignas(64) double b[k * n];
    for (int i = 0; i < k * n; ++i) b[i] = operands.b[i];
    for (int row = 0; row < m; ++row) {
        double of_row[n] = {};
        for (int i = 0; i < k; ++i) {
            const double a = operands.a[row * k + i];
            for (int column = 0; column < n; ++column) of_row[column] += a * b[i * n + column];
        }
        for (int column = 0; column < n; ++column) sums[row * n + column] = of_row[column];
    }
}

// "Matrix Fragments": accumulators 0 and 1 are neighbours in row `group`, 2 and 3 in row group + 8, from column 2 * member.
template <Operand type>
void add_to_accumulators(const Lanes<MultiplyAddSlot<type>>& lanes, const double (&sums)[m * n]) {
    for (int lane = 0; lane < lane_count; ++lane) {
        const int group = lane / 4, member = lane % 4;
        float* d = lanes[lane].d;
        for (int i = 0; i < 4; ++i) {
            const int row = group + i / 2 * 8, column = member * 2 + i % 2;
            d[i] = static_cast<float>(d[i] + sums[row * n + column]);
        }
    }
}

}  // namespace

template <Operand type>
void multiply_add(const Lanes<MultiplyAddSlot<type>>& lanes) {
    Operands operands;
    alignas(64) double sums[m * n];
    gather(lanes, operands);
    multiply<8 * Word<type>::values>(operands, sums);
    add_to_accumulators(lanes, sums);
}

template void multiply_add(const Lanes<MultiplyAddSlot<Operand::half>>& lanes);
template void multiply_add(const Lanes<MultiplyAddSlot<Operand::bfloat16>>& lanes);
template void multiply_add(const Lanes<MultiplyAddSlot<Operand::tf32>>& lanes);

}  // namespace simt
