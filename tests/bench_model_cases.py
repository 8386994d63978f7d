"""A small network, routes and results that the tests of the job models share."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import model_cases, models
from bench.entry import judge
from bench.model_cases import Case, Images, Model
from bench.model_result import ModelEntry, ModelResult
from bench.model_routes import (
    EAGER,
    FROZEN,
    FUSED,
    INDUCTOR_FROZEN,
    Call,
    Compiled,
    EagerChannelsLast,
    EagerNchw,
    Fused,
    ModelRoute,
)
from bench.setting import PRECISIONS

NOISE = Images([torch.rand(1, 3, 128, 160, generator=torch.Generator().manual_seed(1))], "noise")
TINY = Case("tiny", 2, "fp32")


class Tiny(nn.Module):
    """A residual block and a classifier, which FX can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.branch(x) + x).mean((2, 3)))


class DropsNorms(ModelRoute):
    """What a fuser that forgets the norms would make."""

    name = FUSED
    ours = True

    def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
        broken = Tiny().eval().requires_grad_(False)
        broken.load_state_dict(network.state_dict())
        broken.branch[1] = nn.Identity()
        return broken


def entry(
    route: str, *seconds: float, ours: bool = False, launch: str = "launched", **changes: Any
) -> ModelEntry:
    made = ModelEntry(route, "channels_last", ours, samples={launch: list(seconds)} if seconds else {})
    made = replace(made, **{"error": 1e-7, "agreement": 1.0, **changes})
    made.summarize()
    return made


def result(*entries: ModelEntry, case: Case = TINY, device: str = "cpu") -> ModelResult:
    made = ModelResult(case, 16, "noise", list(entries), failure=judge(entries, PRECISIONS["fp32"], EAGER))
    models.compare(made, torch.device(device))
    return made


def result_with_goal(goal: model_cases.Goal, frozen: float, inductor: float, fused: float) -> ModelResult:
    """Eager takes 10 s in the slower layout and 6 in the faster one; the others what is given."""
    return result(
        entry(EAGER[0], 10.0, 10.0),
        entry(EAGER[1], 6.0, 6.0),
        entry(FUSED, fused, fused, ours=True),
        entry(FROZEN, frozen, frozen, ours=True),
        entry(INDUCTOR_FROZEN, inductor, inductor),
        case=Case(goal.network, goal.batch, "fp32"),
    )


def use_small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small networks in place of all, the second of a library that is not there."""
    small = {
        "tiny": Model("small", "torch", Tiny, size_on_cpu=16),
        "absent": Model("missing", "no_such_library", Tiny),
    }
    monkeypatch.setattr(model_cases, "MODELS", small)


def use_few_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No inductor, whose compiler takes seconds."""
    routes = (EagerNchw(), EagerChannelsLast(), Fused(), Compiled(INDUCTOR_FROZEN, "cpu", backend="eager"))
    monkeypatch.setattr(models, "routes_for", lambda setting: routes)
