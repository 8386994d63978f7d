// The launcher of `direct`.
#include "kernels/common/dispatch.cuh"
#include "kernels/direct/kernel.cuh"
#include "plan/plan.h"

namespace fused_cna::direct {

const char* launch(const ConvArgs& args, const Plan& plan, Stream stream) {
    return with_dtype(args.problem.dtype, [&]<class T>() {
        return with_tile<tiles>(std::get<Choice>(plan.choice).tile, [&]<BlockTile tile>() {
            const device::LaunchShape shape{plan.blocks, threads, sizeof(Shared<T, Traits<tile>>)};
            return device::launch<direct<T, Traits<tile>>>(shape, stream, args);
        });
    });
}

}  // namespace fused_cna::direct
