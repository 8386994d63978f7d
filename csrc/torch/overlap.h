// Whether strided views touch each other, element by element: channel slices of a channels_last tensor lie between each
// other's elements, so the memory from the first to the last says little. fused_cna/_memory.py has the same search.
#pragma once

#include <cstdint>
#include <span>

namespace fused_cna {

// The addresses of a tensor's elements. Strides are in elements and not negative.
struct StridedView {
    int64_t start;
    int64_t element_bytes;
    std::span<const int64_t> sizes, strides;
};

// unknown: it would take too long to find out, which it never does for slices of one tensor.
enum class Overlap { none, some, unknown };

// Whether two elements of a view lie at one address.
Overlap overlaps_itself(const StridedView& view);

// Whether an element of one lies on an element of the other.
Overlap overlaps(const StridedView& a, const StridedView& b);

// Whether both have the same elements at the same addresses; they have the same size.
bool is_same_view(const StridedView& a, const StridedView& b);

}  // namespace fused_cna
