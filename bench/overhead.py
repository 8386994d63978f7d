"""Where the host's time of a fused call goes, on a machine with or without a GPU.

The module is called on a CPU with its real Python, and the operator does there all that it does for an H100
but the launch (fused_cna._dry_run). On a GPU what the real call takes beyond that is the launch, and whatever
else needs the device: the guard, the stream, and an allocator of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import fused_cna
from bench.cases import Layer
from bench.measure import Setting, Work, host_seconds, interleaved
from bench.provenance import fused_path
from bench.result import Summary, summarize
from bench.routes import CALL_ROUTES, make_case
from fused_cna import _arrangement, ops

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


def parts_of(setting: Setting, layer: Layer) -> dict[str, Any]:
    """Host seconds of the parts of a call, by mode, over rounds in each of which every part is timed once."""
    info = fused_cna.build_info()
    if not info["available"]:
        return {"why_not": f"the parts of a call are the extension's, and {info['reason']}"}

    def call_on(device: torch.device) -> Any:
        precision = setting.precisions[0]
        case = make_case(layer, device, precision, setting.seed).laid_out(torch.channels_last)
        x = torch.randn(layer.shapes(1)[0], dtype=precision.dtype, device=device)
        return CALL_ROUTES[0].prepare([(case, (x.contiguous(memory_format=torch.channels_last),))])[0]

    dry = call_on(torch.device("cpu"))
    real = call_on(setting.device) if fused_path(setting.device)[0] else None
    return {"seconds": {name: _in_mode(mode, setting, dry, real) for name, mode in MODES.items()}}


def _in_mode(mode: Callable[[], Any], setting: Setting, dry: Any, real: Any) -> dict[str, Any]:
    rounds, launched = 5 * setting.rounds, None
    module, (x,) = dry.func, dry.args
    with mode():
        with _dry():
            dry()
            call, arguments = _arrangement.calls[id(module)], _arguments(module, x)
            works = {
                "module": Work(lambda: module(x)).times(CALLS),
                "arranged": Work(lambda: call(module, x, None)).times(CALLS),
                "by torch.ops": Work(lambda: ops.operator(*arguments)).times(CALLS),
            }
            samples = interleaved(works, host_seconds, rounds=rounds)
        stages = [torch.ops.fused_cna._host_stages(*arguments, CALLS).tolist() for _ in range(rounds)]
        if real is not None:
            work, wait = {"real": Work(real).times(CALLS)}, torch.cuda.synchronize
            launched = interleaved(work, host_seconds, rounds=rounds, after_sample=wait)["real"]
    return {name: asdict(summary) for name, summary in split(samples, stages, launched).items()}


def split(
    dry: Mapping[str, Sequence[float]], stages: Sequence[Sequence[float]], launched: Sequence[float] | None
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
    found |= {"all": list(whole if launched is None else launched), "by torch.ops": list(dry["by torch.ops"])}
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
