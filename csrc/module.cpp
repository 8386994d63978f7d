// The Python module of the kernels: how it was built and which there are. Importing it registers the operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

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

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "Compiled part of fused_cna: the CUDA kernels and the plan that chooses among them.";
    m.def("build_info", &build_info, "The torch and the compiler this module was built with.");
    m.def("force_plan", &force_plan, "Makes every call run the best plan whose name begins so; an empty name ends it.",
          py::arg("name"));
    m.def("kernels", &kernels, "The names of the kernels, as a plan names them.");
}

}  // namespace fused_cna
