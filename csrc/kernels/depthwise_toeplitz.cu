#include "depthwise_toeplitz.cuh"

namespace fused_cna {

namespace {

using kernels::depthwise_toeplitz::ToeplitzArgs;

ToeplitzArgs make_toeplitz_args(const ConvArgs& conv, const Plan& plan, int filter_rows) {
    const auto as_int = [](int64_t value) { return static_cast<int>(value); };
    const ConvProblem& problem = conv.problem;
    const StripTile& tile = plan.strips;
    return {.conv = conv,
            .tile = tile,
            .planes = StripPlanes::of(tile, filter_rows),
            .memory = StripMemory::of(tile, filter_rows),
            .output = {as_int(problem.n), as_int(problem.p()), as_int(problem.q())},
            .slabs = as_int(ceil_div(problem.c, StripTile::channels)),
            .tiles_p = as_int(ceil_div(problem.p(), tile.rows())),
            .tiles_q = as_int(ceil_div(problem.q(), tile.columns())),
            .c = as_int(problem.c),
            .h = as_int(problem.h),
            .w = as_int(problem.w),
            .r = as_int(problem.r),
            .s = as_int(problem.s),
            .pad_top = as_int(problem.pad_top),
            .pad_left = as_int(problem.pad_left),
            .filter_rows = filter_rows,
            .wide_loads = plan.access_bytes == 16};
}

template <class T, int FilterRows>
const char* launch_rows(const ConvArgs& conv, const Plan& plan, Stream stream) {
    const int filter_rows = static_cast<int>(ceil_div(conv.problem.r, FilterRows)) * FilterRows;
    const ToeplitzArgs args = make_toeplitz_args(conv, plan, filter_rows);
    const device::LaunchShape shape{plan.blocks, kernels::depthwise_toeplitz::toeplitz_threads, args.memory.total};
    return device::launch<kernels::depthwise_toeplitz::depthwise_toeplitz<T, FilterRows>>(shape, stream, args);
}

template <class T>
const char* launch_dtype(const ConvArgs& conv, const Plan& plan, Stream stream) {
    if (plan.tile_index == 0) return launch_rows<T, toeplitz_filter_rows[0]>(conv, plan, stream);
    return launch_rows<T, toeplitz_filter_rows[1]>(conv, plan, stream);
}

}  // namespace

const char* launch_depthwise_toeplitz(const ConvArgs& args, const Plan& plan, Stream stream) {
    switch (args.problem.dtype) {
        case DType::float16: return launch_dtype<device::half>(args, plan, stream);
        case DType::bfloat16: return launch_dtype<device::bfloat16>(args, plan, stream);
        case DType::float32: break;
    }
    return "depthwise_toeplitz has no instantiation of this dtype";
}

}  // namespace fused_cna
