#include "plan/python.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "plan/tuned.h"

namespace py = pybind11;

namespace fused_cna {

namespace {

struct WriteField {
    py::dict& fields;

    template <class T>
    void operator()(const char* name, const T& value) const {
        fields[name] = value;
    }
    void operator()(const char* name, DType value) const { fields[name] = dtype_name(value); }
};

struct ReadField {
    const py::dict& fields;
    const char* what;

    template <class T>
    void operator()(const char* name, T& value) const {
        if (!fields.contains(name)) throw std::invalid_argument(std::string(what) + " has no field '" + name + "'");
        read(name, fields[name], value);
    }

    template <class T>
    void read(const char* name, const py::object& given, T& value) const {
        try {
            value = given.cast<T>();
        } catch (const py::cast_error&) {
            throw std::invalid_argument(std::string(what) + " has " + name + "=" + py::repr(given).cast<std::string>() +
                                        ", which is no such value");
        }
    }
    void read(const char* name, const py::object& given, DType& value) const {
        std::string text;
        read(name, given, text);
        value = find_dtype(text);
    }
};

void refuse_others(const py::dict& given, const py::dict& known, const char* what) {
    for (const auto& [name, value] : given) {
        if (known.contains(name)) continue;
        throw std::invalid_argument(std::string(what) + " has an unknown field " + py::repr(name).cast<std::string>());
    }
}

// The plan divides by these.
void require_positive(const char* what, const char* name, int64_t value) {
    if (value >= 1) return;
    throw std::invalid_argument(std::string(what) + " has " + name + "=" + std::to_string(value) +
                                ", at least 1 is allowed");
}

}  // namespace

DType find_dtype(const std::string& name) {
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
        if (name == dtype_name(dtype)) return dtype;
    }
    throw std::invalid_argument("no kernel takes " + name + "; there are kernels for float32, float16 and bfloat16");
}

py::dict problem_as_dict(const ConvProblem& problem) {
    py::dict fields;
    for_each_problem_field(problem, WriteField{fields});
    return fields;
}

py::dict device_as_dict(const DeviceInfo& device) {
    py::dict fields;
    for_each_device_field(device, WriteField{fields});
    return fields;
}

ConvProblem problem_from(const py::dict& given) {
    const ReadField read{given, "a convolution problem"};
    ConvProblem problem;
    for_each_problem_field(problem, read);
    refuse_others(given, problem_as_dict(problem), read.what);
    for (const char* name : {"n", "c", "h", "w", "k", "r", "s", "groups", "stride_h", "stride_w", "dil_h", "dil_w"}) {
        require_positive(read.what, name, given[name].cast<int64_t>());
    }
    const ConvProblem& p = problem;
    require_positive(read.what, "an output height", p.p());
    require_positive(read.what, "an output width", p.q());
    if (p.c % p.groups != 0 || p.k % p.groups != 0) {
        throw std::invalid_argument("a convolution problem has groups=" + std::to_string(p.groups) +
                                    ", which must divide c=" + std::to_string(p.c) + " and k=" + std::to_string(p.k));
    }
    return problem;
}

DeviceInfo device_from(const py::dict& given) {
    const ReadField read{given, "a device"};
    DeviceInfo device;
    for_each_device_field(device, read);
    refuse_others(given, device_as_dict(device), read.what);
    require_positive(read.what, "multiprocessors", device.multiprocessors);
    return device;
}

void define_tuned_plans(py::module_& m) {
    using namespace py::literals;
    m.def(
        "set_tuned_plan",
        [](const py::dict& problem, const py::dict& device, const std::string& name) {
            return set_tuned_plan(problem_from(problem), device_from(device), name);
        },
        "Makes the plan of this full name the one for a problem on a device. Returns why not, or an empty string.",
        "problem"_a, "device"_a, "name"_a);
    m.def(
        "tuned_plans",
        [] {
            std::vector<py::tuple> all;
            for (const TunedPlan& tuned : list_tuned_plans()) {
                all.push_back(
                    py::make_tuple(problem_as_dict(tuned.problem), device_as_dict(tuned.device), to_string(tuned.plan)));
            }
            return all;
        },
        "All that are set, as (problem, device, name).");
    m.def("clear_tuned_plans", &clear_tuned_plans, "Forgets them all.");
}

}  // namespace fused_cna
