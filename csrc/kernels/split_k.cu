#include "split_k.cuh"

namespace fused_cna {

namespace {

template <class T>
const char* launch_dtype(const kernels::split_k::SplitKArgs& args, Stream stream) {
    using Tile = kernels::split_k::SplitKTile;
    const int64_t blocks = ceil_div(args.output.count, Tile::rows) * (args.columns / Tile::columns);
    const device::LaunchShape shape{blocks, Tile::threads, sizeof(kernels::split_k::SplitKShared<T>)};
    return device::launch<kernels::split_k::split_k<T>>(shape, stream, args);
}

}  // namespace

const char* launch_split_k(const ConvArgs& args, int split_k, int64_t rows, int64_t columns, int64_t columns_per_group,
                           Stream stream) {
    const ConvProblem& problem = args.problem;
    const kernels::OutputRows output(problem.n, problem.p(), problem.q());
    const kernels::split_k::SplitKArgs split_args{args, split_k, rows, columns, columns_per_group, output};
    switch (problem.dtype) {
        case DType::float32: return launch_dtype<float>(split_args, stream);
        case DType::float16: return launch_dtype<device::half>(split_args, stream);
        case DType::bfloat16: return launch_dtype<device::bfloat16>(split_args, stream);
    }
    return "split_k has no instantiation of this dtype";
}

}  // namespace fused_cna
