"""What the operator must compute: the formula in float64, inputs to try it on, and the error measures.

Nothing here uses `fused_cna`: activations and the fold are written out as formulas, and only the sum of
products is taken from torch's float64 convolution. Beside it stand torch's own three steps, for their error.

    offset = mean - bias
    z = (conv(x, weight) - offset) * gamma / sqrt(var + eps) + beta
    y = act(z + residual) | act(z) + residual
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.shapes import ConvShape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

ACTIVATIONS: dict[str, tuple[float, ...]] = {
    "identity": (),
    "relu": (),
    "relu6": (),
    "leaky_relu": (0.2,),
    "elu": (0.7,),
    "silu": (),
    "gelu": (),
    "gelu_tanh": (),
    "hardswish": (),
    "hardsigmoid": (),
    "sigmoid": (),
    "tanh": (),
    "mish": (),
}
"""Every activation of the operator with parameters to try it with (none at the default, where it has any)."""

EXACT_ACTIVATIONS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("identity", ()),
    ("relu", ()),
    ("relu6", ()),
    ("leaky_relu", (0.125,)),
)
"""The activations that keep integer-valued problems exact."""

NORM_PARTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "no_affine": ("running_mean", "running_var"),
    "only_weight": ("running_mean", "running_var", "norm_weight"),
    "only_bias": ("running_mean", "running_var", "norm_bias"),
    "affine": ("running_mean", "running_var", "norm_weight", "norm_bias"),
}
"""Every combination of norm parameters, by name."""

TENSORS = ("x", "weight", "bias", "norm_weight", "norm_bias", "running_mean", "running_var", "residual")

FLOAT32_ERROR = 5.0
"""c of the error bound for float32: the model of a sum in chunks of 64 products.

Rounding every step of a running sum of n random products makes an error of about 0.28 sqrt(n) u: 2.3 u in a
chunk, as much again over 64 chunks, and about 1.5 u for the fold. In plain float32 arithmetic the shapes here
come to 3.6 u at most that way; with one running sum, 648 products come to 6.3 u and 2304 to 9.5 u.
"""

STORAGE_ERROR = 1.02
"""c of the error bound for 16-bit types: one rounding is at most 1 u, the float32 work adds little."""

_UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


@dataclass(frozen=True)
class Problem:
    """One call of the operator: its tensors and options."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    eps: float = 1e-5
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1
    act: str = "identity"
    act_params: Sequence[float] = ()
    residual: Tensor | None = None
    residual_order: str = "add_act"

    def replace(self, **changes: object) -> Problem:
        return dataclasses.replace(self, **changes)

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """The same problem with `function` applied to each tensor."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        return self.replace(**{name: function(value) for name, value in tensors.items() if value is not None})

    def keywords(self) -> dict[str, object]:
        """Everything but x, weight and bias, as keyword arguments of `fused_cna.conv_norm_act`."""
        names = [f.name for f in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in ("x", "weight", "bias")}

    def call(self, conv_norm_act: Callable[..., Tensor], **extra: object) -> Tensor:
        """Calls the front, or whatever has its signature."""
        return conv_norm_act(self.x, self.weight, self.bias, **self.keywords(), **extra)

    def operator_arguments(self) -> tuple[object, ...]:
        """The positional arguments of `torch.ops.fused_cna.conv_norm_act`, in the order of its schema."""
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return tuple(list(v) if isinstance(v, tuple) else v for v in values)


def act_formula(name: str, params: Sequence[float], z: Tensor) -> Tensor:
    """The activations, from their definitions."""
    if name == "identity":
        return z
    if name == "relu":
        return z.clamp(min=0)
    if name == "relu6":
        return z.clamp(0, 6)
    if name == "leaky_relu":
        return torch.where(z > 0, z, z * params[0])
    if name == "elu":
        return torch.where(z > 0, z, params[0] * torch.expm1(z.clamp(max=0)))
    if name == "silu":
        return z / (1 + torch.exp(-z))
    if name == "gelu":
        return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    if name == "hardswish":
        return z * (z + 3).clamp(0, 6) / 6
    if name == "hardsigmoid":
        return (z + 3).clamp(0, 6) / 6
    if name == "sigmoid":
        return 1 / (1 + torch.exp(-z))
    if name == "tanh":
        return torch.tanh(z)
    if name == "mish":
        return z * torch.tanh(torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0))
    raise AssertionError(f"no formula for {name}")


def expected_exactly(problem: Problem) -> Tensor:
    """The formula in float64, unrounded, contiguous, on the CPU."""
    p = problem.map(lambda tensor: tensor.detach().cpu().double())
    acc = _sum_of_products(p)
    k = acc.shape[1]

    def channels(vector: Tensor | None, missing: float) -> Tensor:
        return (torch.full((k,), missing, dtype=torch.float64) if vector is None else vector).view(k, 1, 1)

    scale, beta, mean = channels(None, 1.0), channels(p.norm_bias, 0.0), channels(p.running_mean, 0.0)
    if p.running_var is not None:
        scale = channels(p.norm_weight, 1.0) / torch.sqrt(channels(p.running_var, 1.0) + p.eps)
    z = (acc - (mean - channels(p.bias, 0.0))) * scale + beta
    if p.residual is None:
        return act_formula(p.act, p.act_params, z)
    if p.residual_order == "add_act":
        return act_formula(p.act, p.act_params, z + p.residual)
    assert p.residual_order == "act_add", p.residual_order
    return act_formula(p.act, p.act_params, z) + p.residual


def expected_rounded(problem: Problem) -> Tensor:
    """The formula in float64 rounded once to x's dtype; asserts that float32 holds it exactly before that."""
    exact = expected_exactly(problem)
    assert torch.equal(exact.float().double(), exact), "this problem is not exact in float32"
    return exact.to(problem.x.dtype)


def _sum_of_products(p: Problem) -> Tensor:
    padding = tuple(p.padding)
    top, bottom, left, right = (
        padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
    )
    x = torch.nn.functional.pad(p.x, (left, right, top, bottom))
    return torch.conv2d(x, p.weight, None, p.stride, 0, p.dilation, p.groups).contiguous()


def difference(actual: Tensor, expected: Tensor) -> str:
    """How many values differ, and the first of them, in words; empty where none does."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    wrong = ~(actual == expected)  # as a NaN is
    if not wrong.any():
        return ""
    return (
        f"{int(wrong.sum())} of {wrong.numel()} differ, the first at {wrong.nonzero()[0].tolist()}: "
        f"{actual[wrong][0]} instead of {expected[wrong][0]}"
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; infinite where `actual` has a NaN, 0 for empty tensors."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = (tensor.detach().cpu().double() for tensor in (actual, expected))
    difference = torch.linalg.vector_norm(actual - expected)
    if difference == 0:
        return 0.0
    error = float(difference / torch.linalg.vector_norm(expected))
    return math.inf if math.isnan(error) else error


def error_bound(dtype: torch.dtype, eager_error: float = 0.0) -> float:
    """max(1.05 x the eager three-step's error on the same device and dtype, c u)."""
    c = FLOAT32_ERROR if dtype in (torch.float32, torch.float64) else STORAGE_ERROR
    return max(1.05 * eager_error, c * _UNIT_ROUNDOFF[dtype])


assert_close_in_any_order = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
"""For float32 results that are to be the same but for the order in which a library sums.

In whatever order, the error of n products is below n u times the sum of their absolute values, and where this
is used that is less.
"""


def library_bound(dtype: torch.dtype, eager_error: float) -> float:
    """max(2 x the eager three-step's error, measured in the same test; a few u): for what a library sums.

    Its order of summation is its own and another on every processor, so that no constant bounds its error.
    """
    roundings = 8 if dtype in (torch.float32, torch.float64) else 3
    return max(2 * eager_error, roundings * _UNIT_ROUNDOFF[dtype])


def three_steps_error(problem: Problem) -> float:
    return relative_error(three_steps(problem), expected_exactly(problem))


def three_steps(problem: Problem) -> Tensor:
    """What users write by hand, in the problem's own dtype, with torch's own functions."""
    x, padding = problem.x, problem.padding
    if len(padding) == 4:
        top, bottom, left, right = padding
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    z = F.conv2d(x, problem.weight, problem.bias, problem.stride, padding, problem.dilation, problem.groups)
    if problem.running_mean is not None:
        parts = (problem.running_mean, problem.running_var, problem.norm_weight, problem.norm_bias)
        z = F.batch_norm(z, *parts, training=False, eps=problem.eps)
    if problem.residual is not None and problem.residual_order == "add_act":
        z = z + problem.residual
    y = _TORCH_ACTIVATIONS[problem.act](z, *problem.act_params)
    return y + problem.residual if problem.residual is not None and problem.residual_order == "act_add" else y


_TORCH_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda z: z,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    **{
        name: getattr(F, name)
        for name in ("relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish", "hardsigmoid", "mish")
    },
}


def unit_roundoff(dtype: torch.dtype) -> float:
    return _UNIT_ROUNDOFF[dtype]


@dataclass(frozen=True)
class Wanted:
    """What a generated problem has besides its shape and dtype."""

    act: str = "identity"
    act_params: tuple[float, ...] = ()
    norm: str = "affine"
    bias: bool = True
    norm_dtype: torch.dtype = torch.float32
    residual_order: str | None = None
    seed: int = 0


DEFAULT = Wanted()


def integer_problem(shape: ConvShape, dtype: torch.dtype, wanted: Wanted = DEFAULT) -> Problem:
    """Integers, and a fold by powers of two: exact in float32 in any order of summation.

    Values up to 7 are exact in every storage type (and in tf32), and sums stay under 2^20, which leaves four
    bits for the fold, the leaky_relu(1/8) and the residual. Results are not integers only, so that a 16-bit
    store rounds.
    """
    assert shape.reduction * 49 < 2**20, f"{shape.name} is too long to stay exact"
    generator = torch.Generator().manual_seed(wanted.seed)

    def integers(limit: int, *size: int) -> Tensor:
        return torch.randint(-limit, limit + 1, size, generator=generator).float()

    def powers(exponents: Sequence[int]) -> Tensor:
        chosen = torch.randint(0, len(exponents), (shape.k,), generator=generator)
        return torch.pow(2.0, torch.tensor(exponents, dtype=torch.float32))[chosen]

    signs = 2.0 * torch.randint(0, 2, (shape.k,), generator=generator) - 1
    return _assemble(
        shape,
        dtype,
        wanted,
        eps=0.0,
        x=integers(7, *shape.x_size),
        weight=integers(7, *shape.weight_size),
        bias=integers(20, shape.k),
        norm_weight=powers((-1, 0, 1)) * signs,
        norm_bias=integers(80, shape.k) / 4,
        running_mean=integers(50, shape.k),
        running_var=powers((-2, 0, 2)),
        residual=integers(100, *shape.output_size),
    )


def random_problem(shape: ConvShape, dtype: torch.dtype, wanted: Wanted = DEFAULT) -> Problem:
    """What a trained network sees: activations, He-scaled weights, the statistics of the very sums."""
    generator = torch.Generator().manual_seed(wanted.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x = torch.nn.functional.silu(normal(*shape.x_size)) * 1.5
    weight = normal(*shape.weight_size) * math.sqrt(2 / shape.reduction)
    bias = 0.2 * normal(shape.k) if wanted.bias else torch.zeros(shape.k)
    sums = _sum_of_products(Problem(x.double(), weight.double(), **shape.options()))
    sums = sums.transpose(0, 1).flatten(1) + bias.double()[:, None]
    has_pixels = sums.shape[1] > 0
    return _assemble(
        shape,
        dtype,
        wanted,
        eps=1e-5,
        x=x,
        weight=weight,
        bias=bias,
        norm_weight=1 + 0.25 * normal(shape.k),
        norm_bias=0.3 * normal(shape.k),
        running_mean=sums.mean(1).float() if has_pixels else torch.zeros(shape.k),
        # half of it from elsewhere, as two pixels alone may have next to no variance
        running_var=0.5 + 0.5 * (sums.var(1, correction=0).float() if has_pixels else torch.ones(shape.k)),
        residual=normal(*shape.output_size),
    )


def _assemble(
    shape: ConvShape, dtype: torch.dtype, wanted: Wanted, *, eps: float, **tensors: Tensor
) -> Problem:
    kept: dict[str, Tensor] = {name: tensors[name].to(dtype) for name in ("x", "weight")}
    if wanted.bias:
        kept["bias"] = tensors["bias"].to(dtype)
    for name in NORM_PARTS[wanted.norm]:
        kept[name] = tensors[name].to(wanted.norm_dtype)
    if wanted.residual_order is not None:
        kept["residual"] = tensors["residual"].to(dtype)
    return Problem(
        **kept,
        **shape.options(),
        eps=eps,
        act=wanted.act,
        act_params=wanted.act_params,
        residual_order=wanted.residual_order or "add_act",
    )
