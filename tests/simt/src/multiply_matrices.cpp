// The arithmetic of wgmma.
#include <cstring>

#include <simt/warpgroup.h>

namespace simt {

namespace {

constexpr int rows = 64, most_columns = 256, most_k = 16, words_per_row = SharedMatrix::bytes_per_row / 4;

// Columns summed at a time, in vector registers; the compiler does not vectorise this by itself.
constexpr int width = 8;
using Columns = double __attribute__((vector_size(width * sizeof(double))));

// Contiguous, so that the compiler vectorises loops over them. Too large for a fiber's stack.
struct Operands {
    alignas(64) double a[rows * most_k];          // [64, k]
    alignas(64) double b[most_columns * most_k];  // [n / width, k, width]
};
Operands operands;

template <Operand type, class Place>
void gather(const SharedMatrix& matrix, const AsyncProxy& proxy, Place&& place) {
    constexpr int per_word = Word<type>::values;
    for (int row = 0; row < matrix.rows(); ++row) {
        uint32_t words[words_per_row];
        matrix.read_row(row, proxy, reinterpret_cast<std::byte*>(words));
        for (int word = 0; word < words_per_row; ++word) {
            for (int i = 0; i < per_word; ++i) place(row, word * per_word + i) = Word<type>::value(words[word], i);
        }
    }
}

template <int k>
void multiply(int n, bool add, float* d) {
    for (int first = 0; first < n; first += width) {
        for (int row = 0; row < rows; ++row) {
            Columns sums{};
            for (int i = 0; i < k; ++i) {
                Columns b;
                std::memcpy(&b, operands.b + first * k + i * width, sizeof(b));
                sums += operands.a[row * k + i] * b;
            }
            float* results = d + row * n + first;
            for (int column = 0; column < width; ++column)
                results[column] = static_cast<float>((add ? results[column] : 0.0) + sums[column]);
        }
    }
}

template <Operand type>
void run(const SharedMatrix& a, const SharedMatrix& b, const AsyncProxy& proxy, bool add, float* d) {
    constexpr int k = words_per_row * Word<type>::values;
    gather<type>(a, proxy, [](int row, int i) -> double& { return operands.a[row * k + i]; });
    gather<type>(b, proxy,
                 [](int column, int i) -> double& { return operands.b[(column / width * k + i) * width + column % width]; });
    multiply<k>(b.rows(), add, d);
}

}  // namespace

void multiply_matrices(Operand type, const SharedMatrix& a, const SharedMatrix& b, const AsyncProxy& proxy, bool add,
                       float* d) {
    switch (type) {
        case Operand::half: return run<Operand::half>(a, b, proxy, add, d);
        case Operand::bfloat16: return run<Operand::bfloat16>(a, b, proxy, add, d);
        case Operand::tf32: return run<Operand::tf32>(a, b, proxy, add, d);
    }
}

}  // namespace simt
