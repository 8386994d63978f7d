// The Python module fused_cna._C: how it was built, its kernels and their plans. Importing it registers the operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "kernels/run.h"
#include "plan/plan.h"
#include "plan/python.h"
#include "plan/tuned.h"
#include "torch/arrangement.h"
#include "torch/device.h"

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
    for (int i = 0; i < static_cast<int>(Kernel::cudnn); ++i) names.emplace_back(kernel_name(static_cast<Kernel>(i)));
    return names;
}

// Never destroyed: a call may come during Python's shutdown.
py::object& plan_loader() {
    static auto* loader = new py::object;
    return *loader;
}

void call_plan_loader(int device_index) {
    const py::gil_scoped_acquire gil;
    if (plan_loader()) plan_loader()(device_index);
}

void set_plan_loader(const py::object& loader) {
    plan_loader() = loader;
    set_tuned_plan_loader(call_plan_loader);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "Compiled part of fused_cna: the CUDA kernels and the plan that chooses among them.";
    m.def("build_info", &build_info, "The torch and the compiler this module was built with.");
    m.def("force_plan", &force_plan,
          "Makes every call run the best plan whose name begins so; an empty name ends it. Returns the name before.",
          py::arg("name"));
    m.def(
        "device", [](int index) { return device_as_dict(device_info(static_cast<c10::DeviceIndex>(index))); },
        "What the plan knows of a CUDA device, as a dict.", py::arg("index"));
    m.def("allow_early_starts", &allow_early_starts,
          "Whether kernels may start while the one ahead on the stream ends, where the device can; returns what was set "
          "before.",
          py::arg("allowed"));
    m.def("set_plan_loader", &set_plan_loader,
          "Has a function called with the index of each CUDA device before the first plan for it is chosen.",
          py::arg("loader"));
    m.def("_load_plans_once", &load_tuned_plans_once, "What the operator does first on a device.",
          py::call_guard<py::gil_scoped_release>(), py::arg("index"));
    m.def(
        "refused_tensor_maps",
        [] {
            const RefusedMaps refused = refused_tensor_maps();
            return py::make_tuple(refused.number, refused.reason ? refused.reason : "");
        },
        "How many tensor maps the driver has refused in this process, and why the last of them.");
    define_tuned_plans(m);
    define_arrangements(m);
    m.def("kernels", &kernels, "The names of the kernels, as a plan names them.");
}

}  // namespace fused_cna
