// wgmma: correct uses, and every wrong use (tests/test_simt_warpgroup.py).
#include <device/hopper.cuh>
#include <device/launch.cuh>
#include <device/warpgroup.cuh>

#include "test_kernel.h"

namespace simt_tests {

using namespace fused_cna::device;

// Not in an unnamed namespace, so that reports can name the kernels.
namespace warpgroups {

constexpr int threads = 128, rows = 64, row_bytes = 128, row_words = row_bytes / 4;

template <int N>
struct Storage {
    alignas(1024) float a[rows * row_words];
    alignas(1024) float b[N * row_words];
};

using Kernel = void (*)(const float* input, float* output);

template <Kernel kernel, int N>
const char* run(const Buffers& b) {
    return launch<kernel>({1, threads, sizeof(Storage<N>)}, {}, b.input, b.output);
}

// One of `threads` threads copies its part of the input, which is swizzled already.
__device__ void fill(float* destination, const float* input, int floats, int thread = thread_x()) {
    const uint32_t first = shared_address(destination);
    for (int i = thread * 4; i < floats; i += threads * 4) {
        Vector16 v;
        memcpy(&v, input + i, sizeof(v));
        store_shared(first + i * 4, v);
    }
}

template <int N>
__device__ Storage<N>& fill_operands(const float* input, bool fence = true) {
    Storage<N>& shared = shared_storage<Storage<N>>();
    fill(shared.a, input, rows * row_words);
    fill(shared.b, input + rows * row_words, N * row_words);
    if (fence) fence_async_proxy();
    sync_threads();
    return shared;
}

// d += a * b over whole rows of 128 bytes: four steps along them.
template <class T, int N>
__device__ void multiply_rows(float (&d)[N / 2], const float* a, const float* b, bool add = true) {
    const uint64_t first_a = matrix_descriptor(shared_address(a)), first_b = matrix_descriptor(shared_address(b));
    for (int i = 0; i < 4; ++i) multiply_async<T, N>(d, first_a + 2 * i, first_b + 2 * i, add || i > 0);
}

// Input: a, b, and each thread's accumulators. Output: each thread's accumulators.
template <class T, int N, bool Add = true, bool Fence = true>
__global__ void multiply(const float* input, float* output) {
    const Storage<N>& shared = fill_operands<N>(input, Fence);
    const float* start = input + (rows + N) * row_words + thread_x() * (N / 2);
    float d[N / 2];
    for (int i = 0; i < N / 2; ++i) d[i] = start[i];
    fence_products();
    multiply_rows<T, N>(d, shared.a, shared.b, Add);
    commit_products();
    wait_products<0>();
    for (int i = 0; i < N / 2; ++i) output[thread_x() * (N / 2) + i] = d[i];
}
const TestKernel use_half_32("wgmma_half_32", run<multiply<half, 32>, 32>);
const TestKernel use_half_64("wgmma_half_64", run<multiply<half, 64>, 64>);
const TestKernel use_half_256("wgmma_half_256", run<multiply<half, 256>, 256>);
const TestKernel use_bfloat16_32("wgmma_bfloat16_32", run<multiply<bfloat16, 32>, 32>);
const TestKernel use_bfloat16_256("wgmma_bfloat16_256", run<multiply<bfloat16, 256>, 256>);
const TestKernel use_tf32_32("wgmma_tf32_32", run<multiply<float, 32>, 32>);
const TestKernel use_tf32_256("wgmma_tf32_256", run<multiply<float, 256>, 256>);
const TestKernel use_overwrite("wgmma_overwrite", run<multiply<half, 32, false>, 32>);
const TestKernel use_missing_async_fence("missing_async_fence", run<multiply<half, 32, true, false>, 32>);

// The first element of every thread's sums: a NaN while a product on it is in flight.
template <int Count>
__device__ void note(float* output, int row, const float (&d)[Count]) {
    output[row * threads + thread_x()] = d[0];
}

// Two arrays of sums, one group of products each, then a second group on the first array. Output: both after each wait.
__global__ void groups(const float* input, float* output) {
    const Storage<32>& shared = fill_operands<32>(input);
    float d[2][16] = {};
    fence_products();
    for (int i : {0, 1, 0}) {
        multiply_rows<half, 32>(d[i], shared.a, shared.b);
        commit_products();
    }
    int row = 0;
    const auto note_both = [&] {
        for (auto& sums : d) note(output, row++, sums);
    };
    note_both();
    wait_products<2>();
    note_both();
    wait_products<1>();
    note_both();
    wait_products<0>();
    note_both();
    // again on sums that no thread has touched: needs no fence
    multiply_rows<half, 32>(d[1], shared.a, shared.b);
    commit_products();
    wait_products<0>();
    note_both();
}
const TestKernel use_groups("wgmma_groups", run<groups, 32>);

// One warpgroup fills two stages in turn; two others multiply them, 32 columns each, one product behind. Early: a stage is
// released as soon as its products have started. Fences: the writer fences for the async proxy.
constexpr int stages = 2, tiles = 5;

struct Pipeline {
    alignas(1024) float a[stages][rows * row_words];
    alignas(1024) float b[stages][2][32 * row_words];
    PhaseBarrier full[stages], empty[stages];
};

template <bool Early, bool Fences, int FullParity>
__global__ void pipeline(const float* input, float* output) {
    constexpr int per_tile = (rows + 2 * 32) * row_words;
    Pipeline& shared = shared_storage<Pipeline>();
    if (thread_x() == 0) {
        for (int i = 0; i < stages; ++i) {
            init_barrier(shared.full[i], threads);
            init_barrier(shared.empty[i], 2);
        }
        publish_barriers();
    }
    sync_threads();
    const int group = thread_x() / threads, thread = thread_x() % threads;
    if (group == 2) {
        give_registers<24>();
        for (int tile = 0; tile < tiles; ++tile) {
            const int stage = tile % stages;
            wait(shared.empty[stage], tile / stages % 2 ^ 1);
            fill(shared.a[stage], input + tile * per_tile, rows * row_words, thread);
            fill(shared.b[stage][0], input + tile * per_tile + rows * row_words, 2 * 32 * row_words, thread);
            if (Fences) fence_async_proxy();
            arrive(shared.full[stage]);
        }
        return;
    }
    take_registers<232>();
    float d[16];
    for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % stages;
        wait(shared.full[stage], tile / stages % 2 ^ FullParity);
        fence_products();
        multiply_rows<half, 32>(d, shared.a[stage], shared.b[stage][group], tile > 0);
        commit_products();
        if (!Early) {
            wait_products<1>();
            if (tile > 0 && thread == 0) arrive(shared.empty[(tile + 1) % stages]);
        } else if (thread == 0) {
            arrive(shared.empty[stage]);
        }
    }
    wait_products<0>();
    for (int i = 0; i < 16; ++i) output[thread_x() * 16 + i] = d[i];
}
template <bool Early, bool Fences = true, int FullParity = 0>
const char* run_pipeline(const Buffers& b) {
    return launch<pipeline<Early, Fences, FullParity>>({1, 3 * threads, sizeof(Pipeline)}, {}, b.input, b.output);
}
const TestKernel use_pipeline("wgmma_pipeline", run_pipeline<false>);
const TestKernel use_early_release("early_release", run_pipeline<true>);
const TestKernel use_missing_stage_fence("missing_stage_fence", run_pipeline<false, false>);
const TestKernel use_wrong_stage_parity("wrong_stage_parity", run_pipeline<false, true, 1>);

// What a faulty kernel does between the first product on d and its end; a and b are descriptors of zeros.
using Fault = void (*)(float (&d)[16], uint64_t a, uint64_t b, float* output);

template <Fault fault, bool Fence = true>
__global__ void faulty(const float*, float* output) {
    const float zeros[(rows + 32) * row_words] = {};
    const Storage<32>& shared = fill_operands<32>(zeros);
    float d[16] = {};
    if (Fence) fence_products();
    fault(d, matrix_descriptor(shared_address(shared.a)), matrix_descriptor(shared_address(shared.b)), output);
}

__device__ void start(float (&d)[16], uint64_t a, uint64_t b) {
    multiply_async<half, 32>(d, a, b, true);
    commit_products();
}

__device__ void finish(float (&d)[16], uint64_t a, uint64_t b) {
    start(d, a, b);
    wait_products<0>();
}
const TestKernel use_first_fence("missing_first_fence",
                                 run<faulty<[](auto& d, auto a, auto b, auto) { finish(d, a, b); }, false>, 32>);

const TestKernel use_read_before_wait("read_before_wait", run<faulty<[](auto& d, auto a, auto b, auto output) {
                                                                  start(d, a, b);
                                                                  note(output, 0, d);
                                                                  wait_products<0>();
                                                                  note(output, 1, d);
                                                              }>,
                                                              32>);

const TestKernel use_one_group_too_many("one_group_too_many", run<faulty<[](auto& d, auto a, auto b, auto output) {
                                                                      start(d, a, b);
                                                                      wait_products<1>();
                                                                      note(output, 0, d);
                                                                      wait_products<0>();
                                                                      note(output, 1, d);
                                                                  }>,
                                                                  32>);

const TestKernel use_written_before_wait("written_before_wait", run<faulty<[](auto& d, auto a, auto b, auto) {
                                                                        start(d, a, b);
                                                                        if (thread_x() == 5) d[3] = 0;
                                                                        wait_products<0>();
                                                                    }>,
                                                                    32>);

const TestKernel use_written_without_fence("written_without_fence", run<faulty<[](auto& d, auto a, auto b, auto) {
                                                                            finish(d, a, b);
                                                                            d[3] = 1;
                                                                            finish(d, a, b);
                                                                        }>,
                                                                        32>);

const TestKernel use_restarted_without_fence("restarted_without_fence", run<faulty<[](auto& d, auto a, auto b, auto) {
                                                                                finish(d, a, b);
                                                                                multiply_async<half, 32>(d, a, b, false);
                                                                            }>,
                                                                            32>);

const TestKernel use_never_waited_product("never_waited_product",
                                          run<faulty<[](auto& d, auto a, auto b, auto) { start(d, a, b); }>, 32>);

const TestKernel use_never_committed("never_committed", run<faulty<[](auto& d, auto a, auto b, auto) {
                                                                multiply_async<half, 32>(d, a, b, true);
                                                                wait_products<0>();
                                                            }>,
                                                            32>);

const TestKernel use_swizzle_64("swizzle_64",
                                run<faulty<[](auto& d, auto a, auto b, auto) { finish(d, a ^ uint64_t{3} << 62, b); }>, 32>);
const TestKernel use_dense_stride(
    "dense_stride", run<faulty<[](auto& d, auto a, auto b, auto) { finish(d, a, b - (uint64_t{32} << 32)); }>, 32>);
const TestKernel use_second_row("second_row", run<faulty<[](auto& d, auto a, auto b, auto) { finish(d, a + 8, b); }>, 32>);
const TestKernel use_past_the_row("past_the_row",
                                  run<faulty<[](auto& d, auto a, auto b, auto) { finish(d, a + 7, b); }>, 32>);
const TestKernel use_base_offset(
    "base_offset", run<faulty<[](auto& d, auto a, auto b, auto) { finish(d, a | uint64_t{1} << 49, b); }>, 32>);
const TestKernel use_matrix_outside("matrix_outside",
                                    run<faulty<[](auto& d, auto a, auto b, auto) { finish(d, a, b + 64); }>, 32>);
const TestKernel use_unused_bits("unused_bits",
                                 run<faulty<[](auto& d, auto a, auto b, auto) { finish(d, a + (1 << 14), b); }>, 32>);

const TestKernel use_two_descriptors(
    "two_descriptors", run<faulty<[](auto& d, auto a, auto b, auto) { finish(d, warp() == 2 ? a + 2 : a, b); }>, 32>);

const TestKernel use_warp_missing("warp_missing", run<faulty<[](auto& d, auto a, auto b, auto) {
                                                          if (warp() != 2) start(d, a, b);
                                                      }>,
                                                      32>);

const TestKernel use_warp_elsewhere("warp_elsewhere", run<faulty<[](auto& d, auto a, auto b, auto) {
                                                              if (warp() != 2) {
                                                                  start(d, a, b);
                                                              } else {
                                                                  commit_products();
                                                              }
                                                          }>,
                                                          32>);

const TestKernel use_two_shapes("two_shapes", run<faulty<[](auto& d, auto a, auto b, auto) {
                                                      start(d, a, b);
                                                      float (&wider)[32] = reinterpret_cast<float (&)[32]>(d);
                                                      multiply_async<half, 64>(wider, a, b - 256, true);
                                                  }>,
                                                  64>);

// Measures products of the widest shape; the input says how many.
__global__ void many_products(const float* input, float* output) {
    const Storage<256>& shared = fill_operands<256>(input + 1);
    float d[128] = {};
    fence_products();
    for (int i = 0; i < static_cast<int>(input[0]); ++i)
        multiply_async<half, 256>(d, matrix_descriptor(shared_address(shared.a)),
                                  matrix_descriptor(shared_address(shared.b)), true);
    commit_products();
    wait_products<0>();
    note(output, 0, d);
}
const TestKernel use_many_products("many_products", run<many_products, 256>);

}  // namespace warpgroups

}  // namespace simt_tests
