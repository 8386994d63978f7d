"""How far results of any structure are from those in float64."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fused_cna import _accuracy

ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def leaves(value: Any, path: str = "output", _above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """What a result consists of, by the expression that gives it: tensors, and what holds no others."""
    if isinstance(value, Tensor) or id(value) in _above:
        yield path, value
        return
    if hasattr(value, "__array__") and value.dtype.kind in "biufc":
        yield path, torch.as_tensor(value)
        return
    items: Iterator[tuple[str, Any]]
    if isinstance(value, Mapping):
        items = ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (tuple, list)):
        items = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        items = ((f"{path}.{field.name}", getattr(value, field.name)) for field in fields)
    elif hasattr(value, "__dict__") and not callable(value):
        items = ((f"{path}.{name}", item) for name, item in vars(value).items())
    else:
        yield path, value
        return
    for name, item in items:
        yield from leaves(item, name, (*_above, id(value)))


def copied(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that later writes do not reach; in ``dtype`` where it is a tensor of floating-point numbers."""
    return value.detach().to(dtype if value.is_floating_point() else None, copy=True)


def error(actual: Any, exact: Any) -> float:
    """How far a leaf is from the exact one: 0 where equal, infinite where it cannot be compared.

    The relative error in the Frobenius norm for floating-point numbers, where the exact ones are finite; the
    share of elements that differ for other tensors.
    """
    if isinstance(actual, float) and isinstance(exact, float):
        actual, exact = torch.tensor(actual), torch.tensor(exact, dtype=torch.float64)
    if not isinstance(actual, Tensor) or not isinstance(exact, Tensor):
        return 0.0 if type(actual) is type(exact) and _equal(actual, exact) else float("inf")
    if actual.shape != exact.shape or actual.is_floating_point() != exact.is_floating_point():
        return float("inf")
    if actual.is_complex() and exact.is_complex():
        actual, exact = torch.view_as_real(actual), torch.view_as_real(exact)
    if actual.is_floating_point():
        # The norm is taken over parts of the first dimension, and a batch may have many.
        return _accuracy.relative_error(actual.reshape(1, -1), exact.to(actual.device).reshape(1, -1))
    return float((actual != exact.to(actual.device)).double().mean()) if actual.numel() else 0.0


def _equal(a: Any, b: Any) -> bool:
    # Objects that compare by identity are two of a kind here: one of each network.
    by_identity: Any = object.__eq__
    return type(a).__eq__ is by_identity or bool(a == b)


def roundoff(leaf: Any) -> float:
    """The unit roundoff of a leaf's dtype; of float32 where it has none."""
    dtype = leaf.dtype if isinstance(leaf, Tensor) else torch.float32
    return ROUNDOFF.get(dtype, 2.0**-24)


def is_rounded(leaf: Any) -> bool:
    """Whether a leaf is made of floating-point numbers."""
    return isinstance(leaf, float) or (
        isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    )
