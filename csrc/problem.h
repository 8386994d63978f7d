// One convolution problem, which the whole path from operator to kernel passes around. No torch, no CUDA.
#pragma once

#include <compare>
#include <cstdint>

namespace fused_cna {

enum class DType : int32_t { float32, float16, bfloat16 };

constexpr int64_t size_in_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

constexpr const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::float32: return "float32";
        case DType::float16: return "float16";
        case DType::bfloat16: return "bfloat16";
    }
    return "unknown";
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// One block's tile of the implicit GEMM: m output pixels, n output channels, k products per step.
struct BlockTile {
    int m = 0, n = 0, k = 0;

    bool operator==(const BlockTile&) const = default;
};

struct ConvProblem {
    int64_t n = 0, c = 0, h = 0, w = 0;  // input: batch, channels, height, width
    int64_t k = 0, r = 0, s = 0;         // output channels, filter height, filter width
    int64_t stride_h = 1, stride_w = 1;
    int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
    int64_t dil_h = 1, dil_w = 1;
    int64_t groups = 1;
    DType dtype = DType::float32;
    bool allow_tf32 = false;  // whether float32 products may be rounded to tf32

    // The widest vector load, in bytes up to 16, that alignment and length of every run of channels allow; 0 where channels
    // are not dense. A run is a group's channels, for x_pixel all channels of a pixel.
    int64_t x_vector_bytes = 0, x_pixel_vector_bytes = 0, weight_vector_bytes = 0;
    bool x_pixels_even = false;  // one distance between successive pixels, from the first image to the last

    // What follows the products. Only tuned plans depend on it, never a kernel's legality.
    bool has_norm = false, has_residual = false;
    int64_t passes_after_cudnn = 0;  // see args.h

    constexpr int64_t padded_h() const { return h + pad_top + pad_bottom; }
    constexpr int64_t padded_w() const { return w + pad_left + pad_right; }

    // Output height and width, the floor formula of torch.nn.Conv2d.
    constexpr int64_t p() const { return (padded_h() - dil_h * (r - 1) - 1) / stride_h + 1; }
    constexpr int64_t q() const { return (padded_w() - dil_w * (s - 1) - 1) / stride_w + 1; }

    constexpr int64_t c_per_group() const { return c / groups; }
    constexpr int64_t k_per_group() const { return k / groups; }

    // The vector loads that dense channels_last memory allows, for a group's channels and for a whole pixel's.
    constexpr int64_t dense_vector_bytes() const { return widest_vector_bytes(c_per_group()); }
    constexpr int64_t dense_pixel_vector_bytes() const { return widest_vector_bytes(c); }

    // The implicit GEMM of each group: [gemm_m, gemm_k] x [gemm_k, gemm_n].
    constexpr int64_t gemm_m() const { return n * p() * q(); }
    constexpr int64_t gemm_n() const { return k_per_group(); }
    constexpr int64_t gemm_k() const { return r * s * c_per_group(); }

    // Plans are memoised in a map by problem, which needs an order.
    auto operator<=>(const ConvProblem&) const = default;

   private:
    constexpr int64_t widest_vector_bytes(int64_t channels) const {
        int64_t bytes = 16;
        while (channels * size_in_bytes(dtype) % bytes != 0) bytes /= 2;
        return bytes;
    }
};

// Calls visit(name, field) for each name and field that follow.
template <class Visit>
constexpr void visit_fields(const Visit&) {}
template <class Visit, class Field, class... Others>
constexpr void visit_fields(const Visit& visit, const char* name, Field& field, Others&&... others) {
    visit(name, field);
    visit_fields(visit, others...);
}

// The one list of fields and their names, used by every conversion to plain data and by plan files. The structured binding
// names all fields, so that a new field does not compile until it is added here.
template <class Problem, class Visit>
constexpr void for_each_problem_field(Problem& problem, const Visit& visit) {
    auto& [n, c, h, w, k, r, s, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dil_h, dil_w, groups, dtype,
           allow_tf32, x, x_pixel, weight, x_pixels_even, has_norm, has_residual, passes] = problem;
    visit_fields(visit, "n", n, "c", c, "h", h, "w", w, "k", k, "r", r, "s", s, "stride_h", stride_h, "stride_w", stride_w,
                 "pad_top", pad_top, "pad_bottom", pad_bottom, "pad_left", pad_left, "pad_right", pad_right, "dil_h", dil_h,
                 "dil_w", dil_w, "groups", groups, "dtype", dtype, "allow_tf32", allow_tf32, "x_access", x, "x_pixel_access",
                 x_pixel, "weight_access", weight, "x_pixels_even", x_pixels_even, "has_norm", has_norm, "has_residual",
                 has_residual, "passes_after_cudnn", passes);
}

}  // namespace fused_cna
