// Correct uses of every feature, with known results (tests/test_simt.py).
#include <device/hopper.cuh>
#include <device/launch.cuh>
#include <device/ptx.cuh>
#include <device/types.cuh>

#include "test_kernel.h"

namespace simt_tests {

using namespace fused_cna::device;

namespace {

// One row of five numbers per thread.
__global__ void coordinates(float* output) {
    float* row = output + (block_x() * 64 + thread_x()) * 5;
    row[0] = static_cast<float>(thread_x());
    row[1] = static_cast<float>(lane());
    row[2] = static_cast<float>(warp());
    row[3] = static_cast<float>(block_x());
    row[4] = static_cast<float>(grid_x());
}

const TestKernel use_coordinates("coordinates", [](const Buffers& b) {
    return launch<coordinates>({b.outputs / (64 * 5), 64, 0}, {}, b.output);
});

template <int Threads>
struct Sums {
    float by_warp[Threads / 32];
};

// The sum of each block's 128 inputs, by shuffles and shared memory.
template <int Threads>
__global__ void __launch_bounds__(Threads) block_sum(const float* __restrict__ input, float* __restrict__ output) {
    auto& sums = shared_storage<Sums<Threads>>();
    float sum = input[block_x() * Threads + thread_x()];
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane() == 0) sums.by_warp[warp()] = sum;
    sync_threads();
    if (thread_x() == 0) {
        float total = 0;
        for (float s : sums.by_warp) total += s;
        output[block_x()] = total;
    }
}

const TestKernel use_block_sum("block_sum", [](const Buffers& b) {
    return launch<block_sum<128>>({b.outputs, 128, sizeof(Sums<128>)}, {}, b.input, b.output);
});

// One row of 32 per call; results are lane numbers (100 is added for the 8-byte type).
__global__ void shuffles(float* output) {
    float mine = static_cast<float>(lane());
    float rows[] = {
        shuffle_xor(mine, 1),
        shuffle_xor(mine, 31),
        shuffle_down(mine, 4),
        shuffle_down(mine, 0),
        shuffle(mine, 7),
        shuffle(mine, 33),
        shuffle(mine, 31 - lane()),
        static_cast<float>(shuffle_xor(static_cast<int64_t>(lane()) + 100, 2)),
        to_float(shuffle_down(from_float<half>(mine), lane() % 2)),
    };
    for (int i = 0; i < 9; ++i) output[i * 32 + lane()] = rows[i];
}

const TestKernel use_shuffles("shuffles", [](const Buffers& b) { return launch<shuffles>({1, 32, 0}, {}, b.output); });

// Two warps vote on different questions.
__global__ void votes(float* output) {
    uint32_t multiples = ballot(lane() % (3 + warp()) == 0);
    output[thread_x()] = static_cast<float>(multiples >> lane() & 1);
    output[64 + thread_x()] = static_cast<float>(ballot(warp() == 1) & 0xFFFF);
}

const TestKernel use_votes("votes", [](const Buffers& b) { return launch<votes>({1, 64, 0}, {}, b.output); });

// Two halves of the block rotate their inputs, each at its own pace with its own barrier.
__global__ void rotate_halves(const float* input, float* output) {
    auto& values = shared_storage<float[128]>();
    int half_block = thread_x() / 64, first = half_block * 64, rounds = half_block == 0 ? 3 : 5;
    values[thread_x()] = input[thread_x()];
    for (int i = 0; i < rounds; ++i) {
        named_barrier(1 + half_block, 64);
        float next = values[first + (thread_x() + 1) % 64];
        named_barrier(1 + half_block, 64);
        values[thread_x()] = next;
    }
    output[thread_x()] = values[thread_x()];
}

const TestKernel use_rotate_halves("rotate_halves", [](const Buffers& b) {
    return launch<rotate_halves>({1, 128, sizeof(float[128])}, {}, b.input, b.output);
});

// The last warp and one more thread exit before the barrier at which the others wait.
__global__ void early_exit(float* output) {
    auto& arrived = shared_storage<float[128]>();
    if (thread_x() >= 96 || thread_x() == 40) return;
    arrived[thread_x()] = 1;
    sync_threads();
    float sum = 0;
    for (int i = 0; i < 96; ++i) sum += i == 40 ? 0 : arrived[i];
    output[thread_x()] = sum;
}

const TestKernel use_early_exit("early_exit", [](const Buffers& b) {
    return launch<early_exit>({1, 128, sizeof(float[128])}, {}, b.output);
});

// Each block outputs what it found in its shared memory, then writes to it.
__global__ void fresh_shared_memory(float* output) {
    auto& values = shared_storage<float[64]>();
    output[block_x() * 64 + thread_x()] = values[thread_x()];
    values[thread_x()] = 5;
}

const TestKernel use_fresh_shared_memory("fresh_shared_memory", [](const Buffers& b) {
    return launch<fresh_shared_memory>({b.outputs / 64, 64, sizeof(float[64])}, {}, b.output);
});

// First half of the output: rounded through half; second half: through bfloat16.
__global__ void conversions(const float* input, float* output, int64_t count) {
    for (int64_t i = block_x() * 64 + thread_x(); i < count; i += grid_x() * 64) {
        output[i] = to_float(from_float<half>(input[i]));
        output[count + i] = to_float(from_float<bfloat16>(input[i]));
    }
}

const TestKernel use_conversions("conversions", [](const Buffers& b) {
    return launch<conversions>({4, 64, 0}, {}, b.input, b.output, b.inputs);
});

// Clamps each triple of the input: value, lower bound, upper bound.
__global__ void clamps(const float* input, float* output) {
    const float* triple = input + thread_x() * 3;
    output[thread_x()] = clamp(triple[0], triple[1], triple[2]);
}

const TestKernel use_clamps("clamps", [](const Buffers& b) {
    return launch<clamps>({1, static_cast<int>(b.inputs / 3), 0}, {}, b.input, b.output);
});

// a * b + c with one rounding and with two, for each triple of the input.
__global__ void multiply_add(const float* input, float* output) {
    const float* triple = input + thread_x() * 3;
    output[thread_x() * 2] = fmaf(triple[0], triple[1], triple[2]);
    output[thread_x() * 2 + 1] = triple[0] * triple[1] + triple[2];
}

const TestKernel use_multiply_add("multiply_add", [](const Buffers& b) {
    return launch<multiply_add>({1, static_cast<int>(b.inputs / 3), 0}, {}, b.input, b.output);
});

// Barriers only, as many as the first input says: for measuring.
__global__ void barriers_only(const float* input, float* output) {
    for (int i = 0; i < static_cast<int>(input[0]); ++i) sync_threads();
    output[thread_x()] = input[0];
}

const TestKernel use_barriers_only("barriers_only", [](const Buffers& b) {
    return launch<barriers_only>({1, static_cast<int>(b.outputs), 0}, {}, b.input, b.output);
});

struct AllSharedMemory {
    float values[227 * 1024 / sizeof(float)];
};

// A launch with the shape that the input gives: blocks, threads, bytes of shared memory. Every thread of every block counts
// itself, through the last word of the largest possible shared memory.
__global__ void any_shape(float* output) {
    float& last = shared_storage<AllSharedMemory>().values[227 * 1024 / sizeof(float) - 1];
    if (thread_x() == 0) last = 1.0f;
    sync_threads();
    output[thread_x()] += last;
}

const TestKernel use_any_shape("any_shape", [](const Buffers& b) {
    return launch<any_shape>(
        {static_cast<int64_t>(b.input[0]), static_cast<int>(b.input[1]), static_cast<int64_t>(b.input[2])}, {}, b.output);
});

}  // namespace

}  // namespace simt_tests
