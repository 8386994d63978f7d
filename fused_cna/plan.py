"""What would run for a convolution, on which device, and why: :func:`explain`."""

import contextlib
import importlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_cna import _extension, _tuned
from fused_cna._checks import check_convolution, check_dimensions, check_residual
from fused_cna.config import did_you_mean
from fused_cna.device import Device
from fused_cna.modules import ConvNormAct, fused_epilogue
from fused_cna.plan_file import TunedPlan
from fused_cna.problem import ConvProblem, call_question

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


def _channels_last(channels: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The strides of a dense tensor."""
    return height * width * channels, 1, width * channels, channels


def _copies(target: _tuned.Target, question: dict[str, Any], chosen: dict[str, Any]) -> Iterator[str]:
    """Which operands the chosen plan first copies, for how long by its estimate, and what to do about it."""
    c, h, w, r, s = (question[name] for name in ("c", "h", "w", "r", "s"))
    for operand, words, strides, advice in (
        ("x", "x", _channels_last(c, h, w), "giving it in that format"),
        (
            "weight",
            "the weight",
            _channels_last(c // question["groups"], r, s),
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


def _module_question(module: ConvNormAct, x: object, residual: object) -> dict[str, Any]:
    if not isinstance(x, Tensor):
        raise TypeError(f"explain(module, x) needs an input tensor, but got {type(x).__name__}")
    if residual is not None and not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a Tensor or None, but got {type(residual).__name__}")
    if x.dim() == 3:
        x, residual = x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
    conv = module.conv
    check_dimensions(x, conv.weight)
    x, convolution = module.pad_and_sizes(x, conv, conv.weight)
    shape = check_convolution(x, conv.weight, conv.bias, *convolution)
    if residual is not None:
        check_residual(residual, shape, x)
    norm, act, order = fused_epilogue(module, residual is not None)
    return call_question(x, conv.weight, *convolution, norm=norm, act=act, residual=order)


def _question(problem: object, x: object, residual: object) -> dict[str, Any]:
    """The problem as the planner takes it, with operands as they lie in memory."""
    if isinstance(problem, ConvNormAct):
        return _module_question(problem, x, residual)
    if not isinstance(problem, ConvProblem):
        raise TypeError(
            "explain takes a ConvProblem, or a ConvNormAct and an input for it, but got "
            f"{type(problem).__name__}; for a network fused_cna.report(network) says what is fused, and "
            "ConvNormAct.from_modules(conv, norm, act) makes a module of layers that exist"
        )
    if residual is not None:
        raise TypeError(
            "a ConvProblem says itself whether there is a residual: ConvProblem(residual='add_act')"
        )
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor or None, but got {type(x).__name__}")
    sizes = (problem.n, problem.c, problem.h, problem.w)
    if x is not None and (tuple(x.shape) != sizes or x.dtype != problem.dtype):
        raise ValueError(
            f"x must be what the problem says, of size {sizes} and {problem.dtype}, "
            f"but got {tuple(x.shape)} and {x.dtype}"
        )
    return problem.question(x)


_forced = ""


def forced_name() -> str:
    """The name that :func:`forced_plan` was given; empty outside of it."""
    return _forced


@contextlib.contextmanager
def forced_plan(name: str) -> Iterator[None]:
    """Inside this context every CUDA call of this process runs the best plan whose name begins so.

    For tests and tuning. Which tiles there are depends on the problem: a call that no such plan can take
    raises a ``RuntimeError`` with the legal ones.

    Args:
        name: as :func:`explain` prints it or its first words: "direct", "implicit_gemm_sm80 128x64x32",
            "implicit_gemm_sm80 128x64x32 split 4 masked"; empty for the plan that is best.

    Raises:
        ImportError: the compiled extension is not available; says why.
        TypeError: ``name`` is no str.
        ValueError: no kernel is called so (lists them), or what follows it is no tile.
    """
    global _forced
    extension = _extension.module()
    if not isinstance(name, str):
        raise TypeError(f"forced_plan takes the name of a plan, such as 'direct', but got {name!r}")
    kernel, _, rest = name.partition(" ")
    known = ("cudnn", *_extension.build_info()["kernels"])
    if name and kernel not in known:
        raise ValueError(
            f"no plan begins with {name!r};{did_you_mean(kernel, known)} the kernels are {', '.join(known)}"
        )
    if rest and (kernel == "cudnn" or not re.match(r"\d+x\d+x\d+( |$)", rest)):
        raise ValueError(f"no plan begins with {name!r}; a kernel is followed by its tile, as 64x64x32")
    before, _forced = extension.force_plan(name), name
    try:
        yield
    finally:
        _forced = before
        extension.force_plan(before)


def find_target(device: str | torch.device | Device | None, x: Tensor | None) -> _tuned.Target:
    """What to plan for: a device by name or figures, or of this machine; by default that of ``x``."""
    if isinstance(device, Device):
        return _tuned.target_of(device)
    if device is None:
        usable = isinstance(x, Tensor) and x.is_cuda and _extension.is_available()
        device = x.device if usable and x is not None else DEFAULT_DEVICE
    if isinstance(device, str) and device.partition(":")[0] == "cuda":
        device = torch.device(device)
    if isinstance(device, str):
        return _tuned.named_target(planner(), device)
    if not isinstance(device, torch.device):
        raise TypeError(
            "device must be a name, a fused_cna.Device or a torch.device, but got " + type(device).__name__
        )
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
    device: str | torch.device | Device | None = None,
) -> Explanation:
    """Which kernel would run, with which tile and split, what the planner expects of it, and why not another.

    Needs no GPU. Plans that :func:`fused_cna.tune` found for the device are taken into account, and it says
    so.

    Args:
        problem: a :class:`ConvProblem`, or a :class:`ConvNormAct`.
        x: an input of the module, [N, C, H, W] or [C, H, W], or of the problem; its strides and alignment
            are taken into account. A module needs it.
        residual: what the module would be called with.
        device: "A100", "L4", "RTX 4090", "H100", "H200" or "B200", in any case, or with "NVIDIA" before it;
            "H100/16" for a part of one with 16 multiprocessors; a :class:`fused_cna.Device` for any other; or
            a CUDA device of this machine, such as "cuda:0". By default that of ``x`` if it is on one, else
            "H100".

    Raises:
        TypeError: neither a problem nor a ``ConvNormAct``, a module without ``x``, or an argument of another
            type.
        ValueError: a device that is not known (lists the known ones), a dtype that no kernel takes, or
            an ``x`` that is not of the problem's size and dtype.
        RuntimeError: an ``x`` or a residual that the module refuses, or the compiled planner is missing.

    >>> print(explain(ConvProblem(32, 64, 56, 56, 64, 3, 3, padding=1), device="A100"))
    """
    question = _question(problem, x, residual)
    target = find_target(device, x)
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
