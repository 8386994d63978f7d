// The second launch of a split reduction.
#pragma once

#include "args.h"

namespace fused_cna::implicit_gemm {

// Adds up a split's partial sums, [split_k][rows][columns] float32 in args.workspace, in a fixed order, then finishes and
// stores. `columns` is the padded number of columns of all groups, `columns_per_group` that of one. Returns null, or the
// launch error's message.
const char* launch_split_k(const ConvArgs& args, int split_k, int64_t rows, int64_t columns, int64_t columns_per_group,
                           Stream stream);

}  // namespace fused_cna::implicit_gemm
