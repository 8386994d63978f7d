// The launcher of `stem`: its kernel arguments, made on the host.
#include "kernels/common/dispatch.cuh"
#include "kernels/stem/kernel.cuh"
#include "kernels/stem/layout.h"
#include "plan/plan.h"

namespace fused_cna::stem {

namespace {

// The widest loads that x allows. Units of 16 bytes need three channels, rows of whole units, and every row on 16 bytes.
Loads find_loads(const ConvArgs& conv, int64_t pixels_per_unit) {
    const ConvProblem& problem = conv.problem;
    const Strides& strides = conv.x_strides;
    const bool are_whole =
        problem.c == 3 && problem.w % pixels_per_unit == 0 && reinterpret_cast<uintptr_t>(conv.x) % 16 == 0 &&
        (problem.n == 1 || strides.n % pixels_per_unit == 0) && (problem.h == 1 || strides.h % pixels_per_unit == 0);
    if (are_whole && strides.w == 1 && strides.c % pixels_per_unit == 0) return Loads::planar;
    if (are_whole && strides.w == 3 && strides.c == 1) return Loads::dense;
    return Loads::single;
}

Args make_args(const ConvArgs& conv, const Plan& plan, const Layout& layout) {
    const ConvProblem& problem = conv.problem;
    const auto& choice = std::get<Choice>(plan.choice);
    const Tile& tile = tiles[choice.tile];
    const auto as_int = [](int64_t value) { return static_cast<int>(value); };
    const auto as_unsigned = [](int64_t value) { return static_cast<unsigned>(value); };
    const unsigned tiles_q = as_unsigned(ceil_div(problem.q(), choice.tile_q));
    const unsigned tiles_per_image = as_unsigned(ceil_div(problem.p(), choice.tile_p)) * tiles_q;
    const unsigned tiles_n = as_unsigned(ceil_div(problem.k, tile.n));
    return {.conv = conv,
            .loads = find_loads(conv, layout.pixels_per_unit),
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
            .tile_p = as_unsigned(choice.tile_p),
            .tile_q = as_unsigned(choice.tile_q),
            .tiles_q = tiles_q,
            .tiles_per_image = tiles_per_image,
            .tiles_n = tiles_n,
            .tiles = as_unsigned(problem.n) * tiles_per_image,
            .tile_step = as_unsigned(plan.blocks) / tiles_n,
            .filter_rows = as_unsigned(choice.filter_rows),
            .chunks = as_unsigned(layout.chunks),
            .pixel_pitch = as_unsigned(layout.pixel_pitch),
            .lead = as_unsigned(layout.lead),
            .words_per_row = as_unsigned(layout.words_per_row),
            .words = as_unsigned(layout.words),
            .weight_pitch = as_unsigned(layout.weight_pitch),
            .row_step = as_unsigned(layout.row_step),
            .window_rows = as_unsigned(layout.window_rows),
            .window_columns = as_unsigned(layout.window_columns),
            .rows_per_pixel = 1.0f / static_cast<float>(layout.window_columns)};
}

}  // namespace

const char* launch(const ConvArgs& conv, const Plan& plan, Stream stream) {
    const auto& choice = std::get<Choice>(plan.choice);
    const Layout layout = make_layout(conv.problem, tiles[choice.tile], choice);
    const Args args = make_args(conv, plan, layout);
    return with_dtype(conv.problem.dtype, [&]<class T>() {
        return with_tile<tiles>(choice.tile, [&]<Tile tile>() {
            const device::LaunchShape shape{plan.blocks, tile.threads(), layout.shared_bytes};
            return device::launch<stem<Traits<T, tile>>>(shape, stream, args);
        });
    });
}

}  // namespace fused_cna::stem
