"""The faults: one change each, of the kinds that people make, with the tests that are to see it.

A fault is a line with its name, one with the file in csrc/kernels and the tests (the file `test_X.py` as X,
then what `pytest -k` takes), the code as it is, behind `-`, and as the fault has it, behind `+`. Every one
changes what a kernel does: one that only costs speed cannot be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Selection:
    """Some of the tests."""

    file: str
    expression: str

    @property
    def arguments(self) -> tuple[str, ...]:
        """What pytest is told."""
        return (f"tests/test_{self.file}.py", "-k", self.expression)

    @property
    def targets(self) -> tuple[str, ...]:
        """What of the simulator they run."""
        is_sanitized = any(word in self.expression for word in ("sanitizers", "no_access_outside"))
        return ("conv", "conv_sanitized") if is_sanitized else ("conv",)


@dataclass(frozen=True)
class Fault:
    """A change of one place in a file under csrc/kernels, and the tests that are to see it."""

    name: str
    file: Path
    old: str
    new: str
    tests: Selection


def read(text: str) -> tuple[Fault, ...]:
    """The faults of a table: blocks of lines with a blank one between them."""
    return tuple(_fault(*block.splitlines()) for block in text.strip().split("\n\n"))


def _fault(name: str, where: str, *lines: str) -> Fault:
    file, _, tests = where.partition(" | ")
    old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
    return Fault(name, Path(file), old, new, Selection(*tests.split(maxsplit=1)))


FAULTS = read("""
direct: no barrier behind a step's products
direct/kernel.cuh | conformance integers_are_exact and direct-float16
-         multiply(shared, depth, total);
-         device::sync_threads();
+         multiply(shared, depth, total);

direct: the stride across for the one down
direct/kernel.cuh | conformance integers_are_exact and direct-float16
- pixel.p * problem.stride_h
+ pixel.p * problem.stride_w

direct: one running sum
direct/kernel.cuh | conformance random_inputs_stay and direct-float32
- chunk[i][j] = fmaf(x[i], weight[j], chunk[i][j]);
+ total[i][j] = fmaf(x[i], weight[j], total[i][j]);

epilogue: the residual on the wrong side of the activation
common/epilogue.cuh | conformance integers_are_exact and direct-float16
- order == ResidualOrder::add_act
+ order == ResidualOrder::act_add

epilogue: 16 bytes stored past the last channel
common/epilogue.cuh | conformance writes_where_it_is_told and small_m
- return valid == Width && stride == 1 && are_aligned;
+ return stride == 1 && are_aligned;

fold: eps outside of the root
common/fold.cuh | kernels eps_is_added
- sqrtf(var_.as_float(is_float32) + epilogue.eps)
+ (sqrtf(var_.as_float(is_float32)) + epilogue.eps)

residual queue: the wait leaves the turn itself under way
common/residual.cuh | conformance adds_a_residual_in_any_layout and sm80
- device::wait_copies<Depth - 1>();
+ device::wait_copies<Depth>();

gather: a mask of 32 taps shifts by 32
common/gather_rows.cuh | conformance integers_are_exact and sm80-float16-filter_
- return end < 32 ? (1u << end) - 1 : ~0u;
+ return (1u << end) - 1;

gather: the image's offset in 32 bits
common/gather_rows.cuh | layouts reaches_beyond_32_bits and sm80
- offsets_[i] = pixel.n * x.n_bytes +
+ offsets_[i] = static_cast<int>(pixel.n * x.n_bytes) +

implicit GEMM: the wait leaves the step's copies under way
implicit_gemm/kernel.cuh | conformance integers_are_exact and sm80-float16
- device::wait_copies<Traits::stages - 2>();
+ device::wait_copies<Traits::stages - 1>();

implicit GEMM: no barrier before a stage is read and another filled
implicit_gemm/kernel.cuh | conformance integers_are_exact and sm80-float16
-     device::wait_copies<Traits::stages - 2>();
-     device::sync_threads();
+     device::wait_copies<Traits::stages - 2>();

implicit GEMM: the stages do not wrap around
implicit_gemm/kernel.cuh | conformance integers_are_exact and sm80-float16
- return stage + stage_bytes == end ? 0 : stage + stage_bytes;
+ return stage + stage_bytes;

implicit GEMM: shares of a split overlap
implicit_gemm/kernel.cuh | gemm_kernels every_split_is_exact and sm80
- const int steps = remaining < args.steps_per_split ? remaining : args.steps_per_split;
+ const int steps = remaining;

implicit GEMM: a swizzle by the wrong bit of the lane
implicit_gemm/tensor_cores.cuh | conformance integers_are_exact and sm80-float16
- (weight_row, lane / 8 % 2)
+ (weight_row, lane / 16)

implicit GEMM: the weight is truncated to tf32
implicit_gemm/tensor_cores.cuh | conformance tf32_rounds_operands and sm80
-             round_to_tf32(fragments.weight);

implicit GEMM: a product of columns that do not exist is made again
implicit_gemm/exact_sum.cuh | gemm_kernels no_access_outside and tf32x3
- const bool exists = row < rows_of_output && column < block.columns;
+ const bool exists = row < rows_of_output;

split: the last share is left out
implicit_gemm/split_k.cuh | gemm_kernels every_split_is_exact and sm80
- for (int split = 0; split < args.split_k; ++split)
+ for (int split = 0; split < args.split_k - 1; ++split)

split: the sums are read before the kernel that makes them has ended
implicit_gemm/split_k.cuh | conformance waits_for_the_kernel_ahead and sm80
-     device::await_prerequisites();
-     device::launch_dependents();
+     device::launch_dependents();

sm90: a stage is filled that may still be read
implicit_gemm_sm90/producer.cuh | conformance integers_are_exact and sm90-float16
-             device::wait(shared.empty[ring.stage], ring.parity ^ 1);
-             device::arrive_expecting(
+             device::arrive_expecting(

sm90: gathered operands are not fenced for the products
implicit_gemm_sm90/producer.cuh | conformance integers_are_exact and sm90-float16
-         device::fence_async_proxy();
-         device::arrive(shared_.full[finished_.stage]);
+         device::arrive(shared_.full[finished_.stage]);

sm90: the last products are not waited for
implicit_gemm_sm90/kernel.cuh | conformance integers_are_exact and sm90-float16
-     device::wait_products<0>();

sm90: wrong byte count of the weight's copies
implicit_gemm_sm90/operands.cuh | conformance integers_are_exact and sm90-float16
- (args.weight_by_map ? Traits::n * Traits::row_bytes : 0)
+ (args.weight_by_map ? Traits::m * Traits::row_bytes : 0)

sm90: the parity of a ring that is skipped through more than once
implicit_gemm_sm90/operands.cuh | conformance integers_are_exact and sm90-float16
- parity ^= stage / Stages & 1;
+ parity ^= stage >= Stages;

sm90: the residual overwrites output on its way out
implicit_gemm_sm90/epilogue.cuh | hopper_kernel residual_that_a_map_brings and float16
-         if (!args_.residual_by_map || !group_.leads()) return;
-         device::wait_stores_read<0>();
+         if (!args_.residual_by_map || !group_.leads()) return;

sm90: a share of the cluster's sums is added twice
implicit_gemm_sm90/epilogue.cuh | hopper_kernel every_cluster_is_exact and float16
- for (int share = 0; share < split(); share += 2)
+ for (int share = 0; share < split(); share += 1)

sm90: blocks leave whose sums are still read
implicit_gemm_sm90/kernel.cuh | hopper_kernel every_cluster_is_exact and float16
- if (args.split.value > 1) device::await_cluster();

sm90: sums are rounded before the fold
implicit_gemm_sm90/epilogue.cuh | conformance rounded_once and sm90
- values[i] = half == 0 ? own[i] : own[8 + i];
+ values[i] = device::to_float(device::from_float<T>(half == 0 ? own[i] : own[8 + i]));

sm90: the map's step across for the one down
implicit_gemm_sm90/maps.cu | conformance integers_are_exact and sm90-float16
- map.step_h = static_cast<int>(p.stride_h);
+ map.step_h = static_cast<int>(p.stride_w);

small_m: loads past a tap's last channel
small_m/kernel.cuh | conformance integers_are_exact and small_m-float16
- at.values = Block::smaller(Traits::values, args_.c_per_group - at.c);
+ at.values = Traits::values;

small_m: the dilation down for the one across
small_m/kernel.cuh | conformance integers_are_exact and small_m-float16
- w = at.s * static_cast<int>(problem.dil_w)
+ w = at.s * static_cast<int>(problem.dil_h)

depthwise: the pad above for the one on the left
depthwise/kernel.cuh | conformance integers_are_exact and depthwise-float16
- strip.q * stride - static_cast<int>(problem.pad_left)
+ strip.q * stride - static_cast<int>(problem.pad_top)

depthwise: the residual of the wrong pixel
depthwise/kernel.cuh | conformance adds_a_residual_in_any_layout and depthwise-
- place.residual += conv.residual_strides.w;
+ place.residual += conv.y_strides.w;

depthwise: weights are overwritten while others read them
depthwise/kernel.cuh | conformance integers_are_exact and depthwise-float16-9x9
-                 device::sync_threads();
-                 load_weights(args, thread, first_tap, taps, shared);
+                 load_weights(args, thread, first_tap, taps, shared);

toeplitz: a pass that starts within a strip's rows skips in the wrong one
depthwise_toeplitz/kernel.cuh | conformance integers_are_exact and toeplitz-float16
- if ((first_row + row + 1) % strip_rows == 0)
+ if ((row + 1) % strip_rows == 0)

toeplitz: rows behind the last are stored
depthwise_toeplitz/kernel.cuh | conformance integers_are_exact and toeplitz-float16
- .rows = rows < strip_rows ? rows : strip_rows,
+ .rows = strip_rows,

grouped: operands are read before they have landed
grouped/kernel.cuh | conformance integers_are_exact and grouped-float16
-     device::wait_copies<0>();

grouped: folds of the first columns for all
grouped/kernel.cuh | conformance integers_are_exact and grouped-float16
- if (piece != folds_of)
+ if (folds_of < 0)

grouped: reads past the last group's channels
grouped/operands.cuh | conformance sanitizers_accept and grouped
- w >= 0 && byte < bytes;
+ w >= 0;

stem: the remainder of a negative column
stem/operands.cuh | conformance integers_are_exact and stem-float16
- first_w & (Traits::pixels_per_unit - 1)
+ first_w % Traits::pixels_per_unit

stem: the height of the output for its width
stem/operands.cuh | conformance integers_are_exact and stem-float16
- origin.q + q < args.q
+ origin.q + q < args.p
""")
