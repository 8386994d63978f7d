"""Hooks in a network that is fused: each runs once per call, with the tensors of the original network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from tests.fusion_cases import DRAWS, Group, assert_same, every_freeze, randomise
from tests.fusion_cases.sums import Bottleneck

TOLERANCE = 1e-10
# Below the last four no hook can be registered for a backward pass: they are overwritten in place.
PLACES = ["0", "0.conv", "0.norm", "0.act", "1.relu", "1.downsample.0"]
IN_PLACE = ["", "1", "1.bn3", "1.downsample"]


def network() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(Group(), Bottleneck(4, 6, 2))
    randomise(made)
    # In-place ReLUs and full backward hooks exclude each other.
    made[1].relu.inplace = False
    return made.double().eval()


def copied(*values: Any) -> list[Any]:
    return [value.detach().clone() if isinstance(value, Tensor) else value for value in values]


Register = Callable[[nn.Module, list[Any]], Any]
FORWARD: dict[str, Register] = {
    "result": lambda module, seen: module.register_forward_hook(
        lambda module, args, y: seen.append(copied(*args, y))
    ),
    "keywords": lambda module, seen: module.register_forward_hook(
        lambda module, args, kwargs, y: seen.append([len(args), sorted(kwargs), *copied(y)]), with_kwargs=True
    ),
    "arguments": lambda module, seen: module.register_forward_pre_hook(
        lambda module, args: seen.append(copied(*args))
    ),
    "doubles": lambda module, seen: module.register_forward_hook(lambda module, args, y: y * 2),
    "shifts": lambda module, seen: module.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
}
BACKWARD: dict[str, Register] = {
    "backward": lambda module, seen: module.register_full_backward_hook(
        lambda module, grad_in, grad_out: seen.append(copied(*grad_in, *grad_out))
    ),
    "before backward": lambda module, seen: module.register_full_backward_pre_hook(
        lambda module, grad_out: seen.append(copied(*grad_out))
    ),
}
HOOKS = [
    *[(place, name) for place in [*PLACES, *IN_PLACE] for name in FORWARD],
    *[(place, name) for place in PLACES for name in BACKWARD],
]


def outcome(module: nn.Module, seen: list[Any], name: str) -> tuple[list[Any], Tensor]:
    """What a call has recorded, and its result."""
    seen.clear()
    x = DRAWS[0].image().requires_grad_(name in BACKWARD)
    with torch.set_grad_enabled(name in BACKWARD):
        result = module(x)
        if name in BACKWARD:
            result.square().sum().backward()
    return list(seen), result.detach()


@pytest.mark.parametrize(("place", "name"), HOOKS)
@pytest.mark.parametrize("when", ["before", "after", "after the first call"])
@every_freeze
def test_hooks_see_what_they_would_have_seen(place: str, name: str, when: str, freeze: bool) -> None:
    """Feature extractors register them whenever they like: nothing says that a network was fused."""
    if freeze and name in BACKWARD:
        pytest.skip("a snapshot has no gradients for parameters")
    register = {**FORWARD, **BACKWARD}[name]
    plain, unhooked, mine, theirs = network(), network(), [], []
    fused = fused_cna.fuse(network(), freeze=freeze)
    if when == "before":
        fused = network()
    elif when == "after the first call":
        outcome(fused, mine, "")
    register(plain.get_submodule(place), theirs)
    handle = register(fused.get_submodule(place), mine)
    if when == "before":
        fused = fused_cna.fuse(fused, freeze=freeze)
    for _ in range(2):
        assert_same(outcome(fused, mine, name), outcome(plain, theirs, name), TOLERANCE)
    if when != "before":
        handle.remove()
        assert_same(outcome(fused, mine, name), outcome(unhooked, [], name), TOLERANCE)


def test_a_hooked_layer_is_left_alone_and_the_report_says_why() -> None:
    plain = network()
    plain[0].conv.register_forward_hook(lambda module, args, y: None)
    fused = fused_cna.fuse(plain, example_inputs=DRAWS[0].image())
    layers = {layer.name: layer for layer in fused_cna.report(fused).layers}
    assert not layers["0.conv"].fused
    assert "hook" in layers["0.conv"].reason
    assert all(layer.fused for name, layer in layers.items() if name != "0.conv")


def test_state_dict_hooks_run_once() -> None:
    plain, calls = network(), []
    plain.register_state_dict_post_hook(lambda *arguments: calls.append("save"))
    plain.register_load_state_dict_post_hook(lambda *arguments: calls.append("load"))
    fused = fused_cna.fuse(plain)
    calls.clear()
    fused.load_state_dict(fused.state_dict())
    assert calls == ["save", "load"]


@every_freeze
def test_global_hooks_see_the_convolutions(freeze: bool) -> None:
    """Profilers and FLOP counters rest on them."""

    def calls(module: nn.Module) -> list[str]:
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append(type(module).__name__)
        )
        try:
            outcome(module, [], "")
        finally:
            handle.remove()
        return [name for name in seen if name in ("Conv2d", "BatchNorm2d", "ReLU")]

    plain = network()
    fused = fused_cna.fuse(plain, freeze=freeze)
    assert calls(fused) == calls(plain)
    outcome(fused, [], "")
    assert calls(fused) == calls(plain)
