"""Hooks in a network that is fused: each runs once per call, with the tensors of the original network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from tests.fusion_cases import DRAWS, Group, assert_same, randomise
from tests.fusion_cases.sums import Bottleneck

PLACES = [
    "",
    "0",
    "0.conv",
    "0.norm",
    "0.act",
    "1",
    "1.conv3",
    "1.bn3",
    "1.relu",
    "1.downsample",
    "1.downsample.0",
]
TOLERANCE = 1e-10
every_place = pytest.mark.parametrize("place", PLACES, ids=lambda place: place or "root")


def network() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(Group(), Bottleneck(4, 6, 2))
    randomise(made)
    return made.double().eval()


Records = list[Any]


def record_forward(module: nn.Module, records: Records) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...], result: Tensor) -> None:
        records.append([x.detach().clone() for x in (*arguments, result)])

    return module.register_forward_hook(hook)


def record_forward_with_keywords(module: nn.Module, records: Records) -> Any:
    def hook(module: nn.Module, arguments: Any, keywords: dict[str, Any], result: Tensor) -> None:
        records.append((len(arguments), sorted(keywords), result.detach().clone()))

    return module.register_forward_hook(hook, with_kwargs=True)


def record_before(module: nn.Module, records: Records) -> Any:
    return module.register_forward_pre_hook(
        lambda module, arguments: records.append([x.detach().clone() for x in arguments])
    )


def record_backward(module: nn.Module, records: Records) -> Any:
    return module.register_full_backward_hook(
        lambda module, grad_in, grad_out: records.append(
            [x.clone() for x in (*grad_in, *grad_out) if x is not None]
        )
    )


def record_before_backward(module: nn.Module, records: Records) -> Any:
    return module.register_full_backward_pre_hook(
        lambda module, grad_out: records.append([x.clone() for x in grad_out])
    )


def double_result(module: nn.Module, records: Records) -> Any:
    return module.register_forward_hook(lambda module, arguments, result: result * 2)


def shift_argument(module: nn.Module, records: Records) -> Any:
    return module.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))


Register = Callable[[nn.Module, Records], Any]
REGISTER: dict[str, Register] = {
    function.__name__: function
    for function in (
        record_forward,
        record_forward_with_keywords,
        record_before,
        record_backward,
        record_before_backward,
        double_result,
        shift_argument,
    )
}
every_kind = pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER)


def outcome(module: nn.Module, records: Records, name: str) -> tuple[Records, Tensor]:
    """What a call has recorded, and its result."""
    records.clear()
    x = DRAWS[0].image()
    if "backward" in name:
        # In-place ReLUs and full backward hooks exclude each other.
        for child in module.modules():
            if isinstance(child, nn.ReLU):
                child.inplace = False
        result = module(x.requires_grad_())
        result.square().sum().backward()
    else:
        with torch.no_grad():
            result = module(x)
    return list(records), result.detach()


def check(fused: nn.Module, mine: Records, plain: nn.Module, theirs: Records, name: str) -> None:
    expected_records, expected = outcome(plain, theirs, name)
    actual_records, actual = outcome(fused, mine, name)
    assert len(actual_records) == len(expected_records), "the hook ran another number of times"
    assert_same(actual, expected, TOLERANCE)
    for index, (one, other) in enumerate(zip(actual_records, expected_records, strict=True)):
        assert_same(one, other, TOLERANCE, f"record {index}")


def parts(name: str) -> bool:
    """Whether this place can be hooked from a backward pass: in-place additions exclude some."""
    return name not in ("1", "1.bn3", "1.downsample", "")


def places_for(register: Register, place: str) -> None:
    if "backward" in register.__name__ and not parts(place):
        pytest.skip("the original network itself refuses this: its output is overwritten in place")


@every_place
@every_kind
def test_registered_before(place: str, register: Register) -> None:
    places_for(register, place)
    records: Records = []
    plain = network()
    register(plain.get_submodule(place), records)
    fused = fused_cna.fuse(plain)
    check(fused, records, plain, records, register.__name__)


@every_place
@every_kind
def test_registered_after(place: str, register: Register) -> None:
    """As feature extractors do: nothing says that a network was fused, when it is handed on."""
    places_for(register, place)
    plain, mine, theirs = network(), [], []
    fused = fused_cna.fuse(plain)
    register(plain.get_submodule(place), theirs)
    handle = register(fused.get_submodule(place), mine)
    check(fused, mine, plain, theirs, register.__name__)
    handle.remove()
    recorded, result = outcome(fused, mine, register.__name__)
    assert not recorded
    with torch.no_grad():
        assert_same(result, network()(DRAWS[0].image()), TOLERANCE)


def test_a_hooked_layer_is_left_alone_and_the_report_says_why() -> None:
    plain = network()
    record_forward(plain.get_submodule("0.conv"), [])
    layers = {layer.name: layer for layer in fused_cna.report(fused_cna.fuse(plain)).layers}
    assert not layers["0.conv"].fused
    assert "hook" in layers["0.conv"].reason
    assert layers["1.conv1"].fused


def test_hooks_that_do_nothing_to_tensors_of_other_layers_keep_them_fused() -> None:
    plain = network()
    fused = fused_cna.fuse(plain)
    assert all(layer.fused for layer in fused_cna.report(fused).layers)


def test_state_dict_hooks_run_once() -> None:
    plain, calls = network(), []
    plain.register_state_dict_post_hook(lambda *arguments: calls.append("save"))
    plain.register_load_state_dict_post_hook(lambda *arguments: calls.append("load"))
    fused = fused_cna.fuse(plain)
    calls.clear()
    fused.load_state_dict(fused.state_dict())
    assert calls == ["save", "load"]


def test_global_hooks_see_the_convolutions() -> None:
    """Profilers and FLOP counters rest on them."""

    def calls(module: nn.Module) -> list[str]:
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append(type(module).__name__)
        )
        try:
            with torch.no_grad():
                module(DRAWS[0].image())
        finally:
            handle.remove()
        return [name for name in seen if name in ("Conv2d", "BatchNorm2d", "ReLU")]

    plain = network()
    assert calls(fused_cna.fuse(plain)) == calls(plain)
