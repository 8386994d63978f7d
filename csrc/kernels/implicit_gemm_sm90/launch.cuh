// Host side of the Hopper kernel: launches the instantiation that the plan names. Included once per dtype.
#pragma once

#include "kernels/common/dispatch.cuh"
#include "kernels/common/gather_args.cuh"
#include "kernels/implicit_gemm_sm90/hardware.h"
#include "kernels/implicit_gemm_sm90/kernel.cuh"
#include "kernels/implicit_gemm_sm90/maps.cuh"
#include "plan/layout.h"
#include "plan/plan.h"

namespace fused_cna::implicit_gemm_sm90 {

// Width of a band, in tiles: all columns where they are few, else about what makes a wave of blocks square.
inline int band_of(int tiles_n) {
    constexpr int most = 16, wanted = 12;
    return tiles_n <= most ? tiles_n : static_cast<int>(ceil_div(tiles_n, ceil_div(tiles_n, wanted)));
}

template <class Traits>
Args make_args(const ConvArgs& given, const Plan& plan) {
    const Choice& choice = std::get<Choice>(plan.choice);
    Args args{};
    static_cast<gather::Args&>(args) = gather::make_args<Traits>(given, pixel_step(given).value_or(0));
    const ConvProblem& problem = args.conv.problem;
    args.tiles_per_group = Divisor(ceil_div(args.k_per_group, Traits::n));
    const int tiles_n = args.tiles_per_group.value * static_cast<int>(problem.groups);
    const int tiles_m = static_cast<int>(ceil_div(problem.gemm_m(), Traits::m));
    const int band = band_of(tiles_n);
    args.tiles = tiles_m * tiles_n;
    args.bands = static_cast<int>(ceil_div(tiles_n, band));
    args.band = Divisor(band);
    args.last_band = Divisor(tiles_n - (args.bands - 1) * band);
    args.band_tiles = Divisor(band * tiles_m);
    args.split = Divisor(choice.split_k);
    args.tile_step = static_cast<int>(plan.blocks / choice.split_k);
    args.steps_per_split = static_cast<int>(ceil_div(args.steps, choice.split_k));

    // An operand without a map is copied without one.
    const MapTile tile{Traits::m, Traits::n, Traits::rows, Tile::slice};
    args.x_is_tiled = choice.fetch == Fetch::tiled;
    args.weight_by_map =
        maps_bring_operands && Traits::vector_bytes == 16 && find_map(weight_geometry(args.conv, tile), args.weight_map);
    args.x_by_map = args.weight_by_map && choice.fetch != Fetch::gather &&
                    find_map(x_geometry(args.conv, args.x_is_tiled, tile), args.x_map);
    args.y_by_map = find_map(output_geometry(args.conv, args.conv.y, args.conv.y_strides, tile), args.y_map);
    args.residual_by_map =
        args.conv.residual &&
        find_map(output_geometry(args.conv, args.conv.residual, args.conv.residual_strides, tile), args.residual_map);
    return args;
}

template <class Traits, template <int> class Rows>
const char* launch_kernel(const ConvArgs& conv, const Plan& plan, Stream stream) {
    using T = typename Traits::Value;
    static_assert(sizeof(Shared<Traits>) == Traits::tile.shared_bytes(sizeof(T)),
                  "the plan's shared memory must be the kernel's");
    const Args args = make_args<Traits>(conv, plan);
    if constexpr (!Traits::tile.gathers()) {
        if (!args.x_by_map) {
            Plan gathering = plan;  // its tiles are smaller, so the blocks have enough of them
            gathering.choice = Choice{.tile = gathering_tile, .fetch = Fetch::gather};
            return launch_kernel<implicit_gemm_sm90::Traits<T, tiles[gathering_tile], 16>, Rows>(conv, gathering, stream);
        }
    }
    const int split = args.split.value;
    if (split > 1 && (Traits::is_pingpong || plan.blocks != int64_t{args.tiles} * split)) {
        return "blocks of a cluster share one tile each";
    }
    const device::LaunchShape shape{plan.blocks, Traits::block_threads, sizeof(Shared<Traits>), split};
    return device::launch<implicit_gemm_sm90<Traits, Rows>>(shape, stream, args);
}

// The instantiations: those that plan.cpp allows.
template <class T, Tile tile>
const char* launch_tile(const ConvArgs& conv, const Plan& plan, Stream stream) {
    if constexpr (tile.takes(sizeof(T))) {
        const bool any_filter = std::get<Choice>(plan.choice).takes_any_filter;
        if (plan.vector_bytes == 16 && !any_filter) {
            return launch_kernel<Traits<T, tile, 16>, gather::MaskedRows>(conv, plan, stream);
        }
        if constexpr (tile.takes_narrow_vectors) {
            using Half = Traits<T, tile, 8>;
            using Quarter = Traits<T, tile, 4>;
            if (!any_filter && plan.vector_bytes == 8) return launch_kernel<Half, gather::MaskedRows>(conv, plan, stream);
            if (!any_filter && plan.vector_bytes == 4) return launch_kernel<Quarter, gather::MaskedRows>(conv, plan, stream);
            if constexpr (tile.takes_any_filter) {
                // Memory that allows wide loads allows narrow ones too, so one version serves all.
                if (any_filter) return launch_kernel<Quarter, gather::PlainRows>(conv, plan, stream);
            }
        }
    }
    return no_instantiation;
}

template <class T>
const char* launch_tiles(const ConvArgs& conv, const Plan& plan, Stream stream) {
    return with_tile<tiles>(std::get<Choice>(plan.choice).tile,
                            [&]<Tile tile>() { return launch_tile<T, tile>(conv, plan, stream); });
}

}  // namespace fused_cna::implicit_gemm_sm90
