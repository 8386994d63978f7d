// The fields of a problem and of a device by name: what every conversion to plain data goes through.
#pragma once

#include "conv_problem.h"
#include "device_info.h"

namespace fused_cna {

// Calls visit(name, field) for each. They are taken apart whole, so that a field added to the struct and not here does not
// compile.
template <class Problem, class Visit>
void for_each_problem_field(Problem& problem, Visit visit) {
    auto& [n, c, h, w, k, r, s, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dil_h, dil_w, groups, dtype,
           allow_tf32, x_access, x_pixel_access, weight_access, x_pixels_even, has_norm, has_residual, passes_after_cudnn] =
        problem;
    visit("n", n);
    visit("c", c);
    visit("h", h);
    visit("w", w);
    visit("k", k);
    visit("r", r);
    visit("s", s);
    visit("stride_h", stride_h);
    visit("stride_w", stride_w);
    visit("pad_top", pad_top);
    visit("pad_bottom", pad_bottom);
    visit("pad_left", pad_left);
    visit("pad_right", pad_right);
    visit("dil_h", dil_h);
    visit("dil_w", dil_w);
    visit("groups", groups);
    visit("dtype", dtype);
    visit("allow_tf32", allow_tf32);
    visit("x_access", x_access);
    visit("x_pixel_access", x_pixel_access);
    visit("weight_access", weight_access);
    visit("x_pixels_even", x_pixels_even);
    visit("has_norm", has_norm);
    visit("has_residual", has_residual);
    visit("passes_after_cudnn", passes_after_cudnn);
}

template <class Device, class Visit>
void for_each_device_field(Device& device, Visit visit) {
    auto& [compute_major, compute_minor, multiprocessors, shared_per_multiprocessor, shared_per_block, clock_ghz,
           bandwidth_gbs, is_geforce] = device;
    visit("compute_major", compute_major);
    visit("compute_minor", compute_minor);
    visit("multiprocessors", multiprocessors);
    visit("shared_per_multiprocessor", shared_per_multiprocessor);
    visit("shared_per_block", shared_per_block);
    visit("clock_ghz", clock_ghz);
    visit("bandwidth_gbs", bandwidth_gbs);
    visit("is_geforce", is_geforce);
}

}  // namespace fused_cna
