#include "depthwise.cuh"

namespace fused_cna {

namespace {

using kernels::depthwise::DepthwiseArgs;
using kernels::depthwise::DepthwiseTraits;

// The plan's tile counts in pixels and channels what the kernel counts in strips and chunks.
template <class Traits>
DepthwiseArgs make_depthwise_args(const ConvArgs& args, const Plan& plan) {
    const ConvProblem& problem = args.problem;
    const int64_t p = problem.p(), q = problem.q(), bands = depthwise_bands(p), band_rows = ceil_div(p, bands);
    const int64_t strips_per_row = ceil_div(q, depthwise_columns);
    const int strips = plan.tile.m / depthwise_columns, slabs = static_cast<int>(ceil_div(problem.k, plan.tile.n));
    return {.conv = args,
            .p = static_cast<int>(p),
            .q = static_cast<int>(q),
            .multiplier = static_cast<int>(problem.k_per_group()),
            .chunks = plan.tile.n / Traits::values,
            .strips = strips,
            .slabs = slabs,
            .strips_per_row = static_cast<int>(strips_per_row),
            .band_rows = static_cast<int>(band_rows),
            .bands = static_cast<int>(bands),
            .all_strips = static_cast<uint32_t>(problem.n * bands * band_rows * strips_per_row),
            .strip_step = static_cast<uint32_t>(plan.blocks / slabs * strips)};
}

template <class T, DepthwiseTile Tile, int AccessBytes>
const char* launch_tile(const ConvArgs& args, const Plan& plan, Stream stream) {
    using Traits = DepthwiseTraits<T, Tile, AccessBytes>;
    const device::LaunchShape shape{plan.blocks, Traits::threads, sizeof(kernels::depthwise::DepthwiseShared<Traits>)};
    return device::launch<kernels::depthwise::depthwise<Traits>>(shape, stream, make_depthwise_args<Traits>(args, plan));
}

template <class T, int Index>
const char* launch_access(const ConvArgs& args, const Plan& plan, Stream stream) {
    constexpr DepthwiseTile tile = depthwise_tiles[Index];
    if constexpr (tile.by_value) {
        return launch_tile<T, tile, 0>(args, plan, stream);
    } else {
        return plan.access_bytes == 16 ? launch_tile<T, tile, 16>(args, plan, stream)
                                       : launch_tile<T, tile, 4>(args, plan, stream);
    }
}

template <class T>
const char* launch_dtype(const ConvArgs& args, const Plan& plan, Stream stream) {
    switch (plan.tile_index) {
        case 0: return launch_access<T, 0>(args, plan, stream);
        case 1: return launch_access<T, 1>(args, plan, stream);
        case 2: return launch_access<T, 2>(args, plan, stream);
        case 3: return launch_access<T, 3>(args, plan, stream);
        case 4: return launch_access<T, 4>(args, plan, stream);
        case 5: return launch_access<T, 5>(args, plan, stream);
        case 6: return launch_access<T, 6>(args, plan, stream);
        case 7: return launch_access<T, 7>(args, plan, stream);
    }
    return "depthwise has no instantiation of this tile";
}

}  // namespace

const char* launch_depthwise(const ConvArgs& args, const Plan& plan, Stream stream) {
    switch (args.problem.dtype) {
        case DType::float32: return launch_dtype<float>(args, plan, stream);
        case DType::float16: return launch_dtype<device::half>(args, plan, stream);
        case DType::bfloat16: return launch_dtype<device::bfloat16>(args, plan, stream);
    }
    return "depthwise has no instantiation of this dtype";
}

}  // namespace fused_cna
