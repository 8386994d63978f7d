// The Python module of the plan. Needs neither CUDA nor torch, so that every installation can ask what would run where.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv_args.h"
#include "layout.h"
#include "plan.h"
#include "plan_data.h"
#include "tuned.h"

namespace py = pybind11;

namespace fused_cna {

namespace {

const DeviceInfo& find_device(const std::string& name) {
    std::string known;
    for (const NamedDevice& device : named_devices) {
        if (device.name == name) return device.info;
        known += (known.empty() ? "" : ", ") + std::string(device.name);
    }
    throw std::invalid_argument("no device is called '" + name + "'; known are " + known);
}

// A device by its name, or as device_as_dict gives it.
DeviceInfo device_of(const py::object& device) {
    return py::isinstance<py::str>(device) ? find_device(device.cast<std::string>()) : device_from(device.cast<py::dict>());
}

template <class Found>
auto require(const Found& found, const char* what, const py::object& name) {
    if (!found) throw std::invalid_argument("unknown " + std::string(what) + " " + py::repr(name).cast<std::string>());
    return *found;
}

// The problem that the operator would make of a call: sizes, the addresses and strides of x and the weight, and what
// follows.
py::dict make_problem(const py::dict& given) {
    const auto get = [&](const char* key) { return given[key].cast<int64_t>(); };
    const auto stride = given["stride"].cast<std::array<int64_t, 2>>();
    const auto padding = given["padding"].cast<std::array<int64_t, 4>>();
    const auto dilation = given["dilation"].cast<std::array<int64_t, 2>>();
    ConvArgs args;
    args.problem = {.n = get("n"),
                    .c = get("c"),
                    .h = get("h"),
                    .w = get("w"),
                    .k = get("k"),
                    .r = get("r"),
                    .s = get("s"),
                    .stride_h = stride[0],
                    .stride_w = stride[1],
                    .pad_top = padding[0],
                    .pad_bottom = padding[1],
                    .pad_left = padding[2],
                    .pad_right = padding[3],
                    .dil_h = dilation[0],
                    .dil_w = dilation[1],
                    .groups = get("groups"),
                    .dtype = find_dtype(given["dtype"].cast<std::string>()),
                    .allow_tf32 = given["allow_tf32"].cast<bool>()};
    args.problem.allow_tf32 &= args.problem.dtype == DType::float32;
    args.problem.has_norm = given["norm"].cast<bool>();
    const auto residual = given["residual"].cast<std::optional<std::string>>();
    args.problem.has_residual = residual.has_value();
    args.problem.passes_after_cudnn = passes_after_cudnn(
        require(find_activation(given["act"].cast<std::string>()), "activation", given["act"]).value,
        residual ? std::optional(require(find_residual_order(*residual), "residual order", given["residual"]))
                 : std::nullopt);
    const auto x = given["x_strides"].cast<std::array<int64_t, 4>>();
    const auto weight = given["weight_strides"].cast<std::array<int64_t, 4>>();
    args.x = reinterpret_cast<const void*>(given["x_address"].cast<uintptr_t>());
    args.x_strides = {x[0], x[1], x[2], x[3]};
    args.weight = reinterpret_cast<const void*>(given["weight_address"].cast<uintptr_t>());
    args.weight_strides = {weight[0], weight[1], weight[2], weight[3]};
    describe_layout(args);
    return problem_as_dict(args.problem);
}

py::dict as_dict(const Candidate& candidate) {
    const Plan& plan = candidate.plan;
    py::dict result;
    result["name"] = to_string(plan);
    result["kernel"] = kernel_name(plan.kernel);
    result["tile"] = py::make_tuple(plan.tile.m, plan.tile.n, plan.tile.k);
    result["stages"] = plan.stages;
    result["split_k"] = plan.split_k;
    result["rows"] = rows_name(plan.rows);
    result["lanes"] = plan.lanes;
    result["access_bytes"] = plan.access_bytes;
    result["convert_x"] = plan.convert_x;
    result["convert_weight"] = plan.convert_weight;
    result["blocks"] = plan.blocks;
    result["workspace_bytes"] = plan.workspace_bytes;
    result["products_us"] = plan.estimate.products_us;
    result["bytes_us"] = plan.estimate.bytes_us;
    result["latency_us"] = plan.estimate.latency_us;
    result["overhead_us"] = plan.estimate.overhead_us;
    result["estimate_us"] = plan.estimate.total_us();
    result["illegal"] = candidate.illegal;
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
    m.def("devices", &devices, "The names of the devices that can be planned for.");
    m.def(
        "device", [](const std::string& name) { return device_as_dict(find_device(name)); },
        "What is known of one of them, as a dict.", "name"_a);
    define_tuned_plans(m);
}

}  // namespace fused_cna
