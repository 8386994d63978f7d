// The kernels as the plan sees them: a table, one row each, and what the rows share.
#pragma once

#include <limits>
#include <span>
#include <string>
#include <vector>

#include "plan/plan.h"

namespace fused_cna {

inline constexpr int64_t int_limit = std::numeric_limits<int32_t>::max();

// Appends a kernel's candidates for the problem, those that cannot run it with the reason.
using ListCandidates = void(Kernel kernel, const ConvProblem& problem, const DeviceInfo& device,
                            std::vector<Candidate>& all);

// What tells a kernel's plans of one tile apart, for to_string.
using Describe = std::string(const Plan& plan);

// The tiles that a kernel is instantiated for with a dtype: the fields of each in the struct's order, then the threads of a
// block and, where the tile alone decides them, its bytes of shared memory.
using Tiles = std::vector<std::vector<int64_t>>;
using ListTiles = Tiles(Kernel kernel, DType dtype);

// A row. Each is defined in the kernel's own folder, in its plan.cpp.
struct Family {
    Kernel kernel;
    const char* name;
    ListCandidates* list_candidates;
    Describe* describe;
    ListTiles* list_tiles;
};

// The most special first.
std::span<const Family* const> families();
const Family& family_of(Kernel kernel);

// For example "it needs 300 bytes, at most 200 bytes".
std::string with_numbers(const char* text, int64_t given, const char* unit, int64_t limit);

// Why no kernel on tensor cores or with cp.async can run on the device; empty where they can.
std::string too_old(const DeviceInfo& device);

// Why a kernel whose blocks make rectangles of output pixels cannot count in 32 bits; empty where it can. A rectangle may
// reach beyond the output, by at most the output's own size.
std::string too_far(const ConvProblem& problem);

// Why cp.async cannot copy the problem's channels; empty where it can.
std::string no_copies_reason(const ConvProblem& problem);

// The copies to dense memory that a plan asks for, where that widens loads or makes tensor cores possible at all, and the
// bytes of a load that then are possible. Copies are costed like anything else.
void choose_access(const ConvProblem& problem, Plan& plan);

// Whether the convolution, with x as the plan has it, is a plain matrix product whose rows are the pixels of x.
bool is_pointwise(const ConvProblem& problem, const Plan& plan);

// Whether the filter fits the masks of the gather of an implicit GEMM: one bit for each of its rows, or columns, of 32.
bool fits_masks(const ConvProblem& problem);

// Why that gather does not take the problem with loads of so many bytes; empty where it does. A tile may be instantiated for
// narrow loads, and for filters without masks.
std::string no_gather_reason(const ConvProblem& problem, int vector_bytes, bool takes_narrow_vectors, bool takes_any_filter);

// For example " after a copy of x"; empty where a plan copies nothing.
std::string describe_copies(const Plan& plan);

}  // namespace fused_cna
