"""What would run for a convolution, on which device, and why: :func:`explain`."""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_cna import _extension
from fused_cna._checks import explicit_padding, pair
from fused_cna.modules import ConvNormAct

DEFAULT_DEVICE = "H100"


def _plan_module() -> ModuleType:
    try:
        return importlib.import_module("fused_cna._plan")
    except ImportError as error:
        raise RuntimeError(
            f"explain needs fused_cna's compiled planner, which could not be imported ({error}); with a C++ "
            "compiler there, in a checkout of fused_cna: "
            "pip install --no-build-isolation --force-reinstall --no-deps ."
        ) from error


@dataclass(frozen=True)
class ConvProblem:
    """One convolution, without tensors. Ints stand for pairs where ``nn.Conv2d`` takes both.

    Args:
        n, c, h, w: size of the input.
        k, r, s: output channels, filter height, filter width.
        stride, dilation: in input pixels, one number or (height, width).
        padding: one number, (height, width) or (top, bottom, left, right).
        groups: divides c and k.
        dtype: of input and weight.
        channels_last: whether both are dense channels_last; else dense contiguous.

    Raises:
        ValueError: a size that is not positive, ``groups`` that does not divide the channels, or a filter
            larger than the padded input.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    dtype: torch.dtype = torch.float16
    channels_last: bool = True

    def __post_init__(self) -> None:
        for name in ("n", "c", "h", "w", "k", "r", "s", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}")
        if self.c % self.groups or self.k % self.groups:
            raise ValueError(
                f"groups must divide c and k, but got groups={self.groups}, c={self.c}, k={self.k}"
            )
        fields = self._fields()
        top, bottom, left, right = fields["padding"]
        for size, pads, i in ((self.h, top + bottom, 0), (self.w, left + right, 1)):
            extent = fields["dilation"][i] * ((self.r, self.s)[i] - 1) + 1
            if extent > size + pads:
                raise ValueError(
                    f"the filter must fit the padded input, but it spans {extent} pixels of {size + pads} "
                    f"in {self}"
                )

    def _fields(self) -> dict[str, Any]:
        """The numbers as the planner takes them."""
        padding = explicit_padding(self.padding, (self.r, self.s), (1, 1), (1, 1))
        if len(padding) == 2:
            padding = (padding[0], padding[0], padding[1], padding[1])
        sizes = {name: getattr(self, name) for name in ("n", "c", "h", "w", "k", "r", "s", "groups")}
        return {
            **sizes,
            "stride": pair(self.stride, "stride"),
            "padding": padding,
            "dilation": pair(self.dilation, "dilation"),
            "dtype": str(self.dtype).removeprefix("torch."),
            "allow_tf32": torch.backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore[attr-defined]
        }

    def question(self) -> dict[str, Any]:
        """The problem as the planner takes it, with operands that lie as ``channels_last`` says."""
        x = _dense_strides(self.c, self.h, self.w, self.channels_last)
        weight = _dense_strides(self.c // self.groups, self.r, self.s, self.channels_last)
        return {
            **self._fields(),
            "x_address": 0,
            "x_strides": x,
            "weight_address": 0,
            "weight_strides": weight,
        }


def _dense_strides(channels: int, height: int, width: int, channels_last: bool) -> tuple[int, int, int, int]:
    if channels_last:
        return height * width * channels, 1, width * channels, channels
    return channels * height * width, height * width, width, 1


@dataclass(frozen=True)
class Explanation:
    """The plan for a problem on a device; ``str`` gives a text to read.

    Estimates are the planner's model, not measurements.
    """

    device: str
    candidates: tuple[dict[str, Any], ...]
    """Every plan considered, the chosen one first: its ``name``, what it consists of, its ``estimate_us``
    with the parts, and in ``illegal`` why it cannot run, empty where it can."""
    notes: tuple[str, ...] = ()

    @property
    def kernel(self) -> str:
        """The name of the chosen kernel."""
        return str(self.candidates[0]["kernel"])

    @property
    def tile(self) -> tuple[int, int, int]:
        """Output pixels and output channels per block, and products per step."""
        return tuple(self.candidates[0]["tile"])  # type: ignore[return-value]

    @property
    def split_k(self) -> int:
        """Into how many parts the reduction is split; 1 is not at all."""
        return int(self.candidates[0]["split_k"])

    @property
    def estimate_us(self) -> float:
        """The estimated time in microseconds."""
        return float(self.candidates[0]["estimate_us"])

    def __str__(self) -> str:
        legal = [c for c in self.candidates if not c["illegal"]]
        chosen = legal[0]
        lines = [
            f"{chosen['name']} on {self.device}, estimated {chosen['estimate_us']:.1f} us",
            f"  multiply-adds {chosen['products_us']:.1f} us, device memory {chosen['bytes_us']:.1f} us, "
            f"latency {chosen['latency_us']:.1f} us, of which the largest counts; "
            f"launches and separate passes {chosen['overhead_us']:.1f} us",
            f"  {chosen['blocks']} blocks, {chosen['stages']} stages, "
            f"workspace {chosen['workspace_bytes']} bytes",
            *(f"  {note}" for note in self.notes),
            "runners-up:",
            *(f"  {c['estimate_us']:8.1f} us  {c['name']}" for c in legal[1:6]),
        ]
        reasons = {c["name"].partition(" split")[0]: c["illegal"] for c in self.candidates if c["illegal"]}
        if reasons:
            lines += ["illegal:", *(f"  {name}: {reason}" for name, reason in reasons.items())]
        return "\n".join(lines)


def _notes(plan: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    if plan["convert_x"]:
        notes.append("x is first copied to dense channels_last; give it in that format to spare the pass")
    if plan["convert_weight"]:
        notes.append(
            "the weight is first copied to dense channels_last on every call; "
            "module.to(memory_format=torch.channels_last) spares the pass"
        )
    return tuple(notes)


def _problem_of(module: ConvNormAct, x: Tensor) -> dict[str, Any]:
    if not isinstance(x, Tensor):
        raise TypeError(f"explain(module, x) needs an input tensor, but got {type(x).__name__}")
    conv = module.conv
    x = x.unsqueeze(0) if x.dim() == 3 else x
    weight = conv.weight
    padding = explicit_padding(conv.padding, weight.shape[2:], conv.stride, conv.dilation)
    problem = ConvProblem(
        n=x.shape[0],
        c=x.shape[1],
        h=x.shape[2],
        w=x.shape[3],
        k=weight.shape[0],
        r=weight.shape[2],
        s=weight.shape[3],
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
        groups=conv.groups,
        dtype=x.dtype,
    )
    meta = x.is_meta or weight.is_meta
    return {
        **problem.question(),
        "x_address": 0 if meta else x.data_ptr(),
        "x_strides": x.stride(),
        "weight_address": 0 if meta else weight.data_ptr(),
        "weight_strides": weight.stride(),
    }


@contextlib.contextmanager
def forced_plan(name: str) -> Iterator[None]:
    """Inside this context every CUDA call of this process runs the best plan whose name begins so.

    For tests and tuning; a call that no such plan can take raises a ``RuntimeError`` that lists the legal
    ones.

    Args:
        name: as :func:`explain` prints it or the start of it: "direct", "implicit_gemm_sm80 128x64x32",
            "implicit_gemm_sm80 128x64x32 split 4 masked".

    Raises:
        ImportError: the compiled extension is not available; says why.
    """
    extension = _extension.module()
    extension.force_plan(name)
    try:
        yield
    finally:
        extension.force_plan("")


def explain(
    problem: ConvProblem | ConvNormAct, x: Tensor | None = None, *, device: str = DEFAULT_DEVICE
) -> Explanation:
    """Which kernel would run, with which tile and split, what the planner expects of it, and why not another.

    Needs no GPU.

    Args:
        problem: a :class:`ConvProblem`; or a module, and then ``x`` is an input for it, whose strides and
            alignment are taken into account as they are.
        device: "A100", "L4", "RTX 4090", "H100", "H200" or "B200".

    Raises:
        ValueError: a device that is not known (lists the known ones), or a dtype that no kernel takes.
        RuntimeError: the compiled planner is missing.

    >>> print(explain(ConvProblem(32, 64, 56, 56, 64, 3, 3, padding=1), device="A100"))
    """
    question = problem.question() if isinstance(problem, ConvProblem) else _problem_of(problem, x)  # type: ignore[arg-type]
    candidates = tuple(_plan_module().candidates(question, device))
    return Explanation(device, candidates, _notes(candidates[0]))
