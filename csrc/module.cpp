// The Python module: how it was built, which kernels it has, and what it would plan. Importing it registers the operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan.h"

namespace py = pybind11;

namespace fused_cna {

namespace {

py::dict build_info() {
    py::dict info;
    info["torch"] = TORCH_VERSION;
    info["compiler"] = __VERSION__;
    return info;
}

std::vector<std::string> kernels() {
    std::vector<std::string> names;
    for (const Kernel kernel : all_kernels) names.emplace_back(kernel_name(kernel));
    return names;
}

DType dtype_of(const std::string& name) {
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
        if (name == dtype_name(dtype)) return dtype;
    }
    throw std::invalid_argument("dtype should be float32, float16 or bfloat16, but got " + name);
}

py::dict plan(int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int64_t r, int64_t s,
              const std::array<int64_t, 2>& stride, const std::array<int64_t, 4>& padding,
              const std::array<int64_t, 2>& dilation, int64_t groups, const std::string& dtype) {
    const ConvProblem problem{.n = n,
                              .c = c,
                              .h = h,
                              .w = w,
                              .k = k,
                              .r = r,
                              .s = s,
                              .stride_h = stride[0],
                              .stride_w = stride[1],
                              .pad_top = padding[0],
                              .pad_bottom = padding[1],
                              .pad_left = padding[2],
                              .pad_right = padding[3],
                              .dil_h = dilation[0],
                              .dil_w = dilation[1],
                              .groups = groups,
                              .dtype = dtype_of(dtype)};
    const Plan chosen = choose_plan(problem, DeviceInfo{});
    py::dict result;
    result["kernel"] = kernel_name(chosen.kernel);
    result["tile"] = py::make_tuple(chosen.tile.m, chosen.tile.n, chosen.tile.k);
    result["blocks"] = chosen.blocks;
    result["text"] = to_string(chosen);
    return result;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    using namespace py::literals;
    m.doc() = "Compiled part of fused_cna: the CUDA kernels and the plan that chooses among them.";
    m.def("build_info", &build_info, "The torch and the compiler this module was built with.");
    m.def("kernels", &kernels, "The names of the kernels, as a plan names them.");
    m.def("plan", &plan, "The plan for a convolution: kernel, tile (m, n, k) and number of blocks, as a dict.", "n"_a, "c"_a,
          "h"_a, "w"_a, "k"_a, "r"_a, "s"_a, "stride"_a = std::array<int64_t, 2>{1, 1},
          "padding"_a = std::array<int64_t, 4>{0, 0, 0, 0}, "dilation"_a = std::array<int64_t, 2>{1, 1},
          "groups"_a = int64_t{1}, "dtype"_a = "float16");
}

}  // namespace fused_cna
