// The launcher of `grouped`: its kernel arguments, made on the host.
#include <algorithm>

#include "kernels/common/dispatch.cuh"
#include "kernels/grouped/kernel.cuh"
#include "plan/plan.h"

namespace fused_cna::grouped {

namespace {

Args make_args(const ConvArgs& conv, const Plan& plan, const Layout& layout) {
    const ConvProblem& problem = conv.problem;
    const auto& choice = std::get<Choice>(plan.choice);
    const Tile& tile = tiles[choice.tile];
    const int64_t bytes = size_in_bytes(problem.dtype);
    const auto as_int = [](int64_t value) { return static_cast<int>(value); };
    const int threads = as_int(layout.warps * 32), slots = as_int(layout.slots), columns = as_int(layout.columns);
    const int weight_vector_bytes = as_int(plan.convert_weight ? problem.dense_vector_bytes() : problem.weight_vector_bytes);
    const bool channels_dense = conv.y_strides.c == 1;
    const int octets_of_columns = as_int(ceil_div(layout.columns, 8));
    const Shares output_shares =
        channels_dense ? Shares(threads, octets_of_columns, slots) : Shares(threads, slots, octets_of_columns);
    const int padding_words = std::max(as_int(8 - layout.tail_words), 1);
    const int64_t dense_s = problem.c_per_group(), dense_r = problem.s * dense_s;
    const bool s_dense = problem.s == 1 || conv.weight_strides.s == dense_s;
    const bool r_dense = problem.r == 1 || conv.weight_strides.r == dense_r;
    return {.conv = conv,
            .choice = choice,
            .x_n_bytes = conv.x_strides.n * bytes,
            .x_h_bytes = conv.x_strides.h * bytes,
            .x_w_bytes = conv.x_strides.w * bytes,
            .weight_k_bytes = conv.weight_strides.k * bytes,
            .weight_r_bytes = conv.weight_strides.r * bytes,
            .weight_s_bytes = conv.weight_strides.s * bytes,
            .h = as_int(problem.h),
            .w = as_int(problem.w),
            .p = as_int(problem.p()),
            .q = as_int(problem.q()),
            .stride_h = as_int(problem.stride_h),
            .stride_w = as_int(problem.stride_w),
            .pad_top = as_int(problem.pad_top),
            .pad_left = as_int(problem.pad_left),
            .dil_h = as_int(problem.dil_h),
            .dil_w = as_int(problem.dil_w),
            .groups = as_int(problem.groups),
            .k_per_group = as_int(problem.k_per_group()),
            .x_vector_bytes = plan.vector_bytes,
            .weight_vector_bytes = weight_vector_bytes,
            .taps_dense = s_dense && r_dense,
            .channels_dense = channels_dense,
            .halo_rows = as_int(layout.halo_rows),
            .halo_columns = as_int(layout.halo_columns),
            .row_positions = as_int(layout.row_positions),
            .phases = Divisor(layout.phases),
            .phase_columns = Divisor(layout.phase_columns),
            .tap_bytes = Divisor(layout.tap_bytes),
            .s = Divisor(problem.s),
            .octets_per_row = Divisor(layout.octets_per_row),
            .pixel_pitch = as_int(layout.pixel_pitch),
            .weight_bytes = as_int(layout.weight_bytes),
            .weight_pitch = as_int(layout.weight_pitch),
            .steps = as_int(layout.steps),
            .tail_words = as_int(layout.tail_words),
            .pieces = as_int((layout.steps + 1) * offsets_per_step(tile.reader)),
            .piece_bytes = as_int(32 / offsets_per_step(tile.reader)),
            .pixel_sets = Divisor(layout.pixel_sets),
            .units_per_group = Divisor(layout.units_per_group),
            .slots = slots,
            .threads = threads,
            .columns = columns,
            .staging_pitch = as_int(layout.staging_pitch),
            .slabs_per_group = Divisor(layout.slabs_per_group),
            .slabs = Divisor(layout.slabs),
            .tiles_p = Divisor(layout.tiles_p),
            .tiles_q = Divisor(layout.tiles_q),
            .weights_at = as_int(layout.weights_at),
            .offsets_at = as_int(layout.offsets_at),
            .columns_at = as_int(layout.columns_at),
            .places_at = as_int(layout.places_at),
            .folds_at = as_int(layout.folds_at),
            .halo_shares = {threads, as_int(layout.pixel_bytes / plan.vector_bytes), as_int(layout.row_positions)},
            .weight_shares = {threads, as_int(layout.weight_bytes / weight_vector_bytes), columns},
            .padding_shares = {threads, padding_words, columns},
            .output_shares = output_shares};
}

}  // namespace

const char* launch(const ConvArgs& conv, const Plan& plan, Stream stream) {
    const auto& choice = std::get<Choice>(plan.choice);
    const Layout layout = make_layout(conv.problem, tiles[choice.tile], choice);
    const device::LaunchShape shape{plan.blocks, static_cast<int>(layout.warps * 32), layout.shared_bytes};
    const Args args = make_args(conv, plan, layout);
    return with_dtype(conv.problem.dtype, [&]<class T>() {
        return with_tile<tiles>(choice.tile,
                                [&]<Tile tile>() { return device::launch<grouped<Traits<T, tile>>>(shape, stream, args); });
    });
}

}  // namespace fused_cna::grouped
