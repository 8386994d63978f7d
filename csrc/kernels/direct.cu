#include "direct.cuh"

namespace fused_cna {

namespace {

using kernels::direct::DirectTile;

template <class T, class Traits>
const char* launch_tile(const ConvArgs& args, const Plan& plan, Stream stream) {
    const device::LaunchShape shape{plan.blocks, Traits::threads, sizeof(kernels::direct::DirectShared<T, Traits>)};
    return device::launch<kernels::direct::direct<T, Traits>>(shape, stream, args);
}

template <class T>
const char* launch_dtype(const ConvArgs& args, const Plan& plan, Stream stream) {
    if (plan.tile_index == 0) return launch_tile<T, DirectTile<direct_tiles[0], 4, 4>>(args, plan, stream);
    if (plan.tile_index == 1) return launch_tile<T, DirectTile<direct_tiles[1], 4, 1>>(args, plan, stream);
    if (plan.tile_index == 2) return launch_tile<T, DirectTile<direct_tiles[2], 1, 1>>(args, plan, stream);
    return "direct has no instantiation of this tile";
}

}  // namespace

const char* launch_direct(const ConvArgs& args, const Plan& plan, Stream stream) {
    switch (args.problem.dtype) {
        case DType::float32: return launch_dtype<float>(args, plan, stream);
        case DType::float16: return launch_dtype<device::half>(args, plan, stream);
        case DType::bfloat16: return launch_dtype<device::bfloat16>(args, plan, stream);
    }
    return "direct has no instantiation of this dtype";
}

}  // namespace fused_cna
