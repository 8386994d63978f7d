#include "grouped.cuh"

#include <algorithm>
#include <utility>

namespace fused_cna {

namespace {

using kernels::grouped::GroupedArgs;
using kernels::grouped::Shares;

GroupedArgs make_args(const ConvArgs& conv, const Plan& plan) {
    const ConvProblem& problem = conv.problem;
    const GroupedTile& tile = grouped_tiles[plan.tile_index];
    const GroupedShape shape = grouped_shape(problem, tile, plan.grouped);
    const int64_t bytes = size_in_bytes(problem.dtype);
    const auto as_int = [](int64_t value) { return static_cast<int>(value); };
    const auto as_divisor = [](int64_t value) { return Divisor(static_cast<int>(value)); };
    const int threads = as_int(shape.warps * 32), slots = as_int(shape.slots), columns = as_int(shape.columns);
    const int weight_access = as_int(plan.convert_weight ? problem.dense_access() : problem.weight_access);
    const bool channels_dense = conv.y_strides.c == 1;
    const int octets_of_columns = as_int(ceil_div(shape.columns, 8));
    const Shares output_shares =
        channels_dense ? Shares(threads, octets_of_columns, slots) : Shares(threads, slots, octets_of_columns);
    const int padding_words = std::max(as_int(8 - shape.tail_words), 1);
    const int64_t dense_s = problem.c_per_group(), dense_r = problem.s * dense_s;
    const bool s_dense = problem.s == 1 || conv.weight_strides.s == dense_s;
    const bool r_dense = problem.r == 1 || conv.weight_strides.r == dense_r;
    return {.conv = conv,
            .part = plan.grouped,
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
            .x_access = plan.access_bytes,
            .weight_access = weight_access,
            .taps_dense = s_dense && r_dense,
            .channels_dense = channels_dense,
            .halo_rows = as_int(shape.halo_rows),
            .halo_columns = as_int(shape.halo_columns),
            .row_positions = as_int(shape.row_positions),
            .phases = as_divisor(shape.phases),
            .phase_columns = as_divisor(shape.phase_columns),
            .tap_bytes = as_divisor(shape.tap_bytes),
            .s = as_divisor(problem.s),
            .octets_per_row = as_divisor(shape.octets_per_row),
            .pixel_pitch = as_int(shape.pixel_pitch),
            .weight_bytes = as_int(shape.weight_bytes),
            .weight_pitch = as_int(shape.weight_pitch),
            .steps = as_int(shape.steps),
            .tail_words = as_int(shape.tail_words),
            .pieces = as_int((shape.steps + 1) * offsets_per_step(tile.reader)),
            .piece_bytes = as_int(32 / offsets_per_step(tile.reader)),
            .pixel_sets = as_divisor(shape.pixel_sets),
            .units_per_group = as_divisor(shape.units_per_group),
            .slots = slots,
            .threads = threads,
            .columns = columns,
            .staging_pitch = as_int(shape.staging_pitch),
            .slabs_per_group = as_divisor(shape.slabs_per_group),
            .slabs = as_divisor(shape.slabs),
            .tiles_p = as_divisor(shape.tiles_p),
            .tiles_q = as_divisor(shape.tiles_q),
            .weights_at = as_int(shape.weights_at),
            .offsets_at = as_int(shape.offsets_at),
            .columns_at = as_int(shape.columns_at),
            .places_at = as_int(shape.places_at),
            .folds_at = as_int(shape.folds_at),
            .halo_shares = {threads, as_int(shape.pixel_bytes / plan.access_bytes), as_int(shape.row_positions)},
            .weight_shares = {threads, as_int(shape.weight_bytes / weight_access), columns},
            .padding_shares = {threads, padding_words, columns},
            .output_shares = output_shares};
}

template <class T>
const char* launch_dtype(const ConvArgs& conv, const Plan& plan, Stream stream) {
    const GroupedShape shape = grouped_shape(conv.problem, grouped_tiles[plan.tile_index], plan.grouped);
    const device::LaunchShape launch_shape{plan.blocks, static_cast<int>(shape.warps * 32), shape.shared_bytes};
    const GroupedArgs args = make_args(conv, plan);
    const char* error = "grouped has no instantiation of this tile";
    const auto launch_index = [&]<size_t... I>(std::index_sequence<I...>) {
        ((plan.tile_index == static_cast<int>(I) &&
          (error = device::launch<kernels::grouped::grouped<kernels::grouped::GroupedTraits<T, grouped_tiles[I]>>>(
               launch_shape, stream, args),
           true)) ||
         ...);
    };
    launch_index(std::make_index_sequence<grouped_tiles.size()>{});
    return error;
}

}  // namespace

const char* launch_grouped(const ConvArgs& args, const Plan& plan, Stream stream) {
    switch (args.problem.dtype) {
        case DType::float32: return launch_dtype<float>(args, plan, stream);
        case DType::float16: return launch_dtype<device::half>(args, plan, stream);
        case DType::bfloat16: return launch_dtype<device::bfloat16>(args, plan, stream);
    }
    return "grouped has no instantiation of this dtype";
}

}  // namespace fused_cna
