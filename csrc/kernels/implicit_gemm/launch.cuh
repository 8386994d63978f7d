// Host side of the implicit GEMM: launches the instantiation that the plan names. Included once per dtype and arithmetic.
#pragma once

#include "kernels/common/dispatch.cuh"
#include "kernels/common/gather_args.cuh"
#include "kernels/implicit_gemm/kernel.cuh"
#include "kernels/implicit_gemm/split_k.h"
#include "plan/layout.h"
#include "plan/plan.h"

namespace fused_cna::implicit_gemm {

template <class Traits>
Args make_args(const ConvArgs& given, const Plan& plan) {
    Args args{gather::make_args<Traits>(given, pixel_step(given).value_or(0)), {}, {}, {}, 0};
    const ConvProblem& problem = args.conv.problem;
    args.tiles_per_group = Divisor(ceil_div(args.k_per_group, Traits::n));
    args.tiles_n = Divisor(args.tiles_per_group.value * problem.groups);
    args.tiles_m = Divisor(ceil_div(problem.gemm_m(), Traits::m));
    args.steps_per_split = static_cast<int>(ceil_div(args.steps, std::get<Choice>(plan.choice).split_k));
    return args;
}

template <class Traits, template <int> class Rows>
const char* launch_kernel(const ConvArgs& conv, const Plan& plan, Stream stream) {
    static_assert(sizeof(Shared<Traits>) <= Traits::tile.shared_bytes() + 128,
                  "the plan's shared memory must be the kernel's");
    const Args args = make_args<Traits>(conv, plan);
    const device::LaunchShape shape{plan.blocks, Traits::threads, sizeof(Shared<Traits>)};
    if (const char* error = device::launch<implicit_gemm<Traits, Rows>>(shape, stream, args)) return error;
    const int split_k = std::get<Choice>(plan.choice).split_k;
    if (split_k == 1) return nullptr;
    return launch_split_k(conv, split_k, int64_t{args.tiles_m.value} * Traits::m, int64_t{args.tiles_n.value} * Traits::n,
                          int64_t{args.tiles_per_group.value} * Traits::n, stream);
}

// The instantiations: those that supported_addressing in plan.cpp allows.
template <class T, class Arithmetic, Tile tile>
const char* launch_tile(const ConvArgs& conv, const Plan& plan, Stream stream) {
    const Addressing addressing = std::get<Choice>(plan.choice).addressing;
    using Wide = Traits<T, tile, 16, Arithmetic>;
    if (plan.vector_bytes == 16) {
        if (addressing == Addressing::pointwise) return launch_kernel<Wide, gather::PointwiseRows>(conv, plan, stream);
        if (addressing == Addressing::masked) return launch_kernel<Wide, gather::MaskedRows>(conv, plan, stream);
    }
    if constexpr (tile.takes_narrow_vectors) {
        using Half = Traits<T, tile, 8, Arithmetic>;
        using Quarter = Traits<T, tile, 4, Arithmetic>;
        const bool is_masked = addressing == Addressing::masked;
        if (is_masked && plan.vector_bytes == 8) return launch_kernel<Half, gather::MaskedRows>(conv, plan, stream);
        if (is_masked && plan.vector_bytes == 4) return launch_kernel<Quarter, gather::MaskedRows>(conv, plan, stream);
        if constexpr (tile.takes_any_filter) {
            // Memory that allows wide loads allows narrow ones too, so one version serves all.
            if (addressing == Addressing::plain) return launch_kernel<Quarter, gather::PlainRows>(conv, plan, stream);
        }
    }
    return no_instantiation;
}

// tiles: the array in tile.h that the plan's choice indexes.
template <class T, class Arithmetic, const auto& tiles>
const char* launch_tiles(const ConvArgs& conv, const Plan& plan, Stream stream) {
    return with_tile<tiles>(std::get<Choice>(plan.choice).tile,
                            [&]<Tile tile>() { return launch_tile<T, Arithmetic, tile>(conv, plan, stream); });
}

}  // namespace fused_cna::implicit_gemm
