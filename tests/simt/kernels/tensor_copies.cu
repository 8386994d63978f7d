// cp.async.bulk.tensor: used rightly, and each way to use it wrongly (tests/test_simt_tensor_copies.py).
#include <vector>

#include <device/hopper.cuh>
#include <device/launch.cuh>

#include "test_kernel.h"

namespace simt_tests {

using namespace fused_cna::device;
using fused_cna::DType;

// Not in an unnamed namespace, so that reports know the kernels' names.
namespace tensor_copies {

constexpr int threads = 64;

struct Storage {
    alignas(1024) float tile[64 * 256];
    PhaseBarrier full;
};

// What is where in the input: a map, then what to copy by it. The test knows the order too.
struct Case {
    explicit Case(const Buffers& buffers) : next_(buffers.input) {
        geometry.is_im2col = take() != 0;
        geometry.dtype = static_cast<DType>(static_cast<int>(take()));
        geometry.rank = take_int();
        for (int64_t& size : geometry.sizes) size = static_cast<int64_t>(take());
        for (int64_t& stride : geometry.strides) stride = static_cast<int64_t>(take());
        for (int& count : geometry.box) count = take_int();
        for (int* number : {&geometry.swizzle_bytes, &geometry.channels, &geometry.pixels, &geometry.lower_w,
                            &geometry.lower_h, &geometry.upper_w, &geometry.upper_h, &geometry.step_w, &geometry.step_h})
            *number = take_int();
        address = take_int();
        for (int& coordinate : at) coordinate = take_int();
        offset_w = take_int();
        offset_h = take_int();
        place = take_int();
        values = next_;
        count = buffers.inputs - (next_ - buffers.input);
    }

    int element_bytes() const { return static_cast<int>(size_in_bytes(geometry.dtype)); }

    int box_bytes() const {
        int elements = geometry.is_im2col ? geometry.channels * geometry.pixels : 1;
        for (int i = 0; i < geometry.rank && !geometry.is_im2col; ++i) elements *= geometry.box[i];
        return elements * element_bytes();
    }

    MapGeometry geometry;
    int address = 0;  // of the tensor, in bytes behind a multiple of 16
    int at[4]{};
    int offset_w = 0, offset_h = 0;
    int place = 0;  // of the box, in bytes of shared memory
    const float* values = nullptr;
    int64_t count = 0;

   private:
    float take() { return *next_++; }
    int take_int() { return static_cast<int>(take()); }

    const float* next_;
};

// Elements of a type, in 16-byte aligned memory.
class Elements {
   public:
    Elements(int64_t count, DType dtype) : dtype_(dtype), memory_(count * size_in_bytes(dtype) / 16 + 2) {}

    void* data() { return memory_.data(); }

    void set(int64_t i, float value) {
        if (dtype_ == DType::float32) at<float>(i) = value;
        if (dtype_ == DType::float16) at<half>(i) = from_float<half>(value);
        if (dtype_ == DType::bfloat16) at<bfloat16>(i) = from_float<bfloat16>(value);
    }

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

struct Copy {
    int rank;
    bool is_im2col;
    int at[4];
    int offset_w, offset_h;
    int place, bytes;
};

Copy copy_of(const Case& c) {
    return {c.geometry.rank, c.geometry.is_im2col, {c.at[0], c.at[1], c.at[2], c.at[3]}, c.offset_w, c.offset_h,
            c.place,         c.box_bytes()};
}

__device__ void start_load(uint32_t destination, const TensorMap& map, PhaseBarrier& barrier, const Copy& copy) {
    const auto& at = copy.at;
    if (copy.is_im2col) {
        load_im2col(destination, map, barrier, at[0], at[1], at[2], at[3], copy.offset_w, copy.offset_h);
    } else if (copy.rank == 2) {
        load_tile(destination, map, barrier, at[0], at[1]);
    } else if (copy.rank == 3) {
        load_tile(destination, map, barrier, at[0], at[1], at[2]);
    } else {
        load_tile(destination, map, barrier, at[0], at[1], at[2], at[3]);
    }
}

__device__ void make_barrier(PhaseBarrier& barrier) {
    if (thread_x() == 0) {
        init_barrier(barrier, 1);
        publish_barriers();
    }
    sync_threads();
}

// The box as it lies in shared memory.
__global__ void load_box(const __grid_constant__ TensorMap map, Copy copy, float* output) {
    Storage& storage = shared_storage<Storage>();
    make_barrier(storage.full);
    if (thread_x() == 0) {
        arrive_expecting(storage.full, copy.bytes);
        start_load(shared_address(storage.tile) + copy.place, map, storage.full, copy);
    }
    wait(storage.full, 0);
    for (int i = thread_x(); i < copy.bytes / 4; i += threads) output[i] = storage.tile[copy.place / 4 + i];
}

// The values behind the map are the tensor's memory.
const char* run_load(const Buffers& b) {
    Case c(b);
    Elements tensor(c.count, c.geometry.dtype), box(b.outputs, c.geometry.dtype);
    for (int64_t i = 0; i < c.count; ++i) tensor.set(i, c.values[i]);
    c.geometry.address = static_cast<char*>(tensor.data()) + c.address;
    TensorMap map;
    if (const char* refusal = encode_map(c.geometry, map)) return refusal;
    const char* refused =
        launch<load_box>({1, threads, sizeof(Storage)}, nullptr, map, copy_of(c), static_cast<float*>(box.data()));
    for (int64_t i = 0; i < b.outputs; ++i) b.output[i] = box.get(i);
    return refused;
}
const TestKernel use_load("tensor_load", run_load);

// The words of a box, in the order of shared memory, go out.
__global__ void store_box(const __grid_constant__ TensorMap map, Copy copy, const float* words) {
    const uint32_t source = shared_address(shared_storage<Storage>().tile) + copy.place;
    for (int i = thread_x(); i < copy.bytes / 16; i += threads)
        store_shared(source + i * 16, reinterpret_cast<const Vector16*>(words)[i]);
    fence_async_proxy();
    sync_threads();
    if (thread_x() == 0) {
        store_tile(map, source, copy.at[0], copy.at[1], copy.at[2]);
        commit_stores();
        wait_stores_read<0>();
    }
}

// The values behind the map are the box; the tensor's memory is the output.
const char* run_store(const Buffers& b) {
    Case c(b);
    Elements tensor(b.outputs, c.geometry.dtype), box(c.count, c.geometry.dtype);
    for (int64_t i = 0; i < c.count; ++i) box.set(i, c.values[i]);
    for (int64_t i = 0; i < b.outputs; ++i) tensor.set(i, b.output[i]);
    c.geometry.address = tensor.data();
    TensorMap map;
    if (const char* refusal = encode_map(c.geometry, map)) return refusal;
    const char* refused =
        launch<store_box>({1, threads, sizeof(Storage)}, nullptr, map, copy_of(c), static_cast<const float*>(box.data()));
    for (int64_t i = 0; i < b.outputs; ++i) b.output[i] = tensor.get(i);
    return refused;
}
const TestKernel use_store("tensor_store", run_store);

// Whether there are maps at all, and null or the refusal.
const char* run_encode(const Buffers& b) {
    Case c(b);
    alignas(16) static char memory[32];
    c.geometry.address = c.address < 0 ? nullptr : memory + c.address;
    b.output[0] = has_tensor_maps();
    TensorMap map;
    return encode_map(c.geometry, map);
}
const TestKernel use_encode("tensor_encode", run_encode);

// The rest knows its geometry: input and output are tensors of 8 boxes of 8 rows of 32 floats.
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
using Kernel = void (*)(const Maps maps, const float* input, float* output);

template <Kernel kernel>
const char* run(const Buffers& b) {
    Maps maps;
    if (const char* refusal = make_map(b.input, boxes, maps.input)) return refusal;
    if (const char* refusal = make_map(b.output, boxes, maps.output)) return refusal;
    return launch<kernel>({1, threads, sizeof(Storage)}, nullptr, maps, b.input, b.output);
}

__device__ uint32_t tile_address(int box = 0) { return shared_address(shared_storage<Storage>().tile + box * box_floats); }

__device__ float* tile() { return shared_storage<Storage>().tile; }

// Thread 0 starts to load a box; everybody knows the barrier.
__device__ PhaseBarrier& begin_load(const TensorMap& map, int expected_bytes = box_bytes, int place = 0) {
    PhaseBarrier& full = shared_storage<Storage>().full;
    make_barrier(full);
    if (thread_x() == 0) {
        arrive_expecting(full, expected_bytes);
        load_tile(tile_address() + place, map, full, 0, 0, 3);
    }
    return full;
}

__device__ void copy_out(float* output) {
    for (int i = thread_x(); i < box_floats; i += threads) output[i] = tile()[i];
}

// Every box but the first comes and goes, by two buffers: a load waits until the store of two rounds before has read.
__global__ void boxes_pass_through(const Maps maps, const float*, float*) {
    PhaseBarrier& full = shared_storage<Storage>().full;
    make_barrier(full);
    if (thread_x() != 0) return;
    for (int box = 1; box < boxes; ++box) {
        wait_stores_read<1>();
        arrive_expecting(full, box_bytes);
        load_tile(tile_address(box % 2), maps.input, full, 0, 0, box);
        wait(full, (box - 1) % 2);
        store_tile(maps.output, tile_address(box % 2), 0, 0, box);
        commit_stores();
    }
}
const TestKernel use_boxes_pass_through("boxes_pass_through", run<boxes_pass_through>);

// Two loads count at one barrier, in whatever order they land.
__global__ void two_loads_of_one_phase(const Maps maps, const float*, float* output) {
    PhaseBarrier& full = begin_load(maps.input, 2 * box_bytes);
    if (thread_x() == 0) load_tile(tile_address(1), maps.input, full, 0, 0, 4);
    wait(full, 0);
    copy_out(output);
    for (int i = thread_x(); i < box_floats; i += threads) output[box_floats + i] = tile()[box_floats + i];
}
const TestKernel use_two_loads_of_one_phase("two_loads_of_one_phase", run<two_loads_of_one_phase>);

// The source is changed while the load is under way, and before anybody could have seen it land.
__global__ void tensor_changed_under_way(const Maps maps, const float*, float* output) {
    PhaseBarrier& full = shared_storage<Storage>().full;
    make_barrier(full);
    if (thread_x() != 0) return;
    for (int i = 0; i < box_floats; ++i) output[i] = 1;
    arrive_expecting(full, box_bytes);
    load_tile(tile_address(), maps.output, full, 0, 0, 0);
    for (int i = 0; i < box_floats; ++i) output[i] = 2;
    wait(full, 0);
    for (int i = 0; i < box_floats; ++i) output[i] = tile()[i];
}
const TestKernel use_tensor_changed_under_way("tensor_changed_under_way", run<tensor_changed_under_way>);

__global__ void more_bytes_expected(const Maps maps, const float*, float*) {
    wait(begin_load(maps.input, box_bytes + 16), 0);
}
const TestKernel use_more_bytes_expected("more_bytes_expected", run<more_bytes_expected>);

__global__ void fewer_bytes_expected(const Maps maps, const float*, float*) {
    wait(begin_load(maps.input, box_bytes - 16), 0);
}
const TestKernel use_fewer_bytes_expected("fewer_bytes_expected", run<fewer_bytes_expected>);

// By the thread that started it, before anybody else can run.
__global__ void read_at_once(const Maps maps, const float*, float* output) {
    PhaseBarrier& full = begin_load(maps.input);
    for (int i = 0; thread_x() == 0 && i < box_floats; ++i) output[i] = tile()[i];
    wait(full, 0);
}
const TestKernel use_read_at_once("read_at_once", run<read_at_once>);

__global__ void read_before_the_wait(const Maps maps, const float*, float* output) {
    PhaseBarrier& full = begin_load(maps.input);
    sync_threads();
    copy_out(output);
    wait(full, 0);
}
const TestKernel use_read_before_the_wait("read_before_the_wait", run<read_before_the_wait>);

__global__ void destination_written(const Maps maps, const float*, float*) {
    PhaseBarrier& full = begin_load(maps.input);
    if (thread_x() == 0) tile()[77] = 1;
    wait(full, 0);
}
const TestKernel use_destination_written("destination_written", run<destination_written>);

__global__ void destination_loaded_twice(const Maps maps, const float*, float*) {
    PhaseBarrier& full = begin_load(maps.input, 2 * box_bytes);
    if (thread_x() == 0) load_tile(tile_address(), maps.input, full, 0, 0, 4);
    wait(full, 0);
}
const TestKernel use_destination_loaded_twice("destination_loaded_twice", run<destination_loaded_twice>);

template <int Place>
__global__ void load_to(const Maps maps, const float*, float*) {
    wait(begin_load(maps.input, box_bytes, Place), 0);
}
const TestKernel use_load_to_128("load_to_128", run<load_to<128>>);
const TestKernel use_load_to_4("load_to_4", run<load_to<4>>);
const TestKernel use_load_outside("load_outside", run<load_to<sizeof(Storage)>>);

__global__ void map_never_encoded(const Maps, const float*, float*) {
    const TensorMap map;
    wait(begin_load(map), 0);
}
const TestKernel use_map_never_encoded("map_never_encoded", run<map_never_encoded>);

__global__ void wrong_dimensions(const Maps maps, const float*, float*) {
    PhaseBarrier& full = shared_storage<Storage>().full;
    make_barrier(full);
    if (thread_x() == 0) load_tile(tile_address(), maps.input, full, 0, 0);
}
const TestKernel use_wrong_dimensions("wrong_dimensions", run<wrong_dimensions>);

__global__ void tiled_as_im2col(const Maps maps, const float*, float*) {
    PhaseBarrier& full = shared_storage<Storage>().full;
    make_barrier(full);
    if (thread_x() == 0) load_im2col(tile_address(), maps.input, full, 0, 0, 0, 0, 0, 0);
}
const TestKernel use_tiled_as_im2col("tiled_as_im2col", run<tiled_as_im2col>);

// Every thread writes its part of the first box.
__device__ void fill_tile(float value) {
    for (int i = thread_x(); i < box_bytes / 16; i += threads)
        store_shared(tile_address() + i * 16, std::bit_cast<Vector16>(std::array{value, value, value, value}));
}

__global__ void store_without_fence(const Maps maps, const float*, float*) {
    fill_tile(1);
    sync_threads();
    if (thread_x() != 0) return;
    store_tile(maps.output, tile_address(), 0, 0, 0);
    commit_stores();
    wait_stores_read<0>();
}
const TestKernel use_store_without_fence("store_without_fence", run<store_without_fence>);

// A fence is for what its own thread wrote.
__global__ void fence_of_one_thread(const Maps maps, const float*, float*) {
    fill_tile(1);
    sync_threads();
    if (thread_x() != 0) return;
    fence_async_proxy();
    store_tile(maps.output, tile_address(), 0, 0, 0);
    commit_stores();
    wait_stores_read<0>();
}
const TestKernel use_fence_of_one_thread("fence_of_one_thread", run<fence_of_one_thread>);

__device__ void begin_store(const TensorMap& map) {
    fill_tile(1);
    fence_async_proxy();
    sync_threads();
    if (thread_x() == 0) store_tile(map, tile_address(), 0, 0, 0);
}

__global__ void store_never_waited(const Maps maps, const float*, float*) {
    begin_store(maps.output);
    if (thread_x() == 0) commit_stores();
}
const TestKernel use_store_never_waited("store_never_waited", run<store_never_waited>);

__global__ void store_never_committed(const Maps maps, const float*, float*) {
    begin_store(maps.output);
    if (thread_x() == 0) wait_stores_read<0>();
}
const TestKernel use_store_never_committed("store_never_committed", run<store_never_committed>);

__global__ void source_overwritten(const Maps maps, const float*, float*) {
    begin_store(maps.output);
    if (thread_x() == 0) commit_stores();
    sync_threads();
    fill_tile(2);
    sync_threads();
    if (thread_x() == 0) wait_stores_read<0>();
}
const TestKernel use_source_overwritten("source_overwritten", run<source_overwritten>);

// The same by another's epilogue, and nobody waits.
__global__ void source_overwritten_at_the_end(const Maps maps, const float*, float*) {
    begin_store(maps.output);
    if (thread_x() == 0) commit_stores();
    sync_threads();
    if (thread_x() == 1) tile()[0] = 2;
}
const TestKernel use_source_overwritten_at_the_end("source_overwritten_at_the_end", run<source_overwritten_at_the_end>);

// The next load takes the place of a store that may not have read it.
__global__ void source_loaded_early(const Maps maps, const float*, float*) {
    begin_store(maps.output);
    if (thread_x() == 0) commit_stores();
    wait(begin_load(maps.input), 0);
    if (thread_x() == 0) wait_stores_read<0>();
}
const TestKernel use_source_loaded_early("source_loaded_early", run<source_loaded_early>);

__global__ void store_from_a_negative_row(const Maps maps, const float*, float*) {
    if (thread_x() == 0) store_tile(maps.output, tile_address(), 0, -1, 0);
}
const TestKernel use_store_from_a_negative_row("store_from_a_negative_row", run<store_from_a_negative_row>);

__global__ void store_from_64(const Maps maps, const float*, float*) {
    if (thread_x() == 0) store_tile(maps.output, tile_address() + 64, 0, 0, 0);
}
const TestKernel use_store_from_64("store_from_64", run<store_from_64>);

// Which of three groups, of one, two and no boxes, have landed after each wait of a sequence.
__global__ void store_groups(const Maps maps, const float*, float* output) {
    fill_tile(1);
    fence_async_proxy();
    sync_threads();
    if (thread_x() != 0) return;
    int landed[4][3];
    const auto note = [&](int moment) {
        for (int box = 0; box < 3; ++box) landed[moment][box] = output[box * box_floats] == 1;
    };
    for (int box = 0; box < 3; ++box) {
        store_tile(maps.output, tile_address(), 0, 0, box);
        if (box != 1) commit_stores();
    }
    commit_stores();
    wait_stores_read<3>();
    note(0);
    wait_stores_read<2>();
    note(1);
    wait_stores_read<1>();
    note(2);
    wait_stores_read<0>();
    note(3);
    for (int i = 0; i < 12; ++i) output[3 * box_floats + i] = landed[i / 3][i % 3];
}
const TestKernel use_store_groups("store_groups", run<store_groups>);

// The map has a box more than the input.
__global__ void read_behind_the_end(const __grid_constant__ TensorMap map, int box, float* output) {
    PhaseBarrier& full = shared_storage<Storage>().full;
    make_barrier(full);
    if (thread_x() == 0) {
        arrive_expecting(full, box_bytes);
        load_tile(tile_address(), map, full, 0, 0, box);
    }
    wait(full, 0);
    copy_out(output);
}

template <int Box>
const char* run_behind_the_end(const Buffers& b) {
    const int in_input = static_cast<int>(b.inputs / box_floats);
    TensorMap map;
    if (const char* refusal = make_map(b.input, in_input + 1, map)) return refusal;
    return launch<read_behind_the_end>({1, threads, sizeof(Storage)}, nullptr, map, in_input - 1 + Box, b.output);
}
const TestKernel use_read_the_last_box("read_the_last_box", run_behind_the_end<0>);
const TestKernel use_read_behind_the_last_box("read_behind_the_last_box", run_behind_the_end<1>);

}  // namespace tensor_copies

}  // namespace simt_tests
