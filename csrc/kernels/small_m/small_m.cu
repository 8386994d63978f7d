// The launcher of `small_m`: its kernel arguments, made on the host.
#include "kernels/common/dispatch.cuh"
#include "kernels/small_m/kernel.cuh"
#include "plan/plan.h"

namespace fused_cna::small_m {

namespace {

template <class Traits>
Args make_args(const ConvArgs& conv, const Plan& plan) {
    const auto as_int = [](int64_t value) { return static_cast<int>(value); };
    const ConvProblem& problem = conv.problem;
    Args args{.conv = conv, .output = {problem.n, problem.p(), problem.q()}};
    args.c_per_group = as_int(problem.c_per_group());
    args.k_per_group = as_int(problem.k_per_group());
    args.lanes = Divisor(std::get<Choice>(plan.choice).lanes);
    args.teams = Traits::threads / args.lanes.value;
    args.columns = Divisor(plan.tile.n);
    args.tiles_m = Divisor(ceil_div(args.output.count, Traits::rows));
    args.tiles_n_per_group = Divisor(ceil_div(args.k_per_group, args.columns.value));
    args.chunks_per_tap = Divisor(ceil_div(args.c_per_group, Traits::values));
    args.s = Divisor(problem.s);
    args.chunks = as_int(problem.r * problem.s) * args.chunks_per_tap.value;
    args.steps = as_int(ceil_div(args.chunks, args.lanes.value * Traits::unroll));
    return args;
}

// Nearly all layers have one tap and 16-byte loads; for the others one version with coordinates serves every load width.
template <class T, Tile tile>
const char* launch_tile(const ConvArgs& conv, const Plan& plan, Stream stream) {
    const auto launch = [&]<int vector_bytes, bool is_pointwise>() {
        using Traits = Traits<T, tile, vector_bytes, is_pointwise>;
        const device::LaunchShape shape{plan.blocks, Traits::threads, sizeof(Shared<Traits>)};
        return device::launch<small_m<Traits>>(shape, stream, make_args<Traits>(conv, plan));
    };
    if (std::get<Choice>(plan.choice).is_pointwise) return launch.template operator()<16, true>();
    switch (plan.vector_bytes) {
        case 16: return launch.template operator()<16, false>();
        case 8: return launch.template operator()<8, false>();
        case 4: return launch.template operator()<4, false>();
    }
    if constexpr (sizeof(T) == 2) return launch.template operator()<2, false>();
    return no_instantiation;
}

}  // namespace

const char* launch(const ConvArgs& args, const Plan& plan, Stream stream) {
    return with_dtype(args.problem.dtype, [&]<class T>() {
        return with_tile<tiles>(std::get<Choice>(plan.choice).tile,
                                [&]<Tile tile>() { return launch_tile<T, tile>(args, plan, stream); });
    });
}

}  // namespace fused_cna::small_m
