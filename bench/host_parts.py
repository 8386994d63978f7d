"""Where the host's time of a fused call goes, on a machine with or without a GPU.

The module is called on a CPU with its real Python, and the operator does there all that it does for an H100
but the launch (fused_cna._dry_run). On a GPU what the real call takes beyond that is the launch, and whatever
else needs the device: the guard, the stream, and an allocator of its own.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import fused_cna
from bench.setting import Setting
from bench.stats import Summary, summarize
from bench.terminal import Console, make_table
from bench.timing import HostStopwatch, interleaved, repeated
from fused_cna import ConvNormAct, _arrangement, ops

CALLS = 200
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}
STAGES = ("checks", "arguments", "allocation", "plan", "launch preparation")
MEANINGS = {
    "module": "nn.Module.__call__ and ConvNormAct.forward",
    "dispatch": "the module compared with its arrangement, the dispatcher, the result in Python",
    "checks": "what the operator refuses",
    "arguments": "the problem and the kernel's arguments",
    "allocation": "the output",
    "plan": "the plan, remembered",
    "launch preparation": "template arguments, shared memory and grid",
    "launch": "the driver's launch, and stream, guard and allocator of the GPU",
    "all": "a call of the module",
    "by torch.ops": "the same operator called from Python, as fused_cna.conv_norm_act does",
}


@dataclass(frozen=True)
class HostParts:
    """Host seconds of the parts of a call, by mode; or why they were not measured."""

    seconds: Mapping[str, Mapping[str, Summary]]
    why_not: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"why_not": self.why_not} if self.why_not else asdict(self)


def run(setting: Setting, fused: ConvNormAct, x: Tensor, kernels: bool) -> HostParts:
    """Medians over rounds; in each every part is timed once. `fused` and `x` are on the setting's device."""
    info = fused_cna.build_info()
    if not info["available"]:
        return HostParts({}, f"the parts of a call are the extension's, and {info['reason']}")
    on_cpu = copy.deepcopy(fused).cpu()
    return HostParts(
        {
            name: _in_mode(mode, setting, on_cpu, x.cpu(), (lambda: fused(x)) if kernels else None)
            for name, mode in MODES.items()
        }
    )


def _in_mode(
    mode: Callable[[], Any],
    setting: Setting,
    module: ConvNormAct,
    x: Tensor,
    real: Callable[[], object] | None,
) -> dict[str, Summary]:
    rounds = 5 * setting.effort.rounds
    wait = torch.cuda.synchronize if real is not None else None
    with mode():
        with _dry():
            module(x)
            call, arguments = _arrangement.calls[id(module)], _arguments(module, x)
            dry = interleaved(
                {
                    "module": repeated(lambda: module(x), CALLS),
                    "arranged": repeated(lambda: call(module, x, None), CALLS),
                    "by torch.ops": repeated(lambda: ops.operator(*arguments), CALLS),
                },
                HostStopwatch(),
                rounds=rounds,
                sample_seconds=0.0,
            )
        stages = [torch.ops.fused_cna._host_stages(*arguments, CALLS).tolist() for _ in dry["module"]]
        launched = (
            None
            if real is None or wait is None
            else interleaved(
                {"real": repeated(real, CALLS)},
                HostStopwatch(),
                rounds=rounds,
                sample_seconds=0.0,
                after_sample=wait,
            )["real"]
        )
    return _split(dry, stages, launched)


def _split(
    dry: Mapping[str, list[float]], stages: list[list[float]], launched: list[float] | None
) -> dict[str, Summary]:
    """The parts, round by round; what surrounds another part is what it takes beyond that."""
    whole, arranged = dry["module"], dry["arranged"]
    found = {
        "module": [outer - inner for outer, inner in zip(whole, arranged, strict=True)],
        "dispatch": [outer - sum(inner) for outer, inner in zip(arranged, stages, strict=True)],
        **{name: [row[index] for row in stages] for index, name in enumerate(STAGES)},
    }
    if launched is not None:
        found["launch"] = [outer - inner for outer, inner in zip(launched, whole, strict=True)]
    found["all"] = whole if launched is None else launched
    found["by torch.ops"] = dry["by torch.ops"]
    return {name: summarize(samples) for name, samples in found.items()}


@contextmanager
def _dry() -> Iterator[None]:
    """Modules on a CPU call the dry run."""
    before = ops.operator, ops.operator_everywhere
    ops.operator, ops.operator_everywhere = torch.ops.fused_cna._dry_run.default, True
    try:
        yield
    finally:
        ops.operator, ops.operator_everywhere = before


def _arguments(module: Any, x: Tensor) -> tuple[Any, ...]:
    conv, norm = module.conv, module.norm
    vectors = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps
    sizes = conv.stride, conv.padding, conv.dilation, conv.groups
    return x, conv.weight, conv.bias, *vectors, *sizes, "relu", (), None, "add_act"


def print_parts(console: Console, parts: HostParts) -> None:
    """A row for each part, a column for each mode, in microseconds."""
    if parts.why_not:
        console.print(parts.why_not, highlight=False)
        return
    shown = next(iter(parts.seconds.values()))
    caption = None if "launch" in shown else "without the launch itself, which needs a GPU"
    table = make_table("host time of a fused call by parts, us: median (quartiles)", caption)
    table.add_column("part")
    for mode in parts.seconds:
        table.add_column(mode, justify="right")
    table.add_column("what it is")
    for name in shown:
        cells = [_text(seconds[name]) for seconds in parts.seconds.values()]
        table.add_row(name, *cells, MEANINGS[name])
    console.print(table)


def _text(summary: Summary) -> str:
    return f"{summary.median * 1e6:.2f} ({summary.low * 1e6:.2f}-{summary.high * 1e6:.2f})"
