// The launcher of `depthwise_toeplitz`: its kernel arguments, made on the host.
#include "kernels/common/dispatch.cuh"
#include "kernels/depthwise_toeplitz/kernel.cuh"
#include "plan/plan.h"

namespace fused_cna::depthwise_toeplitz {

namespace {

Args make_args(const ConvArgs& conv, const Plan& plan, int filter_rows) {
    const auto as_int = [](int64_t value) { return static_cast<int>(value); };
    const ConvProblem& problem = conv.problem;
    const auto& tile = std::get<Choice>(plan.choice);
    return {.conv = conv,
            .tile = tile,
            .layout = Layout::of(tile, filter_rows),
            .output = {as_int(problem.n), as_int(problem.p()), as_int(problem.q())},
            .slabs = as_int(ceil_div(problem.c, slab_channels)),
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
            .wide_loads = plan.vector_bytes == 16};
}

template <class T, int FilterRows>
const char* launch_pass(const ConvArgs& conv, const Plan& plan, Stream stream) {
    const int filter_rows = static_cast<int>(ceil_div(conv.problem.r, FilterRows)) * FilterRows;
    const Args args = make_args(conv, plan, filter_rows);
    const device::LaunchShape shape{plan.blocks, threads, args.layout.shared_bytes};
    return device::launch<depthwise_toeplitz<T, FilterRows>>(shape, stream, args);
}

}  // namespace

const char* launch(const ConvArgs& args, const Plan& plan, Stream stream) {
    return with_dtype(args.problem.dtype, [&]<class T>() {
        if constexpr (sizeof(T) == 4) {
            return no_instantiation;
        } else if (std::get<Choice>(plan.choice).pass == 0) {
            return launch_pass<T, filter_rows_of_pass[0]>(args, plan, stream);
        } else {
            return launch_pass<T, filter_rows_of_pass[1]>(args, plan, stream);
        }
    });
}

}  // namespace fused_cna::depthwise_toeplitz
