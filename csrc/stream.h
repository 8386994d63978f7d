// The stream handle, named without any CUDA header so that host code above device/ builds with a plain C++ compiler.
#pragma once

struct CUstream_st;

namespace fused_cna {

using Stream = CUstream_st*;

}  // namespace fused_cna
