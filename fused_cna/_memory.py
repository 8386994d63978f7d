"""Whether a result may be written where the caller says: for no gradient, nothing twice, on no input.

Views of one tensor may lie between each other's elements without touching, as channel slices of a
channels_last tensor do, so elements are compared and not the memory from the first to the last.
csrc/torch/overlap.cpp has the same search; tests hold the two to the same answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

# Far more than slices of one tensor need: they leave two numbers to try per dimension at most.
_MOST_STEPS = 4096


class _TooLongError(Exception):
    """The search was given up."""


@dataclass
class _Term:
    """``step`` times a whole number from ``lowest`` to ``highest``."""

    step: int
    lowest: int
    highest: int


class _Search:
    """Looks for numbers, one for each term, with which the terms add up to a target."""

    def __init__(self, terms: Iterable[_Term]) -> None:
        self.terms = sorted(terms, key=lambda term: -term.step)
        self.steps = 0

    def finds(self, target: int, first: int = 0) -> bool:
        """Whether there are such numbers for ``terms[first:]``; few are tried where steps are nested."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise _TooLongError
        if first == len(self.terms):
            return target == 0
        term, rest = self.terms[first], self.terms[first + 1 :]
        least = -((sum(other.step * other.highest for other in rest) - target) // term.step)
        most = (target - sum(other.step * other.lowest for other in rest)) // term.step
        numbers = range(max(term.lowest, least), min(term.highest, most) + 1)
        return any(self.finds(target - number * term.step, first + 1) for number in numbers)


@dataclass(frozen=True)
class View:
    """The addresses of a tensor's elements."""

    start: Any
    element_bytes: int
    sizes: Sequence[Any]
    strides: Sequence[Any]

    @property
    def end(self) -> Any:
        """The address behind the last element."""
        return (
            self.start + self.element_bytes + sum(stride * (size - 1) for stride, size in self.dimensions())
        )

    def dimensions(self) -> list[tuple[int, int]]:
        """(stride in bytes, size) of every dimension that is stepped along."""
        pairs = zip(self.strides, self.sizes, strict=True)
        return [(stride * self.element_bytes, size) for stride, size in pairs if size > 1]


def overlaps_itself(view: View) -> bool | None:
    """Whether two elements lie at one address; None where that would take too long to find out."""
    dimensions = view.dimensions()
    if 0 in view.sizes:
        return False
    if any(stride == 0 for stride, _ in dimensions):
        return True
    dimensions.sort(reverse=True)
    try:
        # Two elements that are the same up to dimension i differ there, the second being further on.
        return any(
            _Search(
                [_Term(step, 1, size - 1), *(_Term(s, 1 - n, n - 1) for s, n in dimensions[i + 1 :])]
            ).finds(0)
            for i, (step, size) in enumerate(dimensions)
        )
    except _TooLongError:
        return None


def overlaps(a: View, b: View) -> bool | None:
    """Whether an element of one lies on one of the other; None where that would take too long to find out."""
    if 0 in a.sizes or 0 in b.sizes or a.end <= b.start or b.end <= a.start:
        return False
    terms: dict[int, _Term] = {}

    def add(step: int, lowest: int, highest: int) -> None:
        term = terms.setdefault(step, _Term(step, 0, 0))
        term.lowest += lowest
        term.highest += highest

    for step, size in (*a.dimensions(), (1, a.element_bytes)):
        add(step, 0, size - 1)
    for step, size in (*b.dimensions(), (1, b.element_bytes)):
        add(step, 1 - size, 0)
    terms.pop(0, None)
    try:
        return _Search(terms.values()).finds(b.start - a.start)
    except _TooLongError:
        return None


def _view(tensor: Tensor) -> tuple[object, View] | None:
    """Which memory a tensor lies in, and where; None where that is not known yet.

    Real tensors share one memory, in which the same bytes may be known under several storages.
    """
    if is_functorch_wrapped_tensor(tensor):
        return None
    sizes, strides, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
    if any(isinstance(number, torch.SymInt) for number in (*sizes, *strides, offset)):
        return None
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        start = offset * tensor.element_size()
        return tensor.untyped_storage()._cdata, View(start, tensor.element_size(), sizes, strides)
    return "real", View(tensor.data_ptr(), tensor.element_size(), sizes, strides)


def _is_same_view(a: View, b: View) -> bool:
    return a.start == b.start and a.dimensions() == b.dimensions()


def _describe(view: View) -> str:
    return f"size {list(view.sizes)} and strides {list(view.strides)}"


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def refuse_gradient(tensors: Iterable[Tensor | None]) -> None:
    """Refuse to write a result into given memory where a gradient through it is wanted.

    Raises:
        RuntimeError: grad mode is on and one of the tensors requires a gradient, or one has a tangent.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if backward or (forward_ad._current_level >= 0 and any(map(_has_tangent, given))):
        raise RuntimeError(
            "conv_norm_act(): functions with out=... arguments don't support automatic differentiation, but "
            "one of the arguments requires grad; call it in torch.inference_mode() or torch.no_grad(), or "
            "without out"
        )


def check_out_memory(out: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """Refuse an ``out`` of which elements share memory with each other or with an input.

    The input "residual" may be ``out`` itself, because every element is read before it is written. Nothing is
    refused where addresses are not known yet: while Dynamo traces, for symbolic sizes, inside torch.func.

    Raises:
        RuntimeError: in the words of torch where it has some.
    """
    if torch.compiler.is_dynamo_compiling():
        return
    placed = _view(out)
    if placed is None:
        return
    memory, written = placed
    itself = overlaps_itself(written)
    if itself is not False:
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor "
            f"{'may refer' if itself is None else 'refers'} to a single memory location: out has "
            f"{_describe(written)}. Give every element of out a place of its own"
        )
    for name, tensor in inputs.items():
        placed = None if tensor is None else _view(tensor)
        if placed is None or placed[0] != memory:
            continue
        read = placed[1]
        if name == "residual" and _is_same_view(read, written):
            continue
        shared = overlaps(read, written)
        if shared is not False:
            raise RuntimeError(_overlap_message(name, read, written, certain=shared is not None))


def _overlap_message(name: str, read: View, written: View, certain: bool) -> str:
    distance = written.start - read.start
    way_out = ", or pass out itself as residual" if name == "residual" else ""
    return (
        f"unsupported operation: some elements of the input tensor {name} and the written-to tensor "
        f"{'refer' if certain else 'may refer'} to a single memory location: {name} has {_describe(read)}, "
        f"out starts {abs(distance)} bytes {'before' if distance < 0 else 'behind'} it and has "
        f"{_describe(written)}. Please clone() {name} before performing the operation{way_out}"
    )
