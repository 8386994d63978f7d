"""What a call costs the host: a fused module against the three it replaces, on a tiny input, and by parts."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import host_parts
from bench.host_parts import HostParts
from bench.setting import Setting, fused_path
from bench.stats import Summary, paired_ratio, summarize
from bench.timing import HostStopwatch, interleaved, repeated
from fused_cna import ConvNormAct

SHAPE = (1, 16, 8, 8)
CALLS = 50
GOAL_CPU = 1.1
GOAL_GPU = 0.5


class ThreeModules(nn.Module):
    """The module that people write by hand."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


@dataclass(frozen=True)
class Overhead:
    """Host seconds per call of each, and the ratios of fused to the others (below 1: fused costs less)."""

    fused: Summary
    three_modules: Summary
    hand_written: Summary
    ratio: Summary
    ratio_to_hand_written: Summary
    goal: float
    kernels: bool
    parts: HostParts

    @property
    def reached(self) -> bool:
        return self.ratio.median <= self.goal

    def as_json(self) -> dict[str, Any]:
        own = {**asdict(self), "parts": self.parts.as_json()}
        return {**own, "reached": self.reached, "shape": SHAPE}


def run(setting: Setting, step: Callable[[str], None]) -> Overhead:
    """Interleaved loops of calls.

    On a GPU only the host's part is timed: the device is waited for between loops, which are short enough
    that its queue does not fill.
    """
    step("call overhead")
    device, dtype = setting.device, setting.dtype
    torch.manual_seed(setting.seed)
    conv = nn.Conv2d(SHAPE[1], SHAPE[1], 3, padding=1, bias=False)
    hand_written = ThreeModules(conv, nn.BatchNorm2d(SHAPE[1]), nn.ReLU()).eval().to(device, dtype)
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    hand_written.to(memory_format=memory_format)
    conv, norm, act = hand_written.conv, hand_written.norm, hand_written.act
    fused = ConvNormAct.from_modules(*copy.deepcopy((conv, norm, act))).eval()
    generator = torch.Generator(device).manual_seed(setting.seed)
    x = torch.randn(SHAPE, device=device, dtype=dtype, generator=generator)
    x = x.contiguous(memory_format=memory_format)
    works = {
        "fused": repeated(lambda: fused(x), CALLS),
        "three modules": repeated(lambda: act(norm(conv(x))), CALLS),
        "hand-written": repeated(lambda: hand_written(x), CALLS),
    }
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    with torch.inference_mode():
        samples = interleaved(
            works,
            HostStopwatch(),
            rounds=5 * setting.effort.rounds,
            sample_seconds=0.0,
            warmup=4,
            after_sample=wait,
        )
    kernels = fused_path(device).kernels
    step("its parts")
    return Overhead(
        fused=summarize(samples["fused"]),
        three_modules=summarize(samples["three modules"]),
        hand_written=summarize(samples["hand-written"]),
        ratio=paired_ratio(samples["fused"], samples["three modules"]),
        ratio_to_hand_written=paired_ratio(samples["fused"], samples["hand-written"]),
        goal=GOAL_GPU if device.type == "cuda" else GOAL_CPU,
        kernels=kernels,
        parts=host_parts.run(setting, fused, x, kernels),
    )


def _nothing() -> None:
    return None
