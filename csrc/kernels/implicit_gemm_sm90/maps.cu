// Makes the tensor maps of the Hopper kernel, and caches them.
#include "kernels/implicit_gemm_sm90/maps.cuh"

#include <atomic>
#include <initializer_list>
#include <map>
#include <mutex>
#include <utility>

#include "kernels/implicit_gemm_sm90/hardware.h"
#include "kernels/implicit_gemm_sm90/layout.h"
#include "kernels/implicit_gemm_sm90/tile.h"
#include "plan/layout.h"

namespace fused_cna::implicit_gemm_sm90 {

namespace {

// A dimension after the dense one: its stride in elements, and the box's extent.
struct Dimension {
    int64_t size, stride;
    int box = 1;
};

// The stride of a dimension of one element is never used, and is replaced by one that the driver accepts.
device::MapGeometry geometry_of(const void* address, DType dtype, int64_t size, int box,
                                std::initializer_list<Dimension> others) {
    device::MapGeometry map{.address = address, .dtype = dtype, .rank = 1};
    map.sizes[0] = size;
    map.strides[0] = size_in_bytes(dtype);
    map.box[0] = box;
    map.swizzle_bytes = box * static_cast<int>(map.strides[0]);
    for (const Dimension& dimension : others) {
        const int i = map.rank++;
        map.sizes[i] = dimension.size;
        map.strides[i] = dimension.size > 1 ? dimension.stride * size_in_bytes(dtype)
                                            : round_up(map.sizes[i - 1] * map.strides[i - 1], 16);
        map.box[i] = dimension.box;
    }
    return map;
}

bool is_aligned(const device::MapGeometry& map) {
    if (reinterpret_cast<uintptr_t>(map.address) % 16 != 0) return false;
    for (int i = 1; i < map.rank; ++i) {
        if (map.strides[i] <= 0 || map.strides[i] % 16 != 0) return false;
    }
    return true;
}

std::atomic<int64_t> refused_number = 0;
std::atomic<const char*> refused_reason = nullptr;

Geometry if_aligned(const device::MapGeometry& map) { return is_aligned(map) ? Geometry(map) : std::nullopt; }

}  // namespace

Geometry x_geometry(const ConvArgs& conv, bool is_tiled, const MapTile& tile) {
    const ConvProblem& p = conv.problem;
    const Strides& strides = conv.x_strides;
    const int channels = Tile::k_bytes / static_cast<int>(size_in_bytes(p.dtype));
    if (is_tiled) {
        const auto step = pixel_step(p.n, p.h, p.w, strides);
        if (!step) return std::nullopt;
        return if_aligned(geometry_of(conv.x, p.dtype, p.c, channels, {{p.gemm_m(), *step, tile.m}}));
    }
    device::MapGeometry map =
        geometry_of(conv.x, p.dtype, p.c, channels, {{p.w, strides.w}, {p.h, strides.h}, {p.n, strides.n}});
    const Corners corners = corners_of(p);
    map.is_im2col = true;
    map.channels = channels;
    map.pixels = tile.m;
    map.lower_w = static_cast<int>(corners.lower_w);
    map.lower_h = static_cast<int>(corners.lower_h);
    map.upper_w = static_cast<int>(corners.upper_w);
    map.upper_h = static_cast<int>(corners.upper_h);
    if (!corners_begin_with_w) std::swap(map.lower_w, map.lower_h), std::swap(map.upper_w, map.upper_h);
    map.step_w = static_cast<int>(p.stride_w);
    map.step_h = static_cast<int>(p.stride_h);
    return if_aligned(map);
}

// {channels, s, r, filters}: beyond a tap's last channel the copy reads zeros, not the next tap.
Geometry weight_geometry(const ConvArgs& conv, const MapTile& tile) {
    const ConvProblem& p = conv.problem;
    const FilterStrides& strides = conv.weight_strides;
    const int channels = Tile::k_bytes / static_cast<int>(size_in_bytes(p.dtype));
    return if_aligned(geometry_of(conv.weight, p.dtype, p.c_per_group(), channels,
                                  {{p.s, strides.s}, {p.r, strides.r}, {p.k, strides.k, tile.n}}));
}

// {a group's channels, groups, pixels}: columns of a tile beyond its group are not written.
Geometry output_geometry(const ConvArgs& conv, const void* data, const Strides& strides, const MapTile& tile) {
    const ConvProblem& p = conv.problem;
    const auto step = pixel_step(p.n, p.p(), p.q(), strides);
    const bool is_dense = p.k == 1 || strides.c == 1;
    if (!step || !is_dense || (p.gemm_m() > 1 && *step < p.k)) return std::nullopt;
    return if_aligned(geometry_of(data, p.dtype, p.k_per_group(), tile.columns,
                                  {{p.groups, p.k_per_group()}, {p.gemm_m(), *step, tile.rows}}));
}

bool find_map(const Geometry& geometry, device::TensorMap& map) {
    // A map depends only on its geometry and address, and an address belongs to one device. Kernels and captured graphs hold
    // maps by value, so a map can be dropped at any time.
    constexpr size_t most_maps = 4096;
    static std::map<device::MapGeometry, device::TensorMap> maps;
    static std::mutex mutex;
    if (!geometry) return false;
    const std::lock_guard lock(mutex);
    if (const auto found = maps.find(*geometry); found != maps.end()) {
        map = found->second;
        return true;
    }
    if (const char* reason = device::encode_map(*geometry, map)) {
        ++refused_number;
        refused_reason = reason;
        return false;
    }
    if (maps.size() >= most_maps) maps.clear();
    maps.emplace(*geometry, map);
    return true;
}

RefusedMaps refused_maps() { return {refused_number, refused_reason}; }

bool has_tensor_maps() { return device::has_tensor_maps(); }

}  // namespace fused_cna::implicit_gemm_sm90
