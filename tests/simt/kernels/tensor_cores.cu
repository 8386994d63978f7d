// ldmatrix, mma.sync and tf32: correct uses, and every wrong use (tests/test_simt_tensor_cores.py).
#include <device/launch.cuh>
#include <device/ptx.cuh>
#include <device/types.cuh>

#include <bit>

#include "test_kernel.h"

namespace simt_tests {

using namespace fused_cna::device;

// Not in an unnamed namespace, so that reports can name the kernels.
namespace tensor_cores {

using Kernel = void (*)(const float* input, float* output);

constexpr int rows = 32, row_words = 8, row_bytes = row_words * 4;

struct Storage {
    alignas(128) uint32_t words[rows * row_words];
};

template <Kernel kernel>
const char* run(const Buffers& b) {
    return launch<kernel>({1, 32, sizeof(Storage)}, {}, b.input, b.output);
}

// Each word of shared memory holds its own index. Lane l reads the 16 bytes that the input says; output: its four words.
__global__ void load(const float* input, float* output) {
    auto& words = shared_storage<Storage>().words;
    for (int i = 0; i < row_words; ++i) words[i * 32 + lane()] = i * 32 + lane();
    sync_threads();
    uint32_t loaded[4];
    load_matrices(shared_address(words) + static_cast<uint32_t>(input[lane()]), loaded);
    for (int i = 0; i < 4; ++i) output[lane() * 4 + i] = static_cast<float>(loaded[i]);
}
const TestKernel use_load("load_matrices", run<load>);

// The input holds raw words, by lane: a[4], b[2], d[4].
template <class T>
__global__ void multiply(const float* input, float* output) {
    const float* mine = input + lane() * 10;
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = std::bit_cast<uint32_t>(mine[i]);
    for (int i = 0; i < 2; ++i) b[i] = std::bit_cast<uint32_t>(mine[4 + i]);
    for (int i = 0; i < 4; ++i) d[i] = mine[6 + i];
    multiply_add<T>(d, a, b);
    for (int i = 0; i < 4; ++i) output[lane() * 4 + i] = d[i];
}
const TestKernel use_multiply_half("multiply_add_half", run<multiply<half>>);
const TestKernel use_multiply_bfloat16("multiply_add_bfloat16", run<multiply<bfloat16>>);
const TestKernel use_multiply_tf32("multiply_add_tf32", run<multiply<float>>);

// Input: a [16, 8], then b [8, 8] by columns, tf32. Output: a * b, [16, 8]. Both go through shared memory, whose 16-byte
// chunks are swizzled by the given functions, and through load_matrices.
template <int (*write_swizzle)(int row), int (*read_swizzle)(int row), bool Round>
__global__ void product(const float* input, float* output) {
    auto& words = shared_storage<Storage>().words;
    const uint32_t shared = shared_address(words);
    for (int i = lane(); i < 24 * 2; i += 32) {
        const int row = i / 2, chunk = i % 2;
        copy_async<16>(shared + row * row_bytes + (chunk ^ write_swizzle(row)) * 16, input + i * 4, true);
    }
    commit_copies();
    wait_copies<0>();
    sync_threads();
    const auto address = [&](int row, int chunk) { return shared + row * row_bytes + (chunk ^ read_swizzle(row)) * 16; };
    uint32_t a[4], b[4];
    load_matrices(address(lane() % 16, lane() / 16), a);
    load_matrices(address(16 + lane() % 8, lane() / 8 % 2), b);
    if (Round) {
        for (uint32_t& word : a) word = round_to_tf32(word);
        for (uint32_t& word : b) word = round_to_tf32(word);
    }
    float d[4] = {};
    const uint32_t of_b[2] = {b[0], b[1]};
    multiply_add<float>(d, a, of_b);
    for (int i = 0; i < 4; ++i) output[(lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2] = d[i];
}
int by_quad(int row) { return row / 4 % 2; }
int by_row(int row) { return row % 2; }
const TestKernel use_product("product", run<product<by_quad, by_quad, true>>);
const TestKernel use_mismatched_swizzle("mismatched_swizzle", run<product<by_quad, by_row, true>>);
const TestKernel use_unrounded_product("unrounded_product", run<product<by_quad, by_quad, false>>);

template <uint32_t kept>
__global__ void round_all(const float* input, float* output, int64_t count) {
    for (int64_t i = thread_x(); i < count; i += 32) {
        output[i] = std::bit_cast<float>(round_to_tf32(std::bit_cast<uint32_t>(input[i])) & kept);
    }
}
template <uint32_t kept>
const char* run_round_all(const Buffers& b) {
    return launch<round_all<kept>>({1, 32, 0}, {}, b.input, b.output, b.inputs);
}
const TestKernel use_round_all("round_to_tf32", run_round_all<0xFFFFE000>);
const TestKernel use_round_unmasked("round_to_tf32_unmasked", run_round_all<0xFFFFFFFF>);

__global__ void misaligned_row(const float*, float*) {
    uint32_t words[4];
    load_matrices(shared_address(shared_storage<Storage>().words) + lane() * 16 + (lane() == 9 ? 8 : 0), words);
}
const TestKernel use_misaligned_row("misaligned_row", run<misaligned_row>);

__global__ void row_outside(const float*, float*) {
    uint32_t words[4];
    load_matrices(shared_address(shared_storage<Storage>().words) + (lane() + 33) * 16, words);
}
const TestKernel use_row_outside("row_outside", run<row_outside>);

__global__ void row_before(const float*, float*) {
    uint32_t words[4];
    load_matrices(shared_address(shared_storage<Storage>().words) + lane() * 16 - 16, words);
}
const TestKernel use_row_before("row_before", run<row_before>);

__global__ void missing_lane(const float*, float*) {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (lane() != 3) multiply_add<half>(d, a, b);
}
const TestKernel use_missing_lane("missing_lane", run<missing_lane>);

__global__ void two_types(const float*, float*) {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (lane() < 16) {
        multiply_add<half>(d, a, b);
    } else {
        multiply_add<bfloat16>(d, a, b);
    }
}
const TestKernel use_two_types("two_types", run<two_types>);

}  // namespace tensor_cores

}  // namespace simt_tests
