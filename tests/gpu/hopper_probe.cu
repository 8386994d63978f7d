// Asks a GPU of compute capability 9.0 what the Hopper kernel takes for granted, by the functions that it uses. Prints a
// JSON object: the answers in a word, and what was seen. tests/gpu/probes.py knows which of them the code assumes.
#include <bit>

#include <device/warpgroup.cuh>

#include "kernels/implicit_gemm_sm90/epilogue.cuh"

#include "probe.cuh"

using namespace fused_cna::probe;
using namespace fused_cna::implicit_gemm_sm90;
namespace gather = fused_cna::gather;

__device__ void make_barrier(PhaseBarrier& barrier, int bytes) {
    if (thread_x() == 0) {
        init_barrier(barrier, 1);
        publish_barriers();
        arrive_expecting(barrier, bytes);
    }
    sync_threads();
}

// A box of rows of 128 bytes, im2col (from these on) or tiled.
struct Box {
    int rows, w, h, offset_w, offset_h;
    bool is_im2col;
};
struct Landing {
    alignas(1024) unsigned char rows[128][128];
    PhaseBarrier full;
};

__global__ void __launch_bounds__(128) bring(const __grid_constant__ TensorMap map, Box box, Vector16* values) {
    Landing& shared = shared_storage<Landing>();
    const uint32_t first = shared_address(shared.rows);
    make_barrier(shared.full, box.rows * 128);
    if (thread_x() == 0 && box.is_im2col)
        load_im2col(first, map, shared.full, 32, box.w, box.h, 0, box.offset_w, box.offset_h);
    if (thread_x() == 0 && !box.is_im2col) load_tile(first, map, shared.full, 0, 0);
    wait(shared.full, 0);
    for (int i = thread_x(); i < box.rows * 8; i += 128)
        values[i] = load_shared(first + i / 8 * 128 + gather::swizzle<128>(i / 8, i % 8) * 16);
}
float* brought(const TensorMap& map, const Box& box) {
    float* values = make_array<float>(box.rows * 32);
    run<bring>({1, 128, sizeof(Landing)}, map, box, reinterpret_cast<Vector16*>(values));
    return values;
}

// A filter of 4 x 3 on 2 images of 9 x 6 (width first), padded by 1, 3 before and 2, 0 behind, strides 2, 1: outputs of 5
// x 7. Tap (3, 1) from the 13th on, which lies in the bounding box either way; channels from 32 on of 48.
void ask_im2col() {
    constexpr int c = 48, w = 9, h = 6, rows = 40, first = 13;
    float* x = make_array<float>(2 * h * w * c);
    for (int i = 0; i < 2 * h * w * c; ++i) x[i] = static_cast<float>(i + 1);
    const auto expected = [&](int i) {
        const int pixel = first + i / 32, channel = 32 + i % 32;
        const int column = pixel % 5 * 2 - 1 + 3, row = pixel / 5 % 7 - 3 + 1;
        if (column < 0 || column >= w || row < 0 || row >= h || channel >= c) return 0.f;
        return x[((pixel / 35 * h + row) * w + column) * c + channel];
    };
    MapGeometry map{.address = x, .rank = 4, .sizes = {c, w, h, 2}, .strides = {4, c * 4, w * c * 4, h * w * c * 4}};
    map.swizzle_bytes = 128, map.is_im2col = true, map.channels = 32, map.pixels = rows;
    std::string seen;
    int fits = -1;
    // A wrong way may lose the GPU, and the answer with it: none is tried once one fits.
    for (int way = 0; way < 4 && fits < 0; ++way) {
        map.lower_w = -1, map.lower_h = -3, map.upper_w = -1, map.upper_h = -2, map.step_w = 2, map.step_h = 1;
        if (way & 1) std::swap(map.lower_w, map.lower_h), std::swap(map.upper_w, map.upper_h);
        if (way & 2) std::swap(map.step_w, map.step_h);
        const Box box{rows, first % 5 * 2 - 1, first / 5 - 3, 3, 1, true};
        const std::string wrong = difference(brought(encoded(map), box), rows * 32, 32, expected);
        if (wrong.empty()) fits = way;
        constexpr const char* ways[] = {"as passed", "; corners swapped", "; steps swapped", "; both swapped"};
        seen += text("%s: %s", ways[way], wrong.empty() ? "fits" : wrong.c_str());
    }
    const auto order = [&](int bit) { return fits < 0 ? "neither" : fits & bit ? "height first" : "width first"; };
    answer("corner_order", order(1), seen);
    answer("step_order", order(2), seen);
}

// x of 128 rows, two blocks of a product, and a weight of N, as far behind it as in the kernel.
template <int N>
struct Operands {
    alignas(1024) unsigned char x[128 * 128], between[144 * 1024], weight[N * 128];
    PhaseBarrier full;
};

// As the kernel's own threads lay operands out.
__device__ void gather_rows(uint32_t to, const void* from, int rows) {
    for (int i = thread_x(); i < rows * 8; i += 128)
        store_shared(to + i / 8 * 128 + gather::swizzle<128>(i / 8, i % 8) * 16, static_cast<const Vector16*>(from)[i]);
}

template <class T, int N>
__global__ void __launch_bounds__(128)
    multiply(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap weight_map, const T* x,
             const T* weight, bool by_maps, float* y) {
    auto& shared = shared_storage<Operands<N>>();
    const uint32_t first_x = shared_address(shared.x), first_weight = shared_address(shared.weight);
    if (by_maps) {
        make_barrier(shared.full, (128 + N) * 128);
        if (thread_x() == 0) load_tile(first_x, x_map, shared.full, 0, 0);
        if (thread_x() == 0) load_tile(first_weight, weight_map, shared.full, 0, 0);
        wait(shared.full, 0);
    } else {
        gather_rows(first_x, x, 128);
        gather_rows(first_weight, weight, N);
        fence_async_proxy();
        sync_threads();
    }
    for (int block = 0; block < 2; ++block) {
        const uint64_t a = matrix_descriptor(first_x) + block * 512;
        const uint64_t b = matrix_descriptor(first_weight);
        float sums[N / 2];
        for (float& value : sums) value = 1e9f;  // not to be added to
        hold_sums(sums);
        fence_products();
        for (int k = 0; k < 4; ++k) multiply_async<T, N>(sums, a + k * 2, b + k * 2, k > 0);
        commit_products();
        wait_products<0>();
        hold_sums(sums);
        for (int i = 0; i < N / 2; ++i) {
            const int row = block * 64 + warp() * 16 + lane() / 4 + i / 2 % 2 * 8;
            y[row * N + i / 4 * 8 + lane() % 4 * 2 + i % 2] = sums[i];
        }
    }
}
template <int N, class T>
float* multiplied(const T* x, const T* weight, bool by_maps) {
    constexpr int depth = 128 / sizeof(T);
    MapGeometry map{.address = x, .dtype = dtype_of<T>, .rank = 2, .sizes = {depth, 128}, .strides = {sizeof(T), 128}};
    map.box = {depth, 128}, map.swizzle_bytes = 128;
    const TensorMap x_map = encoded(map);
    map.address = weight, map.sizes[1] = map.box[1] = N;
    float* y = make_array<float>(128 * N);
    run<multiply<T, N>>({1, 128, sizeof(Operands<N>)}, x_map, encoded(map), x, weight, by_maps, y);
    return y;
}

template <class T, int N>
void ask_product(const char* dtype) {
    constexpr int depth = 128 / sizeof(T), second = 77777;
    const T *x = integers<T>(128 * depth, 0), *weight = integers<T>(N * depth, second);
    const auto expected = [](int i) {
        float sum = 0;
        for (int k = 0; k < depth; ++k) sum += integer(i / N * depth + k) * integer(second + i % N * depth + k);
        return sum;
    };
    for (bool by_maps : {false, true}) {
        const float* y = multiplied<N>(x, weight, by_maps);
        answer(text("%s_%s_n%d", by_maps ? "products" : "gathered", dtype, N), difference(y, 128 * N, N, expected));
    }
}
template <class T>
void ask_products() {
    const char* dtype = fused_cna::dtype_name(dtype_of<T>);
    ask_product<T, 32>(dtype);
    ask_product<T, 64>(dtype);
    ask_product<T, 128>(dtype);
    ask_product<T, 192>(dtype);
    ask_product<T, 256>(dtype);
}

// What has become of float32 values on their way to tf32: ties and their neighbours, each followed by `step` others.
void answer_rounding(const char* name, const float* given, const float* seen, int step) {
    bool kept = true, cut = true, away = true, even = true;
    std::string odd = "of 128 values";
    for (int i = 0; i < 128; ++i) {
        const auto from = std::bit_cast<uint32_t>(given[i * 32]), to = std::bit_cast<uint32_t>(seen[i * step]);
        const auto is = [&](uint32_t rounded) { return to >> 13 == rounded >> 13; };
        kept &= from == to, cut &= is(from), away &= is(from + 0x1000), even &= is(from + 0xFFF + (from >> 13 & 1));
        if (!away && odd[0] == 'o') odd = text("%08x became %08x", from, to);
    }
    answer(name, kept ? "kept" : cut ? "truncated" : away ? "rounded away" : even ? "rounded to even" : "neither", odd);
}

void ask_tf32() {
    constexpr uint32_t low[] = {0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2FFF, 0x3000, 0x3001, 0x3FFF};
    const cuuint64_t sizes[] = {32, 2048}, strides[] = {128};  // large enough for drivers that encode small ones wrongly
    const cuuint32_t box[] = {32, 128}, steps[] = {1, 1};
    float *given = make_array<float>(2048 * 32), *ones = make_array<float>(128 * 32);
    for (uint32_t i = 0; i < 128; ++i) {
        given[i * 32] = std::bit_cast<float>((i & 8) << 28 | (110 + i % 30) << 23 | (i * 40503 & 0x1FF) << 14 | low[i % 8]);
        ones[i * 32] = 1;
    }
    answer_rounding("tf32_products_x", given, multiplied<128>(given, ones, false), 128);
    answer_rounding("tf32_products_weight", given, multiplied<128>(ones, given, false), 1);
    check(has_tensor_maps() ? nullptr : "the driver has no tensor maps");
    CUtensorMap map;
    const CUresult result = driver::encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_TFLOAT32, 2, on_gpu(given), sizes, strides,
                                                   box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    check(result == CUDA_SUCCESS ? nullptr : "the driver encodes no map of TFLOAT32");
    answer_rounding("tf32_map", given, brought(map, {128, 0, 0, 0, 0, false}), 32);
}

__device__ __host__ constexpr float addend(int row, int column) { return static_cast<float>((row * 7 + column * 3) % 61); }

// The way of the kernel's epilogue: by a map to swizzled slices, through registers, and back by another map.
template <class Traits>
__global__ void __launch_bounds__(128)
    add(const __grid_constant__ TensorMap residual, const __grid_constant__ TensorMap y, int first_row) {
    auto& shared = shared_storage<Shared<Traits>>();
    const Group group = Group::of(0);
    const Staging<Traits> staging(group, shared);
    make_barrier(shared.residual[0], Traits::slices * Traits::slice_bytes);
    for (int i = 0; i < Traits::slices && group.leads(); ++i)
        load_tile(staging.slice(i), residual, shared.residual[0], i * Tile::slice, 1, first_row);
    wait(shared.residual[0], 0);
    for (int part = 0; part < Traits::slices * Traits::blocks * 2; ++part) {
        const int slice = part / 2 / Traits::blocks, block = part / 2 % Traits::blocks, half = part % 2;
        typename Staging<Traits>::Values values;
        staging.load(slice, block, half, values);
        float sums[8];
        for (int i = 0; i < 8; ++i) {
            const int column = slice * Tile::slice + half * 16 + i / 2 % 2 * 8 + group.lane % 4 * 2 + i % 2;
            sums[i] = values.value(i) + addend(block * 64 + group.warp * 16 + group.lane / 4 + i / 4 * 8, column);
        }
        staging.store(slice, block, half, round_values<8, typename Traits::Value>(sums));
    }
    fence_async_proxy();
    group.sync();
    if (!group.leads()) return;
    for (int i = 0; i < Traits::slices; ++i) store_tile(y, staging.slice(i), i * Tile::slice, 1, first_row);
    commit_stores();
    wait_stores_read<0>();
}

// 64 columns of a group of fewer, and 128 rows from the 30th of 150 on, then from behind the last: what is beyond stays as
// it was. 44 channels end within 16 bytes of float16; groups are 48 apart.
template <class T>
void ask_output() {
    using Of = Traits<T, Tile{128, 64}, 16>;
    constexpr int c = 44, pitch = 48, row_values = 2 * pitch, first_row = 30, count = 170 * row_values;
    MapGeometry map{.address = integers<T>(count, 0), .dtype = dtype_of<T>, .rank = 3, .sizes = {c, 2, 150}};
    map.strides = {sizeof(T), pitch * sizeof(T), row_values * sizeof(T)};
    map.box = {Tile::slice, 1, Of::rows}, map.swizzle_bytes = Of::slice_row_bytes;
    const TensorMap residual_map = encoded(map);
    T* y = make_array<T>(count);
    map.address = y;
    for (const int first : {first_row, 150}) {
        run<add<Of>>({1, 128, sizeof(Shared<Of>)}, residual_map, encoded(map), first);
    }
    const auto expected = [](int i) {
        const int row = i / row_values - first_row, group = i / pitch % 2, channel = i % pitch;
        const bool is_written = row >= 0 && row < 120 && group == 1 && channel < c;
        return is_written ? integer(i) + addend(row, channel) : 0;
    };
    answer(text("output_%s", fused_cna::dtype_name(dtype_of<T>)),
           difference(converted<float>(y, count), count, row_values, expected));
}

// The second half of the threads leaves at once, as the kernel's producers do.
__global__ void __launch_bounds__(256) read_others(int blocks, float* y) {
    if (thread_x() >= 128) return;
    Vector16& own = (&shared_storage<Vector16>())[thread_x()];
    own.words[0] = static_cast<uint32_t>(block_x() * 1000 + cluster_rank() * 128 + thread_x());
    sync_cluster();
    for (int rank = 0; rank < blocks; ++rank)
        y[(block_x() * blocks + rank) * 128 + thread_x()] = load_cluster(shared_address(&own), rank).words[0];
    sync_cluster();
}
// With as much shared memory as the kernel takes at most.
void ask_clusters() {
    for (int blocks = 2; blocks <= 8; ++blocks) {
        float* y = make_array<float>(2 * blocks * blocks * 128);
        run<read_others>({2 * blocks, 256, Tile::shared_limit, blocks}, blocks, y);
        answer(text("cluster_of_%d", blocks), difference(y, 2 * blocks * blocks * 128, 128, [&](int i) {
                   const int block = i / 128 / blocks, rank = i / 128 % blocks;
                   return static_cast<float>((block / blocks * blocks + rank) * 1000 + rank * 128 + i % 128);
               }));
    }
}

__global__ void __launch_bounds__(384, 1) move_registers(float* y) {
    if (warp() / 4 == 0) give_registers<88>();
    if (warp() / 4 != 0) take_registers<208>();
    y[thread_x()] = 1;
}
void ask_registers() {
    float* y = make_array<float>(384);
    run<move_registers>({1, 384, 0}, y);
    answer("registers", difference(y, 384, 384, [](int) { return 1.f; }));
}

int main() {
    dprintf(1, "{\n");
    ask("im2col", ask_im2col);
    ask("tf32", ask_tf32);
    ask("products of float16", ask_products<half>);
    ask("products of bfloat16", ask_products<bfloat16>);
    ask("products of float32", ask_products<float>);
    ask("output of float16", ask_output<half>);
    ask("output of float32", ask_output<float>);
    ask("clusters", ask_clusters);
    ask("registers", ask_registers);
    dprintf(1, "\"end\": {\"answer\": \"reached\", \"seen\": \"\"}\n}\n");
}
