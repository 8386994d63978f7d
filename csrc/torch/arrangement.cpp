#include "torch/arrangement.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "torch/prepare.h"
#include "torch/signature.h"

namespace fused_cna {

namespace {

namespace py = pybind11;
using at::Tensor;

// What a dict must hold. The objects are leaves: numbers, strings, tuples of them, and classes. None refers to a module or a
// tensor, so nothing is kept alive and no reference cycle can arise.
struct Contents {
    struct Attribute {
        py::object name, value;
        bool is_there;  // false: the dict must not have this name
    };
    std::vector<Attribute> attributes;
    std::vector<py::object> empty;  // names of dicts that must be empty: the hooks
};

struct HeldTensor {
    size_t slot;        // index in Held
    py::object holder;  // "_parameters" or "_buffers"
    py::object name;
    bool is_none;
};

struct Part {
    py::object kind;
    Contents contents;
    std::vector<HeldTensor> tensors;
    std::vector<std::pair<py::object, Part>> children;
    py::object modules_name = py::reinterpret_steal<py::object>(PyUnicode_InternFromString("_modules"));
};

// The operator's tensors that modules hold, in the order of its arguments.
using Held = std::array<MaybeTensor, 6>;

bool has_size(PyObject* container, Py_ssize_t size) {
    return container && PyDict_Check(container) && PyDict_Size(container) == size;
}

// A borrowed reference, or null.
PyObject* item(PyObject* dict, const py::object& key) { return PyDict_GetItemWithError(dict, key.ptr()); }

bool has(PyObject* dict, const Contents& contents) {
    for (const auto& [name, value, is_there] : contents.attributes) {
        if (item(dict, name) != (is_there ? value.ptr() : nullptr)) return false;
    }
    return std::ranges::all_of(contents.empty, [&](const py::object& name) { return has_size(item(dict, name), 0); });
}

bool find_tensor(PyObject* dict, const HeldTensor& wanted, Held& held) {
    PyObject* const holder = item(dict, wanted.holder);
    PyObject* const found = holder && PyDict_Check(holder) ? item(holder, wanted.name) : nullptr;
    if (!found || (found == Py_None) != wanted.is_none) return false;
    if (wanted.is_none) return true;
    if (!THPVariable_CheckExact(found)) return false;
    held[wanted.slot] = THPVariable_Unpack(found);
    return true;
}

// Whether a module, and everything in it that a call depends on, is unchanged. Its current tensors go to `held`.
bool holds(PyObject* module, const Part& part, Held& held) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != part.kind.ptr()) return false;
    const py::object dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!dict) throw py::error_already_set();
    if (!has(dict.ptr(), part.contents)) return false;
    for (const HeldTensor& wanted : part.tensors) {
        if (!find_tensor(dict.ptr(), wanted, held)) return false;
    }
    PyObject* const modules = item(dict.ptr(), part.modules_name);
    if (!has_size(modules, static_cast<Py_ssize_t>(part.children.size()))) return false;
    for (const auto& [name, child] : part.children) {
        PyObject* const found = item(modules, name);
        if (!found || !holds(found, child, held)) return false;
    }
    return true;
}

struct Arrangement {
    c10::TypedOperatorHandle<OperatorSignature> op;
    Part module;
    std::vector<std::pair<py::object, Contents>> globals;  // dicts of Python modules
    c10::Device device;
    c10::ScalarType dtype;
    ConvProblem geometry;  // of the module alone, without tensor sizes
    double eps;
    std::vector<c10::SymInt> stride, padding, dilation;
    int64_t groups;
    std::string act;
    std::vector<double> act_params;
    std::string residual_order;
};

// Whether a torch function mode or a tracer must see calls before the dispatcher does, or gradients are enabled.
bool is_watched() {
    return at::impl::torch_function_mode_enabled() || at::tracer::impl::is_dispatch_enabled() || at::GradMode::is_enabled();
}

// Whether the operator takes the residual. Some modules handle others without it.
bool fits(const Tensor& residual, const Tensor& x, const Tensor& weight, const Arrangement& to) {
    if (weight.dim() != 4 || residual.device() != x.device() || residual.scalar_type() != x.scalar_type()) return false;
    ConvProblem problem = to.geometry;
    problem.h = x.size(2), problem.w = x.size(3), problem.r = weight.size(2), problem.s = weight.size(3);
    return residual.sizes() == at::IntArrayRef({x.size(0), weight.size(0), problem.p(), problem.q()});
}

// nullopt where the module has changed, or the arguments differ from those that the call was arranged for.
std::optional<Tensor> call(const Arrangement& to, PyObject* module, PyObject* x_given, PyObject* residual_given) {
    if (is_watched() || !THPVariable_CheckExact(x_given)) return std::nullopt;
    const Tensor x = THPVariable_Unpack(x_given);
    if (x.dim() != 4 || x.device() != to.device || x.scalar_type() != to.dtype) return std::nullopt;
    if (residual_given != Py_None && !THPVariable_CheckExact(residual_given)) return std::nullopt;
    const MaybeTensor residual =
        residual_given == Py_None ? std::nullopt : std::optional(THPVariable_Unpack(residual_given));
    for (const auto& [dict, contents] : to.globals) {
        if (!has(dict.ptr(), contents)) return std::nullopt;
    }
    Held held;
    if (!holds(module, to.module, held) || !held[0] || (residual && !fits(*residual, x, *held[0], to))) return std::nullopt;
    const auto& [weight, bias, norm_weight, norm_bias, running_mean, running_var] = held;
    const py::gil_scoped_release released;
    return to.op.call(x, *weight, bias, norm_weight, norm_bias, running_mean, running_var, to.eps, to.stride, to.padding,
                      to.dilation, to.groups, to.act, to.act_params, residual, to.residual_order);
}

constexpr const char* capsule_name = "fused_cna.Arrangement";

// (module, x, residual) -> Tensor or NotImplemented
PyObject* call_from_python(PyObject* self, PyObject* const* given, Py_ssize_t number) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(number == 3, "expected the module, x and the residual, but got ", number, " arguments");
    const auto* to = static_cast<const Arrangement*>(PyCapsule_GetPointer(self, capsule_name));
    if (!to) throw python_error();
    std::optional<Tensor> y = call(*to, given[0], given[1], given[2]);
    if (y) return THPVariable_Wrap(*std::move(y));
    Py_RETURN_NOTIMPLEMENTED;
    END_HANDLE_TH_ERRORS
}

PyMethodDef method{"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_from_python)), METH_FASTCALL, nullptr};

// The format in which fused_cna/_arrangement.py describes a call.
using DescribedContents = std::pair<std::vector<std::tuple<py::object, py::object, bool>>, std::vector<py::object>>;

Contents contents_from(const DescribedContents& described) {
    Contents contents{.attributes = {}, .empty = described.second};
    for (const auto& [name, value, is_there] : described.first) contents.attributes.push_back({name, value, is_there});
    return contents;
}

Part part_from(const py::tuple& described) {
    const auto [kind, contents, tensors, children] =
        described
            .cast<std::tuple<py::object, DescribedContents, std::vector<std::tuple<size_t, py::object, py::object, bool>>,
                             std::vector<std::pair<py::object, py::tuple>>>>();
    Part part{.kind = kind, .contents = contents_from(contents), .tensors = {}, .children = {}};
    for (const auto& [slot, holder, name, is_none] : tensors) part.tensors.push_back({slot, holder, name, is_none});
    for (const auto& [name, child] : children) part.children.emplace_back(name, part_from(child));
    return part;
}

using Sizes = std::vector<int64_t>;

ConvProblem geometry_of(const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
    const auto [top, bottom, left, right] = all_pads(padding);
    return {.stride_h = stride.at(0),
            .stride_w = stride.at(1),
            .pad_top = top,
            .pad_bottom = bottom,
            .pad_left = left,
            .pad_right = right,
            .dil_h = dilation.at(0),
            .dil_w = dilation.at(1)};
}

py::object arrange(const std::string& op, const py::tuple& module,
                   const std::vector<std::pair<py::object, DescribedContents>>& globals, const Tensor& x, double eps,
                   const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups, const std::string& act,
                   const std::vector<double>& act_params, const std::string& residual_order) {
    auto made = std::make_unique<Arrangement>(Arrangement{
        .op = c10::Dispatcher::singleton().findSchemaOrThrow(op.c_str(), "").typed<OperatorSignature>(),
        .module = part_from(module),
        .globals = {},
        .device = x.device(),
        .dtype = x.scalar_type(),
        .geometry = geometry_of(stride, padding, dilation),
        .eps = eps,
        .stride = {stride.begin(), stride.end()},
        .padding = {padding.begin(), padding.end()},
        .dilation = {dilation.begin(), dilation.end()},
        .groups = groups,
        .act = act,
        .act_params = act_params,
        .residual_order = residual_order,
    });
    for (const auto& [dict, contents] : globals) made->globals.emplace_back(dict, contents_from(contents));
    const py::capsule owner(made.release(), capsule_name, [](PyObject* capsule) {
        delete static_cast<Arrangement*>(PyCapsule_GetPointer(capsule, capsule_name));
    });
    return py::reinterpret_steal<py::object>(PyCFunction_New(&method, owner.ptr()));
}

}  // namespace

void define_arrangements(py::module_& m) {
    m.def("arrange", &arrange, "A function (module, x, residual) that calls an operator so, or returns NotImplemented.");
}

}  // namespace fused_cna
