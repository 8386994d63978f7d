// The Python module fused_cna._plan. It needs neither CUDA nor torch, so every installation can ask what would run where.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan/families.h"
#include "plan/layout.h"
#include "plan/python.h"
#include "plan/tuned.h"

namespace py = pybind11;

namespace fused_cna {

namespace {

// A device by name, or from a dict as device_as_dict makes it.
DeviceInfo device_of(const py::object& device) {
    return py::isinstance<py::str>(device) ? find_device(device.cast<std::string>()) : device_from(device.cast<py::dict>());
}

template <class Found>
auto require(const Found& found, const char* what, const py::object& name) {
    if (!found) throw std::invalid_argument("unknown " + std::string(what) + " " + py::repr(name).cast<std::string>());
    return *found;
}

// The problem that the operator would make of a call, given its sizes, the addresses and strides of x and the weight, and
// what follows the convolution.
py::dict make_problem(const py::dict& given) {
    const auto get = [&](const char* key) { return given[key].cast<int64_t>(); };
    const auto view = [&](const char* address, const char* strides, const std::array<int64_t, 4>& sizes) {
        return TensorView{reinterpret_cast<const void*>(given[address].cast<uintptr_t>()), sizes,
                          given[strides].cast<std::array<int64_t, 4>>()};
    };
    const auto residual = given["residual"].cast<std::optional<std::string>>();
    OperatorCall call{
        .x = view("x_address", "x_strides", {get("n"), get("c"), get("h"), get("w")}),
        .weight = view("weight_address", "weight_strides", {get("k"), get("c") / get("groups"), get("r"), get("s")}),
        .stride = given["stride"].cast<std::array<int64_t, 2>>(),
        .padding = given["padding"].cast<std::array<int64_t, 4>>(),
        .dilation = given["dilation"].cast<std::array<int64_t, 2>>(),
        .groups = get("groups"),
        .dtype = find_dtype(given["dtype"].cast<std::string>()),
        .allow_tf32 = given["allow_tf32"].cast<bool>(),
        .has_norm = given["norm"].cast<bool>(),
        .activation = require(find_activation(given["act"].cast<std::string>()), "activation", given["act"]).value};
    if (residual) call.residual = require(find_residual_order(*residual), "residual order", given["residual"]);
    return problem_as_dict(make_args(call).problem);
}

py::dict as_dict(const Candidate& candidate) {
    const Plan& plan = candidate.plan;
    py::dict result;
    result["name"] = to_string(plan);
    result["kernel"] = kernel_name(plan.kernel);
    result["tile"] = py::make_tuple(plan.tile.m, plan.tile.n, plan.tile.k);
    const auto* gemm = std::get_if<implicit_gemm::Choice>(&plan.choice);
    const auto* sm90 = std::get_if<implicit_gemm_sm90::Choice>(&plan.choice);
    const auto* small_m = std::get_if<small_m::Choice>(&plan.choice);
    const bool is_pointwise = small_m && small_m->is_pointwise;
    result["stages"] = gemm ? gemm->stages : sm90 ? sm90->stages : 1;
    result["split_k"] = gemm ? gemm->split_k : sm90 ? sm90->split_k : 1;
    result["rows"] = gemm           ? addressing_name(gemm->addressing)
                     : sm90         ? fetch_name(sm90->fetch)
                     : is_pointwise ? "pointwise"
                                    : "plain";
    result["lanes"] = small_m ? small_m->lanes : 1;
    result["access_bytes"] = plan.vector_bytes;
    result["convert_x"] = plan.convert_x;
    result["convert_weight"] = plan.convert_weight;
    result["blocks"] = plan.blocks;
    result["workspace_bytes"] = plan.workspace_bytes;
    result["products_us"] = plan.estimate.products_us;
    result["bytes_us"] = plan.estimate.bytes_us;
    result["latency_us"] = plan.estimate.latency_us;
    result["overhead_us"] = plan.estimate.overhead_us;
    result["estimate_us"] = plan.estimate.total_us();
    result["illegal"] = candidate.unsupported_reason;
    result["tuned"] = false;
    return result;
}

std::vector<py::dict> candidates(const py::dict& problem, const py::object& device) {
    std::vector<py::dict> result;
    for (const Candidate& candidate : list_candidates(problem_from(problem), device_of(device))) {
        result.push_back(as_dict(candidate));
    }
    return result;
}

py::dict find(const py::dict& problem, const py::object& device, const std::string& name) {
    return as_dict({find_plan(problem_from(problem), device_of(device), name), ""});
}

py::dict chosen(const py::dict& given, const py::object& given_device) {
    const ConvProblem problem = problem_from(given);
    const DeviceInfo device = device_of(given_device);
    py::dict result = as_dict({memoised_plan(problem, device), ""});
    result["tuned"] = find_tuned_plan(problem, device).has_value();
    return result;
}

Tiles tiles(const std::string& kernel, const std::string& dtype) {
    for (const Family* family : families()) {
        if (family->name == kernel) return family->list_tiles(family->kernel, find_dtype(dtype));
    }
    throw std::invalid_argument("no kernel is called '" + kernel + "'");
}

std::vector<std::string> devices() {
    std::vector<std::string> names;
    for (const NamedDevice& device : named_devices) names.emplace_back(device.name);
    return names;
}

}  // namespace

PYBIND11_MODULE(_plan, m) {
    using namespace py::literals;
    m.doc() = "What fused_cna would run for a convolution on a device, and why.";
    m.def("problem", &make_problem, "The problem that the operator would make of a call, as a dict.", "call"_a);
    m.def("candidates", &candidates, "Every plan considered, the fastest by estimate first, as dicts.", "problem"_a,
          "device"_a);
    m.def("chosen", &chosen, "The plan that would run, as a dict, and whether it is tuned.", "problem"_a, "device"_a);
    m.def("find", &find, "The best plan whose name begins so, as a dict.", "problem"_a, "device"_a, "name"_a);
    m.def("tiles", &tiles,
          "The tiles that a kernel is instantiated for with a dtype: fields, threads, bytes of shared memory.", "kernel"_a,
          "dtype"_a);
    m.def("devices", &devices, "The names of the devices that can be planned for.");
    m.def(
        "device", [](const std::string& name) { return device_as_dict(find_device(name)); },
        "What is known of one of them, as a dict.", "name"_a);
    define_tuned_plans(m);
}

}  // namespace fused_cna
