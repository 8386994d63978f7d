#include "split_k.cuh"

namespace fused_cna {

const char* launch_split_k(const ConvArgs& args, int split_k, int64_t rows, int64_t columns, int64_t columns_per_group,
                           Stream stream) {
    using Tile = kernels::split_k::SplitKTile;
    const kernels::split_k::SplitKArgs split_args{args, split_k, rows, columns, columns_per_group};
    const device::LaunchShape shape{ceil_div(args.problem.gemm_m(), Tile::rows) * (columns / Tile::columns), Tile::threads,
                                    sizeof(kernels::split_k::SplitKShared)};
    switch (args.problem.dtype) {
        case DType::float32: return device::launch<kernels::split_k::split_k<float>>(shape, stream, split_args);
        case DType::float16: return device::launch<kernels::split_k::split_k<device::half>>(shape, stream, split_args);
        case DType::bfloat16: return device::launch<kernels::split_k::split_k<device::bfloat16>>(shape, stream, split_args);
    }
    return "split_k has no instantiation of this dtype";
}

}  // namespace fused_cna
