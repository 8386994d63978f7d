#include "small_m.cuh"

namespace fused_cna {

namespace {

using kernels::small_m::SmallMTraits;

constexpr const char* no_instantiation = "small_m has no instantiation of this plan";

template <class Traits>
kernels::small_m::SmallMArgs make_args(const ConvArgs& conv, const Plan& plan) {
    const auto as_int = [](int64_t value) { return static_cast<int>(value); };
    const ConvProblem& problem = conv.problem;
    kernels::small_m::SmallMArgs args{.conv = conv};
    args.rows = as_int(problem.gemm_m());
    args.c_per_group = as_int(problem.c_per_group());
    args.k_per_group = as_int(problem.k_per_group());
    args.lanes = plan.lanes;
    args.columns = plan.tile.n;
    args.tiles_m = as_int(ceil_div(args.rows, Traits::rows));
    args.tiles_n_per_group = as_int(ceil_div(args.k_per_group, args.columns));
    args.chunks_per_tap = as_int(ceil_div(args.c_per_group, Traits::values));
    args.chunks = as_int(problem.r * problem.s) * args.chunks_per_tap;
    args.steps = as_int(ceil_div(args.chunks, plan.lanes * Traits::unroll));
    return args;
}

template <class Traits>
const char* launch_traits(const ConvArgs& conv, const Plan& plan, Stream stream) {
    const device::LaunchShape shape{plan.blocks, Traits::threads, sizeof(kernels::small_m::SmallMShared<Traits>)};
    return device::launch<kernels::small_m::small_m<Traits>>(shape, stream, make_args<Traits>(conv, plan));
}

// Filters of one tap with accesses of 16 bytes are nearly all layers; one version with coordinates serves the others, for
// every width of access.
template <class T, SmallMTile tile>
const char* launch_tile(const ConvArgs& conv, const Plan& plan, Stream stream) {
    const int access = plan.access_bytes;
    if (plan.rows == Rows::pointwise) return launch_traits<SmallMTraits<T, tile, 16, true>>(conv, plan, stream);
    if (access == 16) return launch_traits<SmallMTraits<T, tile, 16, false>>(conv, plan, stream);
    if (access == 8) return launch_traits<SmallMTraits<T, tile, 8, false>>(conv, plan, stream);
    if (access == 4) return launch_traits<SmallMTraits<T, tile, 4, false>>(conv, plan, stream);
    if constexpr (sizeof(T) == 2) return launch_traits<SmallMTraits<T, tile, 2, false>>(conv, plan, stream);
    return no_instantiation;
}

template <class T>
const char* launch_dtype(const ConvArgs& conv, const Plan& plan, Stream stream) {
    if (plan.tile_index == 0) return launch_tile<T, small_m_tiles[0]>(conv, plan, stream);
    if (plan.tile_index == 1) return launch_tile<T, small_m_tiles[1]>(conv, plan, stream);
    if (plan.tile_index == 2) return launch_tile<T, small_m_tiles[2]>(conv, plan, stream);
    return no_instantiation;
}

}  // namespace

const char* launch_small_m(const ConvArgs& args, const Plan& plan, Stream stream) {
    switch (args.problem.dtype) {
        case DType::float32: return launch_dtype<float>(args, plan, stream);
        case DType::float16: return launch_dtype<device::half>(args, plan, stream);
        case DType::bfloat16: return launch_dtype<device::bfloat16>(args, plan, stream);
    }
    return no_instantiation;
}

}  // namespace fused_cna
