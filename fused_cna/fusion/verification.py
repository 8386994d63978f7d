"""Whether a fused network computes what the original does: at every boundary of a block, and at the end.

Both run on the same inputs, and the original in float64 as well, from which errors are measured:

- What a block computes of its arguments, against the formula on the modules of the original. The error of a
  kernel may be ``max(1.05 e, c u)``, its contract, with ``e`` that of the modules one after another, ``u``
  the unit roundoff and ``c`` the constant of the kernels. On a CPU, where PyTorch and oneDNN sum in an order
  that depends on the layout, and for snapshots, whose weights are rounded once more, it may be three times
  that, in float32 also ``64 u``.
- What a convolution gets, and what the network returns, against the original in float64. The error may be
  ``max(8 e, 64 u)`` in float32 and ``max(3 e, 16 u)`` in 16-bit types, with ``e`` the largest error up to
  there of the original itself. So a network that amplifies rounding errors is allowed as much, and no more
  than that. Where the original does not run in float64, it is compared with itself as it is, and ``1000 u``
  is allowed.

- A result that differs by more, such as that of a detector where boxes of nearly the same score have changed
  places, is compared with runs of the original in which the inputs of convolutions have random errors three
  times as large as the largest that the fused network made: ``e`` is then the largest error of six such runs.

Of integers that a network returns, functions of rounded numbers, one in a thousand may differ besides.
"""

import contextlib
import math
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fused_cna._recording import operator_everywhere
from fused_cna.fusion import comparing
from fused_cna.fusion.boundaries import (
    Block,
    bound,
    computed_by,
    convs_outside,
    find_blocks,
    input_of,
    modules_of_blocks,
    watch_calls,
    watch_convs,
)
from fused_cna.fusion.frozen import FrozenConv
from fused_cna.fusion.handover import FusedConv
from fused_cna.fusion.records import NAME as RECORD
from fused_cna.fusion.records import FusionError
from fused_cna.fusion.reference_runs import (
    Run,
    copied,
    dtype_of,
    outputs_of,
    own_run,
    perturbed_outputs,
    try_run,
    words_of,
)

_TIMES_OWN_ERROR, _ROUNDOFFS = 8.0, 64.0
_TIMES_OWN_ERROR_16_BIT, _ROUNDOFFS_16_BIT = 3.0, 16.0
_ROUNDOFFS_UNMEASURED = 1000.0
_INTEGERS = 1e-3
_TIMES_ERROR, _TRIALS = 3.0, 6


def verify_fused(original: nn.Module, fused: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse a fused network that computes something else than the original on example inputs.

    Compares in the dtype of the network, and before that in float32 where it is float16 or bfloat16 and not
    frozen. A network in training mode is compared in eval mode. Copies are run, so that neither network
    changes; what convolutions get is kept in float64, so a small batch is best.

    Args:
        original: the network before it was fused.
        fused: what :func:`fuse` made of it.
        inputs: the arguments of a call.

    Raises:
        FusionError: something differs: names the first layer that does, by how much, and what was allowed. Or
            nothing can be said: the original fails on the inputs, or is not deterministic, or no block ran.
    """
    devices = sorted({p.device.index for p in original.parameters() if p.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices):
        dtype = dtype_of(original)
        own = own_run(original, inputs)
        exact = try_run(original, inputs, torch.float64) if dtype != torch.float64 else None
        if dtype in (torch.float16, torch.bfloat16) and not _is_frozen(fused):
            wide = try_run(original, inputs, torch.float32)
            if wide is not None:
                _Comparison(original, fused, inputs, torch.float32, wide, exact).run()
        _Comparison(original, fused, inputs, None, own, exact).run()


def _is_frozen(fused: nn.Module) -> bool:
    return any(isinstance(module, FrozenConv) for _, module in modules_of_blocks(fused))


class _Comparison:
    """One run of the fused network, beside one of the original in the same dtype and an exact one."""

    def __init__(
        self,
        original: nn.Module,
        fused: nn.Module,
        inputs: tuple[Any, ...],
        dtype: torch.dtype | None,
        own: Run,
        exact: Run | None,
    ) -> None:
        self._original = original
        self._kind = type(original).__name__
        self._inputs = inputs
        self._dtype = dtype
        self._dtype_words = words_of(dtype or dtype_of(original))
        self._own = own
        self._exact = exact or own
        self._is_measured = exact is not None
        self._fused, self._unobserved = copied(fused, dtype), copied(fused, dtype)
        record = getattr(fused, RECORD, None)
        self._recorded = {} if record is None else {layer.name: layer.parts for layer in record.layers}
        self._blocks = find_blocks(self._fused, copied(original, dtype))
        self._own_errors: dict[str, list[float]] = {}
        """The largest error of the original up to each call of a convolution."""
        self._largest_own_error = 0.0
        self._largest_error = 0.0
        self._calls: dict[str, list[int]] = {}
        self._made: list[tuple[weakref.ref[Tensor], str]] = []
        self._perturbed: list[dict[str, Any]] | None = None
        self._first_difference = ""

    def run(self) -> None:
        self._measure_own_errors()
        self._compare_outputs(self._run_fused(), "though every convolution gets what it gets there")
        self._compare_outputs(self._call_fused(self._unobserved), "but only when nothing observes the run")
        if self._first_difference:
            raise FusionError(
                f"the fused {self._kind} does not compute what the original does. The first difference, in "
                f"{self._dtype_words}: {self._first_difference}"
            )
        self._check_all_ran()

    def _measure_own_errors(self) -> None:
        for name, x in self._own.conv_inputs:
            errors = self._own_errors.setdefault(name, [])
            own = self._exact.error_of_input(name, len(errors), x)
            self._largest_own_error = max(self._largest_own_error, own)
            errors.append(self._largest_own_error)

    def _run_fused(self) -> dict[str, Any]:
        for block in self._blocks:
            self._watch(block)
        watch_convs(self._fused, self._check_input, convs_outside(self._fused))
        watch_calls(self._fused, self._check_call)
        # On a CPU, convolutions within Python code would run as they were written.
        handed = any(isinstance(module, FusedConv) for module in self._fused.modules())
        with operator_everywhere() if handed else contextlib.nullcontext():
            return self._call_fused(self._fused)

    def _call_fused(self, fused: nn.Module) -> dict[str, Any]:
        try:
            return outputs_of(fused, self._inputs, self._dtype)
        except Exception as error:
            raise FusionError(
                f"the fused {self._kind} fails on the example inputs, where the original runs"
                f"{self._after_last()}: {error}"
            ) from error

    def _after_last(self) -> str:
        return f", after {self._made[-1][1]}" if self._made else ""

    def _watch(self, block: Block) -> None:
        arguments: list[tuple[Any, Any]] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            residual = args[1] if len(args) > 1 else kwargs.get("residual")
            # A snapshot may compute the sum in the memory of the residual.
            kept = comparing.copied(residual) if isinstance(residual, Tensor) else residual
            arguments.append((input_of(args, kwargs), kept))

        def after(module: nn.Module, args: Any, y: Any) -> None:
            self._check_block(block, *arguments.pop(), y)

        block.module.register_forward_pre_hook(before, with_kwargs=True)
        block.module.register_forward_hook(after)

    def _check_block(self, block: Block, x: Tensor, residual: Any, y: Tensor) -> None:
        self._check_input(block.name, block.padded(x))
        recorded, computed = self._recorded.get(block.name, ""), computed_by(block.live, residual)
        if recorded and computed and recorded != computed:
            self._note(f"{block.name} is to compute {recorded}, but computes {computed}")
        exact = block.exactly(x, residual)
        allowed = block.bound(y, comparing.error(block.eagerly(x, residual), exact))
        self._check_result(f"{block.name} ({recorded or computed})", y, exact, allowed)
        self._made.append((weakref.ref(y), block.name))

    def _check_call(self, name: str, y: Tensor, eager: Tensor, exact: Tensor) -> None:
        name = f"the convolution by {name}"
        self._check_result(name, y, exact, bound(y, comparing.error(eager, exact), is_snapshot=False))
        self._made.append((weakref.ref(y), name))

    def _check_result(self, name: str, y: Tensor, exact: Tensor, allowed: float) -> None:
        error = comparing.error(y, exact)
        if error > allowed:
            self._note(f"{name} does not compute its formula: {_numbers(error, allowed)}")

    def _check_input(self, name: str, x: Any) -> None:
        known = self._own_errors.get(name)
        if known is None:
            return
        left = self._calls.setdefault(name, list(range(len(known))))
        if not left:
            self._note(f"{name} runs more often than in the original, where it runs {len(known)} times")
            return
        # Calls of one convolution may have changed places.
        errors = {call: self._exact.error_of_input(name, call, x) for call in left}
        call = min(errors, key=errors.__getitem__)
        left.remove(call)
        self._largest_error = max(self._largest_error, errors[call])
        allowed = self._allowed(x, known[call])
        if errors[call] > allowed:
            self._note(f"{self._source_of(x, name)}: {_numbers(errors[call], allowed)}")

    def _source_of(self, x: Any, name: str) -> str:
        for made, block in reversed(self._made):
            if made() is x:
                return f"{block} computes its formula, but not what the original hands to {name} in its place"
        before = f"; the last block before it is {self._made[-1][1]}" if self._made else ""
        return f"the input of {name} is not what the original gives it{before}"

    def _allowed(self, leaf: Any, own_error: float) -> float:
        if not comparing.is_rounded(leaf):
            return max(_TIMES_OWN_ERROR * own_error, _INTEGERS) if isinstance(leaf, Tensor) else 0.0
        times, roundoffs = _TIMES_OWN_ERROR, _ROUNDOFFS
        if comparing.roundoff(leaf) >= comparing.ROUNDOFF[torch.float16]:
            times, roundoffs = _TIMES_OWN_ERROR_16_BIT, _ROUNDOFFS_16_BIT
        if not self._is_measured:
            roundoffs = _ROUNDOFFS_UNMEASURED
        return max(times * own_error, roundoffs * comparing.roundoff(leaf))

    def _compare_outputs(self, fused_outputs: dict[str, Any], circumstance: str) -> None:
        outputs = self._own.outputs
        if list(outputs) != list(fused_outputs):
            only = sorted(set(outputs) ^ set(fused_outputs))
            self._note(f"the result has other parts{self._after_last()}: {', '.join(only[:5])}")
        for path in [path for path in outputs if path in fused_outputs and path in self._exact.outputs]:
            leaf, exact = fused_outputs[path], self._exact.outputs[path]
            own = comparing.error(outputs[path], exact)
            if comparing.is_rounded(leaf):
                own = max(own, self._largest_own_error)
            error, allowed = comparing.error(leaf, exact), self._allowed(leaf, own)
            if allowed < error:
                allowed = self._allowed(leaf, max(own, self._sensitivity(path)))
            if error > allowed:
                self._note(
                    f"{path} is not what the original returns, {circumstance}{self._last_words()}: "
                    f"{_numbers(error, allowed)}"
                )

    def _sensitivity(self, path: str) -> float:
        """How much of a result is decided by errors of the size of those that the fused network makes."""
        if self._perturbed is None:
            size = _TIMES_ERROR * max(self._largest_error, comparing.ROUNDOFF[torch.float64])
            dtype = torch.float64 if self._is_measured else self._dtype
            self._perturbed = [
                perturbed_outputs(self._original, self._inputs, dtype, size, seed) for seed in range(_TRIALS)
            ]
        exact = self._exact.outputs[path]
        found = [
            comparing.error(outputs[path], exact) if path in outputs else math.inf
            for outputs in self._perturbed
        ]
        return max(found)

    def _last_words(self) -> str:
        return f"; the last block is {self._made[-1][1]}" if self._made else ""

    def _note(self, difference: str) -> None:
        self._first_difference = self._first_difference or difference

    def _check_all_ran(self) -> None:
        ran = {name for _, name in self._made}
        idle = sorted({block.name for block in self._blocks} - ran)
        if not idle:
            return
        message = (
            f"{len(idle)} of {len(idle) + len(ran)} fused blocks of {self._kind} do not run on the example "
            f"inputs, such as {idle[0]}, so nothing is known of them; a fused network runs as it was written "
            "when it is called with more than its tensors, or a module of it is hooked or in training mode"
        )
        if not ran:
            raise FusionError(message)
        warnings.warn(message, stacklevel=5)


def _numbers(error: float, allowed: float) -> str:
    if math.isinf(error):
        return "another shape or dtype, or numbers that are not finite"
    return f"relative error {error:.2g}, allowed is {allowed:.2g}"
