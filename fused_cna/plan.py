"""What would run for a convolution, on which device, and why: :func:`explain`."""

import contextlib
import importlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_cna import _extension, _tuned
from fused_cna._checks import RESIDUAL_ORDERS, explicit_padding, pair
from fused_cna.activation import ACTIVATIONS
from fused_cna.modules import ConvNormAct, fused_epilogue
from fused_cna.plan_file import TunedPlan

DEFAULT_DEVICE = "H100"


def planner() -> ModuleType:
    """The compiled planner, ``fused_cna._plan``.

    Raises:
        RuntimeError: it is missing; says what to do.
    """
    try:
        return importlib.import_module("fused_cna._plan")
    except ImportError as error:
        raise RuntimeError(
            f"this needs fused_cna's compiled planner, which could not be imported ({error}); with a C++ "
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
        norm, act, residual: what follows the convolution: whether a batch norm, the name of the activation,
            and the residual's order or None. Only plans that were measured depend on it.

    Raises:
        ValueError: a size that is not positive, ``groups`` that does not divide the channels, a filter larger
            than the padded input, or an unknown activation or residual order.
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
    norm: bool = True
    act: str = "relu"
    residual: str | None = None

    def __post_init__(self) -> None:
        for name in ("n", "c", "h", "w", "k", "r", "s", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}")
        if self.c % self.groups or self.k % self.groups:
            raise ValueError(
                f"groups must divide c and k, but got groups={self.groups}, c={self.c}, k={self.k}"
            )
        for name, known in (("act", tuple(ACTIVATIONS)), ("residual", (None, *RESIDUAL_ORDERS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, but got {getattr(self, name)!r}")
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
        sizes = {name: getattr(self, name) for name in ("n", "c", "h", "w", "k", "r", "s", "groups")}
        return {
            **sizes,
            "stride": pair(self.stride, "stride"),
            "padding": _four_pads(padding),
            "dilation": pair(self.dilation, "dilation"),
            "dtype": str(self.dtype).removeprefix("torch."),
            "allow_tf32": allows_tf32(),
            "norm": self.norm,
            "act": self.act,
            "residual": self.residual,
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


def allows_tf32() -> bool:
    """Whether float32 convolutions on a GPU may be computed in tf32."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def _four_pads(padding: Sequence[int]) -> tuple[int, ...]:
    return tuple(padding) if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])


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
    tuned_us: float | None = None
    """What ``fused_cna.tune`` measured for the chosen plan; None where the estimate chose it."""

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

    @property
    def is_tuned(self) -> bool:
        """Whether the plan was chosen by measurement, by :func:`fused_cna.tune`."""
        return self.tuned_us is not None

    def __str__(self) -> str:
        legal = [c for c in self.candidates if not c["illegal"]]
        lines = [
            *self._about_chosen(),
            *(f"  {note}" for note in self.notes),
            "by estimate:" if self.is_tuned else "runners-up:",
            *(f"  {c['estimate_us']:8.1f} us  {c['name']}" for c in legal[1:6]),
        ]
        reasons = {c["name"].partition(" split")[0]: c["illegal"] for c in self.candidates if c["illegal"]}
        if reasons:
            lines += ["illegal:", *(f"  {name}: {reason}" for name, reason in reasons.items())]
        return "\n".join(lines)

    def _about_chosen(self) -> list[str]:
        chosen = self.candidates[0]
        measured = "" if self.tuned_us is None else f"tuned: measured {self.tuned_us:.1f} us"
        where = f"{chosen['name']} on {self.device}, "
        if chosen["kernel"] == "cudnn":
            return [where + measured, "  torch's own convolution, with the norm folded per call"]
        estimated = f"estimated {chosen['estimate_us']:.1f} us"
        return [
            where + ", ".join(text for text in (measured, estimated) if text),
            f"  multiply-adds {chosen['products_us']:.1f} us, device memory {chosen['bytes_us']:.1f} us, "
            f"latency {chosen['latency_us']:.1f} us, of which the largest counts; "
            f"launches and separate passes {chosen['overhead_us']:.1f} us",
            f"  {chosen['blocks']} blocks, {chosen['stages']} stages, "
            f"workspace {chosen['workspace_bytes']} bytes",
        ]


def _copies(target: _tuned.Target, question: dict[str, Any], chosen: dict[str, Any]) -> Iterator[str]:
    """Which operands the chosen plan first copies, for how long by its estimate, and what to do about it."""
    c, h, w, r, s = (question[name] for name in ("c", "h", "w", "r", "s"))
    for operand, words, strides, advice in (
        ("x", "x", _dense_strides(c, h, w, True), "giving it in that format"),
        (
            "weight",
            "the weight",
            _dense_strides(c // question["groups"], r, s, True),
            "module.to(memory_format=torch.channels_last)",
        ),
    ):
        if chosen[f"convert_{operand}"]:
            dense = planner().problem({**question, f"{operand}_address": 0, f"{operand}_strides": strides})
            name = chosen["name"].replace(f" after a copy of {words}", "")
            without = planner().find(dense, dict(target.info), name)
            microseconds = chosen["overhead_us"] - without["overhead_us"]
            yield (
                f"{words} is first copied to dense channels_last on every call, an estimated "
                f"{microseconds:.1f} us; {advice} spares the pass"
            )


def call_question(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    norm: bool,
    act: str,
    residual: str | None,
) -> dict[str, Any]:
    """The problem of an operator's call as the planner takes it, x and the weight as they lie in memory."""
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    meta = x.is_meta or weight.is_meta
    sizes = {"n": n, "c": c, "h": h, "w": w, "k": k, "r": r, "s": s, "groups": groups}
    return {
        **sizes,
        "stride": tuple(stride),
        "padding": _four_pads(padding),
        "dilation": tuple(dilation),
        "dtype": str(x.dtype).removeprefix("torch."),
        "allow_tf32": allows_tf32(),
        "x_address": 0 if meta else x.data_ptr(),
        "x_strides": x.stride(),
        "weight_address": 0 if meta else weight.data_ptr(),
        "weight_strides": weight.stride(),
        "norm": norm,
        "act": act,
        "residual": residual,
    }


def _module_question(module: ConvNormAct, x: Tensor | None, with_residual: bool) -> dict[str, Any]:
    if not isinstance(x, Tensor):
        raise TypeError(f"explain(module, x) needs an input tensor, but got {type(x).__name__}")
    conv = module.conv
    x = x.unsqueeze(0) if x.dim() == 3 else x
    k, _, r, s = conv.weight.shape
    stride, dilation = pair(conv.stride, "stride"), pair(conv.dilation, "dilation")
    padding = explicit_padding(conv.padding, (r, s), stride, dilation)
    if conv.padding_mode != "zeros":
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode), (0, 0)
    n, c, h, w = x.shape
    ConvProblem(n, c, h, w, k, r, s, stride, padding, dilation, conv.groups)  # refuses what does not fit
    norm, act, residual = fused_epilogue(module, with_residual)
    return call_question(
        x, conv.weight, stride, padding, dilation, conv.groups, norm=norm, act=act, residual=residual
    )


_forced = ""


def forced_name() -> str:
    """The name that :func:`forced_plan` was given; empty outside of it."""
    return _forced


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
    global _forced
    extension = _extension.module()
    before, _forced = extension.force_plan(name), name
    try:
        yield
    finally:
        _forced = before
        extension.force_plan(before)


def find_target(device: str | torch.device | None, x: Tensor | None) -> _tuned.Target:
    """What to plan for: a device by name, or of this machine; by default that of ``x`` if it has kernels."""
    if device is None:
        usable = isinstance(x, Tensor) and x.is_cuda and _extension.is_available()
        device = x.device if usable and x is not None else DEFAULT_DEVICE
    if isinstance(device, str) and device.partition(":")[0] == "cuda":
        device = torch.device(device)
    if isinstance(device, str):
        return _tuned.named_target(planner(), device)
    if device.type != "cuda":
        raise ValueError(f"there are plans for CUDA devices only, but device is {device}")
    return _tuned.cuda_target(torch.cuda.current_device() if device.index is None else device.index)


# The planner's table of tuned plans is that of the whole process.
_lock = threading.Lock()


def decide(target: _tuned.Target, problem: dict[str, Any]) -> tuple[dict[str, Any], TunedPlan | None, str]:
    """The plan that would run, the tuned plan known for the problem, and why that one is not taken."""
    known = _tuned.plan_for(target.device, problem)
    with _lock:
        planner().clear_tuned_plans()
        why_not = "" if known is None else _tuned.set_plan(planner(), target, known)
        chosen: dict[str, Any] = planner().chosen(problem, dict(target.info))
    return chosen, known, why_not


def explain(
    problem: ConvProblem | ConvNormAct,
    x: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    device: str | torch.device | None = None,
) -> Explanation:
    """Which kernel would run, with which tile and split, what the planner expects of it, and why not another.

    Needs no GPU. Plans that :func:`fused_cna.tune` found for the device are taken into account, and it says
    so.

    Args:
        problem: a :class:`ConvProblem`; or a module, and then ``x`` is an input for it, whose strides and
            alignment are taken into account as they are, and ``residual`` is what it would be called with.
        device: "A100", "L4", "RTX 4090", "H100", "H200" or "B200"; "H100/16" for a part of one with so many
            multiprocessors; or a CUDA device of this machine, such as "cuda:0". By default that of ``x`` if
            it is on one, else "H100".

    Raises:
        ValueError: a device that is not known (lists the known ones), or a dtype that no kernel takes.
        RuntimeError: the compiled planner is missing.

    >>> print(explain(ConvProblem(32, 64, 56, 56, 64, 3, 3, padding=1), device="A100"))
    """
    target = find_target(device, x)
    question = (
        problem.question()
        if isinstance(problem, ConvProblem)
        else _module_question(problem, x, residual is not None)
    )
    asked = planner().problem(question)
    chosen, known, why_not = decide(target, asked)
    others = [c for c in planner().candidates(asked, dict(target.info)) if c["name"] != chosen["name"]]
    notes = tuple(_copies(target, question, chosen))
    if _extension.is_available() and chosen["rows"] in ("tiled", "im2col"):
        number, reason = _extension.module().refused_tensor_maps()
        if number:
            notes = (
                *notes,
                f"in this process {reason} ({number} times); what has no map is gathered",
            )
    if why_not:
        notes = (*notes, f"a tuned plan is ignored: {why_not}")
    return Explanation(
        target.device.name,
        (chosen, *others),
        notes,
        known.microseconds if known is not None and chosen["tuned"] else None,
    )
