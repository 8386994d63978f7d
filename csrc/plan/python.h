// Problems, devices and tuned plans as plain Python data, shared by the two Python modules. No torch.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "plan/device.h"
#include "problem.h"

namespace fused_cna {

// Throws std::invalid_argument for a dtype that no kernel takes.
DType find_dtype(const std::string& name);

// One entry per field, under its name; the dtype as its name.
pybind11::dict problem_as_dict(const ConvProblem& problem);
pybind11::dict device_as_dict(const DeviceInfo& device);

// The reverse. Throw std::invalid_argument for a missing or unknown field, or an invalid value.
ConvProblem problem_from(const pybind11::dict& fields);
DeviceInfo device_from(const pybind11::dict& fields);

// Adds the functions that set, list and clear tuned plans. Each module has its own table.
void define_tuned_plans(pybind11::module_& m);

}  // namespace fused_cna
