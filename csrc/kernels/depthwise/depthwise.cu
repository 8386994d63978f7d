// The launcher of `depthwise`: its kernel arguments, made on the host.
#include "kernels/common/dispatch.cuh"
#include "kernels/depthwise/kernel.cuh"
#include "plan/plan.h"

namespace fused_cna::depthwise {

namespace {

// The plan's tile is in pixels and channels, the kernel's counts in strips and chunks.
template <class Traits>
Args make_args(const ConvArgs& args, const Plan& plan) {
    const ConvProblem& problem = args.problem;
    const int64_t p = problem.p(), q = problem.q(), bands = bands_of(p), band_rows = ceil_div(p, bands);
    const int64_t strips_per_row = ceil_div(q, strip_columns);
    const int strips = plan.tile.m / strip_columns, slabs = static_cast<int>(ceil_div(problem.k, plan.tile.n));
    return {.conv = args,
            .p = static_cast<int>(p),
            .q = static_cast<int>(q),
            .multiplier = static_cast<int>(problem.k_per_group()),
            .chunks = Divisor(plan.tile.n / Traits::values),
            .strips = strips,
            .slabs = Divisor(slabs),
            .strips_per_row = Divisor(strips_per_row),
            .band_rows = Divisor(band_rows),
            .bands = Divisor(bands),
            .all_strips = static_cast<int>(problem.n * bands * band_rows * strips_per_row),
            .strip_step = static_cast<int>(plan.blocks / slabs * strips)};
}

template <class Traits>
const char* launch_traits(const ConvArgs& args, const Plan& plan, Stream stream) {
    const device::LaunchShape shape{plan.blocks, threads, sizeof(Shared<Traits>)};
    return device::launch<depthwise<Traits>>(shape, stream, make_args<Traits>(args, plan));
}

}  // namespace

const char* launch(const ConvArgs& args, const Plan& plan, Stream stream) {
    return with_dtype(args.problem.dtype, [&]<class T>() {
        return with_tile<tiles>(std::get<Choice>(plan.choice).tile, [&]<Tile tile>() {
            if constexpr (tile.by_value) {
                return launch_traits<Traits<T, tile, 0>>(args, plan, stream);
            } else {
                return plan.vector_bytes == 16 ? launch_traits<Traits<T, tile, 16>>(args, plan, stream)
                                               : launch_traits<Traits<T, tile, 4>>(args, plan, stream);
            }
        });
    });
}

}  // namespace fused_cna::depthwise
