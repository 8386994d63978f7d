// A call of a ConvNormAct as Python arranged it the last time, made again without Python while the module is as it was.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_cna {

// Adds `arrange`, which makes such calls; fused_cna/_arrangement.py says what they take and look at.
void define_arrangements(pybind11::module_& m);

}  // namespace fused_cna
