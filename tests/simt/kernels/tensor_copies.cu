// cp.async.bulk.tensor: correct uses, and every wrong use (tests/test_simt_tensor_copies.py).
#include <bit>
#include <vector>

#include <device/hopper.cuh>
#include <device/launch.cuh>

#include "test_kernel.h"

namespace simt_tests {

using namespace fused_cna::device;
using fused_cna::DType;

// Not in an unnamed namespace, so that reports can name the kernels.
namespace tensor_copies {

constexpr int threads = 64;

struct Storage {
    alignas(1024) float tile[64 * 256];
    PhaseBarrier full;
};
constexpr LaunchShape shape{1, threads, sizeof(Storage)};

__device__ PhaseBarrier& make_barrier() {
    PhaseBarrier& full = shared_storage<Storage>().full;
    if (thread_x() == 0) {
        init_barrier(full, 1);
        publish_barriers();
    }
    sync_threads();
    return full;
}

struct Copy {
    int rank, bytes, at[4], offset_w, offset_h, place;
    bool is_im2col;
};

// The input: a map, then the copy by it, then values. The test uses the same order.
struct Case {
    explicit Case(const Buffers& buffers) : values(buffers.input) {
        const auto take_all = [&](auto&... numbers) {
            ((numbers = static_cast<std::remove_reference_t<decltype(numbers)>>(*values++)), ...);
        };
        const auto take_four = [&](auto& four) { take_all(four[0], four[1], four[2], four[3]); };
        int dtype;
        MapGeometry& g = geometry;
        take_all(g.is_im2col, dtype, g.rank);
        take_four(g.sizes), take_four(g.strides), take_four(g.box);
        take_all(g.swizzle_bytes, g.channels, g.pixels, g.lower_w, g.lower_h, g.upper_w, g.upper_h, g.step_w, g.step_h,
                 address);
        take_four(copy.at);
        take_all(copy.offset_w, copy.offset_h, copy.place);
        g.dtype = static_cast<DType>(dtype);
        copy.rank = g.rank, copy.is_im2col = g.is_im2col;
        copy.bytes = static_cast<int>(size_in_bytes(g.dtype)) * (g.is_im2col ? g.channels * g.pixels : 1);
        for (int i = 0; i < g.rank && !g.is_im2col; ++i) copy.bytes *= g.box[i];
        count = buffers.inputs - (values - buffers.input);
    }

    const float* values;
    int64_t count;
    MapGeometry geometry;
    int address;  // of the tensor, in bytes after a multiple of 16
    Copy copy;
};

// Elements of a type, in 16-byte aligned memory.
class Elements {
   public:
    Elements(const float* values, int64_t count, DType dtype)
        : dtype_(dtype), memory_(count * size_in_bytes(dtype) / 16 + 2) {
        for (int64_t i = 0; i < count; ++i) {
            if (dtype == DType::float32) at<float>(i) = values[i];
            if (dtype == DType::float16) at<half>(i) = from_float<half>(values[i]);
            if (dtype == DType::bfloat16) at<bfloat16>(i) = from_float<bfloat16>(values[i]);
        }
    }

    Vector16* data() { return memory_.data(); }

    float get(int64_t i) {
        if (dtype_ == DType::float32) return at<float>(i);
        return dtype_ == DType::float16 ? to_float(at<half>(i)) : to_float(at<bfloat16>(i));
    }

   private:
    template <class T>
    T& at(int64_t i) {
        return reinterpret_cast<T*>(memory_.data())[i];
    }

    DType dtype_;
    std::vector<Vector16> memory_;
};

// Loads the box from the tensor or stores it there; `words` are in the order of shared memory.
template <bool Stores>
__global__ void copy_box(const __grid_constant__ TensorMap map, Copy copy, Vector16* words) {
    PhaseBarrier& full = make_barrier();
    const auto [x, y, z, t] = copy.at;
    const uint32_t box = shared_address(shared_storage<Storage>().tile) + copy.place;
    for (int i = thread_x(); i < copy.bytes / 16 && Stores; i += threads) store_shared(box + i * 16, words[i]);
    fence_async_proxy();
    sync_threads();
    if (thread_x() == 0 && Stores) {
        store_tile(map, box, x, y, z);
        commit_stores();
        wait_stores_read<0>();
    }
    if (Stores) return;
    if (thread_x() == 0) {
        arrive_expecting(full, copy.bytes);
        if (copy.is_im2col) load_im2col(box, map, full, x, y, z, t, copy.offset_w, copy.offset_h);
        if (!copy.is_im2col && copy.rank == 2) load_tile(box, map, full, x, y);
        if (!copy.is_im2col && copy.rank == 3) load_tile(box, map, full, x, y, z);
        if (!copy.is_im2col && copy.rank == 4) load_tile(box, map, full, x, y, z, t);
    }
    wait(full, 0);
    for (int i = thread_x(); i < copy.bytes / 16; i += threads) words[i] = load_shared(box + i * 16);
}

// Loads: the values after the map are the tensor's memory, and the output is the box. Stores: the reverse.
template <bool Stores>
const char* run_copy(const Buffers& b) {
    Case c(b);
    Elements given(c.values, c.count, c.geometry.dtype), output(b.output, b.outputs, c.geometry.dtype);
    c.geometry.address = (Stores ? output : given).data();
    TensorMap map;
    if (const char* refusal = encode_map(c.geometry, map)) return refusal;
    const char* refused = launch<copy_box<Stores>>(shape, {}, map, c.copy, (Stores ? given : output).data());
    for (int64_t i = 0; i < b.outputs; ++i) b.output[i] = output.get(i);
    return refused;
}

// Output: whether there are maps at all. Returns null or the refusal.
const char* run_encode(const Buffers& b) {
    Case c(b);
    alignas(16) static char memory[32];
    c.geometry.address = c.address < 0 ? nullptr : memory + c.address;
    b.output[0] = has_tensor_maps();
    TensorMap map;
    return encode_map(c.geometry, map);
}
const TestKernel of_cases[] = {
    {"tensor_load", run_copy<false>}, {"tensor_store", run_copy<true>}, {"tensor_encode", run_encode}};

// The kernels from here on have a fixed geometry: input and output are tensors of 8 boxes of 8 rows of 32 floats.
constexpr int columns = 32, rows = 8, boxes = 8;
constexpr int box_floats = columns * rows, box_bytes = box_floats * 4;

const char* make_map(const void* address, int all_boxes, TensorMap& map) {
    MapGeometry geometry{.address = address, .rank = 3, .swizzle_bytes = 128};
    geometry.sizes = {columns, rows, all_boxes, 1};
    geometry.strides = {4, columns * 4, box_bytes, 0};
    geometry.box = {columns, rows, 1, 1};
    return encode_map(geometry, map);
}

struct Maps {
    TensorMap input, output;
};
using Kernel = void (*)(const Maps maps, float* output);

template <Kernel kernel>
const char* run(const Buffers& b) {
    Maps maps;
    if (const char* refusal = make_map(b.input, boxes, maps.input)) return refusal;
    if (const char* refusal = make_map(b.output, boxes, maps.output)) return refusal;
    return launch<kernel>(shape, {}, maps, b.output);
}

__device__ float* tile() { return shared_storage<Storage>().tile; }
__device__ uint32_t tile_address(int box = 0) { return shared_address(tile() + box * box_floats); }

__device__ void copy_out(float* output, int count = box_floats) {
    for (int i = thread_x(); i < count; i += threads) output[i] = tile()[i];
}

// Thread 0 starts loading a box; all threads get the barrier.
__device__ PhaseBarrier& begin_load(const TensorMap& map, int expected_bytes = box_bytes, int place = 0, int box = 3) {
    PhaseBarrier& full = make_barrier();
    if (thread_x() == 0) {
        arrive_expecting(full, expected_bytes);
        load_tile(tile_address() + place, map, full, 0, 0, box);
    }
    return full;
}

// Loads and stores every box but the first through two buffers: a load waits until the store two rounds before has read.
__global__ void boxes_pass_through(const Maps maps, float*) {
    PhaseBarrier& full = make_barrier();
    for (int box = 1; box < boxes && thread_x() == 0; ++box) {
        wait_stores_read<1>();
        arrive_expecting(full, box_bytes);
        load_tile(tile_address(box % 2), maps.input, full, 0, 0, box);
        wait(full, (box - 1) % 2);
        store_tile(maps.output, tile_address(box % 2), 0, 0, box);
        commit_stores();
    }
}

// The source changes while the load is in flight, before any thread could have seen it land.
__global__ void tensor_changed_under_way(const Maps maps, float* output) {
    for (int i = 0; i < box_floats && thread_x() == 0; ++i) output[i] = 1;
    PhaseBarrier& full = begin_load(maps.output, box_bytes, 0, 0);
    for (int i = 0; i < box_floats && thread_x() == 0; ++i) output[i] = 2;
    wait(full, 0);
    copy_out(output);
}

// A second load, counted by the same barrier, into the place `Box` boxes after the first.
template <int Box>
__global__ void two_loads(const Maps maps, float* output) {
    PhaseBarrier& full = begin_load(maps.input, 2 * box_bytes);
    if (thread_x() == 0) load_tile(tile_address(Box), maps.input, full, 0, 0, 4);
    wait(full, 0);
    copy_out(output, 2 * box_floats);
}

template <int MoreExpected, int Place = 0>
__global__ void load(const Maps maps, float*) {
    wait(begin_load(maps.input, box_bytes + MoreExpected, Place), 0);
}

// AtOnce: the thread that started the load reads before any other can run. Otherwise all threads read.
template <bool AtOnce>
__global__ void read_early(const Maps maps, float* output) {
    PhaseBarrier& full = begin_load(maps.input);
    if (!AtOnce) sync_threads();
    const int first = AtOnce ? thread_x() * box_floats : thread_x(), step = AtOnce ? 1 : threads;
    for (int i = first; i < box_floats; i += step) output[i] = tile()[i];
    wait(full, 0);
}

__global__ void destination_written(const Maps maps, float*) {
    PhaseBarrier& full = begin_load(maps.input);
    if (thread_x() == 0) tile()[77] = 1;
    wait(full, 0);
}

// Every thread writes its part of the first box.
__device__ void fill_tile(float value) {
    for (int i = thread_x(); i < box_bytes / 16; i += threads)
        store_shared(tile_address() + i * 16, std::bit_cast<Vector16>(std::array{value, value, value, value}));
}

// Thread 0 starts storing the first box, after the first `fences` threads have fenced.
__device__ void begin_store(const TensorMap& map, int fences = threads, bool commits = true) {
    fill_tile(1);
    if (thread_x() < fences) fence_async_proxy();
    sync_threads();
    if (thread_x() != 0) return;
    store_tile(map, tile_address(), 0, 0, 0);
    if (commits) commit_stores();
}

template <int Fences, bool Commits = true, bool Waits = true>
__global__ void store(const Maps maps, float*) {
    begin_store(maps.output, Fences, Commits);
    if (thread_x() == 0 && Waits) wait_stores_read<0>();
}

// All threads overwrite it, or at the end another thread does, without waiting.
template <bool AtTheEnd>
__global__ void overwrite_source(const Maps maps, float*) {
    begin_store(maps.output);
    sync_threads();
    if (AtTheEnd && thread_x() == 1) tile()[0] = 2;
    if (AtTheEnd) return;
    fill_tile(2);
    sync_threads();
    if (thread_x() == 0) wait_stores_read<0>();
}

// The next load overwrites the source of a store that may not have read it.
__global__ void source_loaded_early(const Maps maps, float*) {
    begin_store(maps.output);
    wait(begin_load(maps.input), 0);
    if (thread_x() == 0) wait_stores_read<0>();
}

enum class Misuse { map_never_encoded, dimensions, im2col, negative_row, store_from_64 };
template <Misuse misuse>
__global__ void misused(const Maps maps, float*) {
    PhaseBarrier& full = make_barrier();
    if (thread_x() != 0) return;
    if (misuse == Misuse::map_never_encoded) load_tile(tile_address(), TensorMap{}, full, 0, 0, 3);
    if (misuse == Misuse::dimensions) load_tile(tile_address(), maps.input, full, 0, 0);
    if (misuse == Misuse::im2col) load_im2col(tile_address(), maps.input, full, 0, 0, 0, 0, 0, 0);
    if (misuse == Misuse::negative_row) store_tile(maps.output, tile_address(), 0, -1, 0);
    if (misuse == Misuse::store_from_64) store_tile(maps.output, tile_address() + 64, 0, 0, 0);
}

// Which of three groups, of one, two and no boxes, have landed after each of several waits.
__global__ void store_groups(const Maps maps, float* output) {
    fill_tile(1);
    fence_async_proxy();
    sync_threads();
    if (thread_x() != 0) return;
    int landed[12], notes = 0;
    const auto wait_and_note = [&]<int Pending>() {
        wait_stores_read<Pending>();
        for (int box = 0; box < 3; ++box) landed[notes++] = output[box * box_floats] == 1;
    };
    for (int box = 0; box < 3; ++box) {
        store_tile(maps.output, tile_address(), 0, 0, box);
        if (box != 1) commit_stores();
    }
    commit_stores();
    wait_and_note.operator()<3>();
    wait_and_note.operator()<2>();
    wait_and_note.operator()<1>();
    wait_and_note.operator()<0>();
    for (int i = 0; i < 12; ++i) output[3 * box_floats + i] = static_cast<float>(landed[i]);
}

const TestKernel of_boxes[] = {
    {"boxes_pass_through", run<boxes_pass_through>},
    {"tensor_changed_under_way", run<tensor_changed_under_way>},
    {"two_loads_of_one_phase", run<two_loads<1>>},
    {"destination_loaded_twice", run<two_loads<0>>},
    {"more_bytes_expected", run<load<16>>},
    {"fewer_bytes_expected", run<load<-16>>},
    {"load_to_128", run<load<0, 128>>},
    {"load_to_4", run<load<0, 4>>},
    {"load_outside", run<load<0, sizeof(Storage)>>},
    {"read_at_once", run<read_early<true>>},
    {"read_before_the_wait", run<read_early<false>>},
    {"destination_written", run<destination_written>},
    {"map_never_encoded", run<misused<Misuse::map_never_encoded>>},
    {"wrong_dimensions", run<misused<Misuse::dimensions>>},
    {"tiled_as_im2col", run<misused<Misuse::im2col>>},
    {"store_without_fence", run<store<0>>},
    {"fence_of_one_thread", run<store<1>>},
    {"store_never_waited", run<store<threads, true, false>>},
    {"store_never_committed", run<store<threads, false>>},
    {"source_overwritten", run<overwrite_source<false>>},
    {"source_overwritten_at_the_end", run<overwrite_source<true>>},
    {"source_loaded_early", run<source_loaded_early>},
    {"store_from_a_negative_row", run<misused<Misuse::negative_row>>},
    {"store_from_64", run<misused<Misuse::store_from_64>>},
    {"store_groups", run<store_groups>},
};

// The map has one box more than the input.
__global__ void read_behind_the_end(const __grid_constant__ TensorMap map, int box, float* output) {
    wait(begin_load(map, box_bytes, 0, box), 0);
    copy_out(output);
}

template <int Box>
const char* run_behind_the_end(const Buffers& b) {
    const int in_input = static_cast<int>(b.inputs / box_floats);
    TensorMap map;
    if (const char* refusal = make_map(b.input, in_input + 1, map)) return refusal;
    return launch<read_behind_the_end>(shape, {}, map, in_input - 1 + Box, b.output);
}
const TestKernel behind[] = {{"read_the_last_box", run_behind_the_end<0>},
                             {"read_behind_the_last_box", run_behind_the_end<1>}};

}  // namespace tensor_copies

}  // namespace simt_tests
