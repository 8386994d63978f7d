// Whether strided views share memory, element by element. Channel slices of a channels_last tensor interleave, so comparing
// first and last addresses is not enough. fused_cna/_memory.py has the same search.
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

// unknown: the search would take too long; never the case for slices of one tensor.
enum class Overlap { none, some, unknown };

// Whether two elements of a view have the same address.
Overlap overlaps_itself(const StridedView& view);

// Whether an element of one view overlaps an element of the other.
Overlap overlaps(const StridedView& a, const StridedView& b);

// Whether two views of the same size have the same elements at the same addresses.
bool is_same_view(const StridedView& a, const StridedView& b);

}  // namespace fused_cna
