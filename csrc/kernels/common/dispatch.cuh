// From run-time values to template arguments: the switches that every launcher needs. Host only.
#pragma once

#include <utility>

#include <device/device.cuh>

#include "problem.h"

namespace fused_cna {

inline constexpr const char* no_instantiation = "the kernel has no instantiation of this plan";

// Calls launch.template operator()<T>() with the storage type of the dtype.
template <class Launch>
const char* with_dtype(DType dtype, const Launch& launch) {
    switch (dtype) {
        case DType::float32: return launch.template operator()<float>();
        case DType::float16: return launch.template operator()<device::half>();
        case DType::bfloat16: return launch.template operator()<device::bfloat16>();
    }
    return no_instantiation;
}

// Calls launch.template operator()<tiles[index]>().
template <const auto& tiles, class Launch>
const char* with_tile(int index, const Launch& launch) {
    const auto find = [&]<size_t... I>(std::index_sequence<I...>) {
        const char* error = no_instantiation;
        (void)((index == static_cast<int>(I) && (error = launch.template operator()<tiles[I]>(), true)) || ...);
        return error;
    };
    return find(std::make_index_sequence<tiles.size()>{});
}

}  // namespace fused_cna
