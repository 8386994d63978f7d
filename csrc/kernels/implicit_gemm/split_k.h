// The second launch of a split reduction.
#pragma once

#include "args.h"

namespace fused_cna::implicit_gemm {

// Adds up the partial sums of a split in a fixed order, [split_k][rows][columns] float32 in args.workspace, then finishes
// and stores. `columns` counts the padded columns of all groups, `columns_per_group` those of one. Returns null, or the
// launch error in words.
const char* launch_split_k(const ConvArgs& args, int split_k, int64_t rows, int64_t columns, int64_t columns_per_group,
                           Stream stream);

}  // namespace fused_cna::implicit_gemm
