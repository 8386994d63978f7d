#include "stem.cuh"

#include <utility>

#include "../stem_geometry.h"

namespace fused_cna {

namespace {

using kernels::stem::StemArgs;
using kernels::stem::StemLoads;

// The widest loads that x allows: units of 16 bytes want three channels, rows of whole units, and every start on 16 bytes.
StemLoads find_loads(const ConvArgs& conv, int64_t pixels_per_unit) {
    const ConvProblem& problem = conv.problem;
    const Strides& strides = conv.x_strides;
    const bool are_whole =
        problem.c == 3 && problem.w % pixels_per_unit == 0 && reinterpret_cast<uintptr_t>(conv.x) % 16 == 0 &&
        (problem.n == 1 || strides.n % pixels_per_unit == 0) && (problem.h == 1 || strides.h % pixels_per_unit == 0);
    if (are_whole && strides.w == 1 && strides.c % pixels_per_unit == 0) return StemLoads::planar;
    if (are_whole && strides.w == 3 && strides.c == 1) return StemLoads::dense;
    return StemLoads::single;
}

StemArgs make_stem_args(const ConvArgs& conv, const Plan& plan) {
    const ConvProblem& problem = conv.problem;
    const StemTile& tile = stem_tiles[plan.tile_index];
    const StemGeometry geometry = stem_geometry(problem, tile, {plan.tile_p, plan.tile_q, plan.filter_rows});
    const auto as_int = [](int64_t value) { return static_cast<int>(value); };
    const auto as_unsigned = [](int64_t value) { return static_cast<unsigned>(value); };
    const unsigned tiles_q = as_unsigned(ceil_div(problem.q(), plan.tile_q));
    const unsigned tiles_per_image = as_unsigned(ceil_div(problem.p(), plan.tile_p)) * tiles_q;
    const unsigned tiles_n = as_unsigned(ceil_div(problem.k, tile.n));
    return {.conv = conv,
            .loads = find_loads(conv, geometry.pixels_per_unit),
            .h = as_unsigned(problem.h),
            .w = as_unsigned(problem.w),
            .c = as_unsigned(problem.c),
            .r = as_unsigned(problem.r),
            .s = as_unsigned(problem.s),
            .dil_h = as_unsigned(problem.dil_h),
            .dil_w = as_unsigned(problem.dil_w),
            .stride_h = as_int(problem.stride_h),
            .stride_w = as_int(problem.stride_w),
            .pad_top = as_int(problem.pad_top),
            .pad_left = as_int(problem.pad_left),
            .p = as_int(problem.p()),
            .q = as_int(problem.q()),
            .k = as_int(problem.k),
            .tile_p = as_unsigned(plan.tile_p),
            .tile_q = as_unsigned(plan.tile_q),
            .tiles_q = tiles_q,
            .tiles_per_image = tiles_per_image,
            .tiles_n = tiles_n,
            .tiles = as_unsigned(problem.n) * tiles_per_image,
            .tile_step = as_unsigned(plan.blocks) / tiles_n,
            .filter_rows = as_unsigned(plan.filter_rows),
            .chunks = as_unsigned(geometry.chunks),
            .pixel_pitch = as_unsigned(geometry.pixel_pitch),
            .lead = as_unsigned(geometry.lead),
            .words_per_row = as_unsigned(geometry.words_per_row),
            .words = as_unsigned(geometry.words),
            .weight_pitch = as_unsigned(geometry.weight_pitch),
            .row_step = as_unsigned(geometry.row_step),
            .window_rows = as_unsigned(geometry.window_rows),
            .window_columns = as_unsigned(geometry.window_columns),
            .rows_per_pixel = 1.0f / static_cast<float>(geometry.window_columns)};
}

template <class T, StemTile tile>
const char* launch_tile(const ConvArgs& conv, const Plan& plan, Stream stream) {
    const int64_t shared_bytes =
        stem_geometry(conv.problem, tile, {plan.tile_p, plan.tile_q, plan.filter_rows}).shared_bytes;
    const device::LaunchShape shape{plan.blocks, tile.threads(), shared_bytes};
    return device::launch<kernels::stem::stem<kernels::stem::StemTraits<T, tile>>>(shape, stream,
                                                                                   make_stem_args(conv, plan));
}

template <class T>
const char* launch_dtype(const ConvArgs& conv, const Plan& plan, Stream stream) {
    const auto launch_index = [&]<size_t... I>(std::index_sequence<I...>) {
        const char* error = "stem has no instantiation of this tile";
        ((plan.tile_index == static_cast<int>(I) && (error = launch_tile<T, stem_tiles[I]>(conv, plan, stream), true)) ||
         ...);
        return error;
    };
    return launch_index(std::make_index_sequence<stem_tiles.size()>{});
}

}  // namespace

const char* launch_stem(const ConvArgs& args, const Plan& plan, Stream stream) {
    switch (args.problem.dtype) {
        case DType::float32: return launch_dtype<float>(args, plan, stream);
        case DType::float16: return launch_dtype<device::half>(args, plan, stream);
        case DType::bfloat16: return launch_dtype<device::bfloat16>(args, plan, stream);
    }
    return "stem has no instantiation of this dtype";
}

}  // namespace fused_cna
