// The launcher of split_k.
#include "kernels/common/dispatch.cuh"
#include "kernels/implicit_gemm/split_k.cuh"
#include "kernels/implicit_gemm/split_k.h"

namespace fused_cna::implicit_gemm {

const char* launch_split_k(const ConvArgs& args, int split_k, int64_t rows, int64_t columns, int64_t columns_per_group,
                           Stream stream) {
    const ConvProblem& problem = args.problem;
    const OutputRows output(problem.n, problem.p(), problem.q());
    const SplitKArgs split_args{args, split_k, rows, columns, columns_per_group, output};
    const int64_t blocks = ceil_div(output.count, SplitKTile::rows) * (columns / SplitKTile::columns);
    return with_dtype(problem.dtype, [&]<class T>() {
        const device::LaunchShape shape{blocks, SplitKTile::threads, sizeof(SplitKShared<T>)};
        return device::launch<fused_cna::implicit_gemm::split_k<T>>(shape, stream, split_args);
    });
}

}  // namespace fused_cna::implicit_gemm
