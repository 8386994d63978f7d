// The kernels as the plan sees them: a table with one row per kernel, and helpers that the rows share.
#pragma once

#include <limits>
#include <span>
#include <string>
#include <vector>

#include "plan/plan.h"

namespace fused_cna {

inline constexpr int64_t int_limit = std::numeric_limits<int32_t>::max();

// Appends a kernel's candidates for the problem; those that cannot run it carry the reason.
using ListCandidates = void(Kernel kernel, const ConvProblem& problem, const DeviceInfo& device,
                            std::vector<Candidate>& all);

// The part of a plan's name after kernel and tile, for to_string.
using Describe = std::string(const Plan& plan);

// The tiles that a kernel is instantiated for with a dtype. Each has the struct's fields in order, then the threads per
// block and, where the tile alone decides them, the bytes of shared memory.
using Tiles = std::vector<std::vector<int64_t>>;
using ListTiles = Tiles(Kernel kernel, DType dtype);

// A row of the table, defined in plan.cpp of the kernel's own folder.
struct Family {
    Kernel kernel;
    const char* name;
    ListCandidates* list_candidates;
    Describe* describe;
    ListTiles* list_tiles;
};

// The most specialised first.
std::span<const Family* const> families();
const Family& family_of(Kernel kernel);

// For example "it needs 300 bytes, at most 200 bytes".
std::string with_numbers(const char* text, int64_t given, const char* unit, int64_t limit);

// Why no kernel on tensor cores or with cp.async can run on the device; empty where they can.
std::string too_old(const DeviceInfo& device);

// Why a kernel whose blocks are rectangles of output pixels would overflow 32 bits; empty where it would not. A rectangle
// may reach beyond the output, by at most the output's own size.
std::string too_far(const ConvProblem& problem);

// Why cp.async cannot copy the problem's channels; empty where it can.
std::string no_copies_reason(const ConvProblem& problem);

// Sets the plan's copies to dense memory, where they widen loads or make tensor cores possible at all, and the load width
// that results. The copies are part of the estimate.
void choose_access(const ConvProblem& problem, Plan& plan);

// Whether the convolution, with x as the plan has it, is a plain matrix product whose rows are the pixels of x.
bool is_pointwise(const ConvProblem& problem, const Plan& plan);

// Whether the filter fits the masks of an implicit GEMM's gather: 32 bits, one per filter row or column.
bool fits_masks(const ConvProblem& problem);

// Why that gather cannot take the problem with loads of `vector_bytes`; empty where it can. A tile may be instantiated for
// narrow loads, and for filters without masks.
std::string no_gather_reason(const ConvProblem& problem, int vector_bytes, bool takes_narrow_vectors, bool takes_any_filter);

// For example " after a copy of x"; empty where a plan copies nothing.
std::string describe_copies(const Plan& plan);

}  // namespace fused_cna
