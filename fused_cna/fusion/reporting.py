"""``report``: what of a network is fused, and why the rest is not."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fused_cna._recording import RecordedCall, observe
from fused_cna.fusion import checks, report_text
from fused_cna.fusion.boundaries import computed_by, modules_of_blocks
from fused_cna.fusion.frozen import FrozenConv
from fused_cna.fusion.fuse import fuse_in_place
from fused_cna.fusion.overlay import NAME as OVERLAY
from fused_cna.fusion.overlay import FusedNetwork
from fused_cna.fusion.records import NAME as RECORD
from fused_cna.fusion.records import FusionError, LayerRecord
from fused_cna.modules import ConvNormAct
from fused_cna.plan import decide, find_target, planner


@dataclass(frozen=True)
class PlannedCall:
    """One distinct problem that a convolution is called with, and the plan for it."""

    convolution: str
    """In words: filter, stride, channels, size of the input, dtype, what follows."""
    x_shape: tuple[int, ...]
    """[N, C, H, W]."""
    y_shape: tuple[int, ...]
    """[N, K, P, Q]."""
    device: str
    """The device that is planned for."""
    kernel: str
    plan: str
    """The kernel with its tile and split, by the name that :func:`forced_plan` takes."""
    microseconds: float
    """What tuning measured, else what is estimated."""
    is_tuned: bool
    why: str
    """What the choice rests on, in words."""


@dataclass(frozen=True)
class LayerReport:
    """One convolution of a network."""

    name: str
    parts: str
    """What is computed in one call, such as "conv + norm + add + relu"; "conv" where nothing is fused."""
    reason: str = ""
    """Why nothing, or less than it seems, is fused; empty where everything is."""
    looks_fusible: bool = False
    """Whether it looks as if more could have been fused."""
    calls: tuple[PlannedCall, ...] = ()
    """The problems of one run on the example inputs, as far as they come to a kernel."""

    @property
    def fused(self) -> bool:
        return "+" in self.parts

    @property
    def kernel(self) -> str:
        """The kernels of its calls; empty where there were none, or no example inputs."""
        return ", ".join(dict.fromkeys(call.kernel for call in self.calls))


@dataclass(frozen=True)
class FusionReport:
    """What of a network is fused; ``str`` gives a table to read."""

    network: str
    """Its class."""
    is_fused: bool
    """Whether it is a fused network; else this is what :func:`fuse` would make of it."""
    layers: tuple[LayerReport, ...]
    """Every convolution, in the order in which they run where that is known."""
    untraceable: dict[str, str] = field(default_factory=dict)
    """Modules by name that run as Python code, as ``torch.fx`` cannot follow them, and why."""
    as_written: tuple[str, ...] = ()
    """Fused modules that run as they were written all the same, since something about them has changed."""
    is_training: bool = False
    is_frozen: bool = False
    device: str = "cpu"
    """Where the network is."""
    planned_for: str | None = None
    """The device of the plans; None without example inputs."""

    @property
    def fused(self) -> tuple[LayerReport, ...]:
        """The convolutions that are computed with something else."""
        return tuple(layer for layer in self.layers if layer.fused)

    @property
    def left_alone(self) -> tuple[LayerReport, ...]:
        """The convolutions that are not."""
        return tuple(layer for layer in self.layers if not layer.fused)

    @property
    def by_parts(self) -> dict[str, int]:
        """How many convolutions compute what, the most frequent first."""
        return dict(Counter(layer.parts for layer in self.fused).most_common())

    @property
    def norms_fused(self) -> int:
        """How many pairs of convolution and batch norm are one call."""
        return sum("norm" in layer.parts.split(" + ") for layer in self.layers)

    @property
    def additions_fused(self) -> int:
        """How many residual additions are in the call of a convolution."""
        return sum("add" in layer.parts.split(" + ") for layer in self.layers)

    @property
    def reasons(self) -> dict[str, int]:
        """How many convolutions are left alone, or fused with less than it seems, for what kind of reason."""
        kinds = (report_text.kind_of_reason(layer.reason) for layer in self.layers if layer.reason)
        return dict(Counter(kinds).most_common())

    def as_dict(self) -> dict[str, Any]:
        """The same and the totals as dicts, lists, strings and numbers, for JSON."""
        layers = [{**asdict(layer), "fused": layer.fused, "kernel": layer.kernel} for layer in self.layers]
        totals = {
            "convolutions": len(self.layers),
            "fused": len(self.fused),
            "left_alone": len(self.left_alone),
            "by_parts": self.by_parts,
            "norms_fused": self.norms_fused,
            "additions_fused": self.additions_fused,
            "reasons": self.reasons,
        }
        return {**asdict(self), "layers": layers, "totals": totals}

    def __str__(self) -> str:
        return report_text.text_of(self)


def report(
    model: nn.Module, example_inputs: Any = None, device: str | torch.device | None = None
) -> FusionReport:
    """Which convolutions of a network are fused with what, which are not, and why; which kernel runs them.

    Of a network that is not fused, what :func:`fuse` would do with a copy of it. The network itself stays as
    it is. ``print`` the result for a table.

    Args:
        model: a fused network, one that has fused networks among its modules, or a plain one.
        example_inputs: a tensor or the arguments of ``forward`` in a tuple. A copy of the network then runs
            once, in eval mode, and the report has the shapes of convolutions and the plan for each. A plain
            network is also fused by what that run shows, as :func:`fuse` does with example inputs.
        device: what to plan for, needing no GPU: a name that :func:`explain` takes, such as "A100", or a CUDA
            device of this machine. By default the GPU that the network is on, else "H100".

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``example_inputs`` no tensors.
        FusionError: a plain network that :func:`fuse` refuses whatever it is made of, such as a quantised
            one; or the network does not run on the example inputs.
        ValueError: ``device`` without example inputs, or a device that is not known.
        RuntimeError: there are example inputs, but the compiled planner is missing.

    >>> print(report(torchvision.models.resnet50()))
    """
    checks.check_module(model, "report")
    inputs = checks.as_arguments(example_inputs, needed_for="")
    if device is not None and inputs is None:
        raise ValueError(f"device={device!r} is what to plan for, which needs example_inputs")
    model = getattr(model, "_orig_mod", model)
    fused = _is_fused(model)
    if not fused:
        checks.check_network(model)
    network = model
    if inputs is not None or not _has_record(model):
        network = copy.deepcopy(model)
    if not _has_record(network):
        fuse_in_place(network, inputs, freeze=_is_frozen(model))
    records, untraceable = _records(network)
    result = FusionReport(
        network=getattr(model, "plain_class", type(model)).__name__,
        is_fused=fused,
        layers=tuple(LayerReport(r.name, r.parts, r.reason, r.looks_fusible) for r in records),
        untraceable=untraceable,
        as_written=tuple(_as_written(model)),
        is_training=model.training,
        is_frozen=_is_frozen(model),
        device=str(next((tensor.device for tensor in model.parameters()), "cpu")),
    )
    return result if inputs is None else _with_plans(result, network, inputs, device)


def _has_record(model: nn.Module) -> bool:
    return any(RECORD in module.__dict__ for module in model.modules())


def _is_fused(model: nn.Module) -> bool:
    return _has_record(model) or any(isinstance(module, FusedNetwork) for module in model.modules())


def _is_frozen(model: nn.Module) -> bool:
    return any(isinstance(module, FrozenConv) for _, module in modules_of_blocks(model))


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def _records(network: nn.Module) -> tuple[list[LayerRecord], dict[str, str]]:
    """The layers and the untraceable modules of a network, by their names in it."""
    layers: list[LayerRecord] = []
    untraceable: dict[str, str] = {}
    covered: set[nn.Module] = set()
    for path, module in network.named_modules():
        record = module.__dict__.get(RECORD)
        if module in covered:
            continue
        if record is not None:
            covered.update(module.modules())
            layers += [replace(layer, name=_join(path, layer.name)) for layer in record.layers]
            untraceable |= {_join(path, name): reason for name, reason in record.untraceable.items()}
        elif isinstance(module, ConvNormAct):
            covered.update(module.modules())
            layers.append(LayerRecord(_join(path, "conv"), computed_by(module, None) or "conv"))
        elif isinstance(module, nn.Conv2d):
            layers.append(LayerRecord(path, "conv", "it is outside of what was fused"))
    return layers, untraceable


def _as_written(model: nn.Module) -> list[str]:
    """The fused networks in a model that run as they were written although they are in eval mode."""
    return [
        path or module.plain_class.__name__
        for path, module in model.named_modules()
        if isinstance(module, FusedNetwork)
        and not module.training
        and OVERLAY in module.__dict__
        and not module.__dict__[OVERLAY].holds(module)
    ]


def _with_plans(
    result: FusionReport, network: nn.Module, inputs: tuple[Any, ...], device: str | torch.device | None
) -> FusionReport:
    if network.training:
        network.eval()
    compiled_planner = planner()
    try:
        recorded = observe(network, inputs, compiled_planner, _names_of_weights(network))
    except Exception as error:
        raise FusionError(f"{result.network} fails on the example inputs: {error}") from error
    calls: dict[str, list[PlannedCall]] = {}
    x = next((tensor for tensor in network.parameters()), None)
    planned_for = find_target(device, x).device.name
    for one in recorded:
        planned = _plan(one, device)
        for name in one.names:
            calls.setdefault(name, []).append(planned)
    layers = tuple(replace(layer, calls=tuple(calls.get(layer.name, ()))) for layer in result.layers)
    return replace(result, layers=layers, planned_for=planned_for)


def _names_of_weights(network: nn.Module) -> dict[int, str]:
    """The convolutions by the addresses of their weights."""
    names = {
        module.weight.data_ptr(): name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    return names | {
        module.weight.data_ptr(): name
        for name, module in modules_of_blocks(network)
        if isinstance(module, FrozenConv)
    }


def _plan(call: RecordedCall, device: str | torch.device | None) -> PlannedCall:
    target = find_target(device, call.x)
    problem = dict(call.problem)
    chosen, known, _ = decide(target, problem)
    tuned = known is not None and bool(chosen["tuned"])
    microseconds = known.microseconds if known is not None and tuned else float(chosen["estimate_us"])
    others = planner().candidates(problem, dict(target.info))
    return PlannedCall(
        convolution=str(call),
        x_shape=tuple(call.x.shape),
        y_shape=_y_shape(call.problem),
        device=target.device.name,
        kernel=chosen["kernel"],
        plan=chosen["name"],
        microseconds=microseconds,
        is_tuned=tuned,
        why=_why(chosen, others, tuned),
    )


def _y_shape(p: Mapping[str, Any]) -> tuple[int, ...]:
    height = p["h"] + p["pad_top"] + p["pad_bottom"] - p["dil_h"] * (p["r"] - 1) - 1
    width = p["w"] + p["pad_left"] + p["pad_right"] - p["dil_w"] * (p["s"] - 1) - 1
    return p["n"], p["k"], height // p["stride_h"] + 1, width // p["stride_w"] + 1


_BOUNDS = {"products_us": "multiply-adds", "bytes_us": "device memory", "latency_us": "latency"}


def _why(chosen: dict[str, Any], candidates: Sequence[dict[str, Any]], tuned: bool) -> str:
    if tuned:
        return "the fastest of those that were timed"
    bound = _BOUNDS[max(_BOUNDS, key=lambda part: chosen[part])]
    others = [c for c in candidates if not c["illegal"] and c["kernel"] != chosen["kernel"]]
    if not others:
        return f"bound by {bound}; no other kernel can run it"
    following = min(others, key=lambda c: c["estimate_us"])
    return f"bound by {bound}; next is {following['kernel']} with {following['estimate_us']:.1f} us"
