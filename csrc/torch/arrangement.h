// The fast path of ConvNormAct: repeats a call that Python has arranged once, without Python, while the module is unchanged.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_cna {

// Adds `arrange`, which makes such a call; fused_cna/_arrangement.py says what the call takes and checks.
void define_arrangements(pybind11::module_& m);

}  // namespace fused_cna
