"""That fused networks run fused however they are called, and only where what was traced still holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from tests.fusion_cases import CASES, Group, assert_same, image, randomise, signatures
from tests.zoo.fused_calls import recorded

TOLERANCE = 1e-10
# What changes its arguments by Python runs as it was written.
NAMES = [
    name
    for name, case in CASES.items()
    if case.make.__module__ == signatures.__name__ and name != "list_grows"
]


def prepared(network: nn.Module) -> Any:
    randomise(network)
    return network.double().eval()


def norms_run(network: nn.Module, call: Callable[[Any], Any]) -> int:
    """How many batch norms a call of the plain network runs."""
    run: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, args, y: run.append(module))
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        call(network)
    for hook in hooks:
        hook.remove()
    return len(run)


def norms_fused(network: nn.Module, call: Callable[[Any], Any]) -> int:
    with torch.no_grad(), recorded(network) as calls:
        call(network)
    return sum(call.norm is not None for call in calls)


def check(fused: Any, plain: Any, call: Callable[[Any], Any]) -> None:
    """The same answer, and every norm in a fused call."""
    with torch.no_grad():
        assert_same(call(fused), call(plain), TOLERANCE)
    assert norms_fused(fused, call) == norms_run(plain, call) > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_call_runs_fused(name: str) -> None:
    case = CASES[name]
    fused, plain = fused_cna.fuse(case.build()), case.build()
    for draw in case.draws:

        def call(network: nn.Module, draw: Any = draw) -> Any:
            arguments, keywords = case.arguments(draw)
            return network(*arguments, **keywords)

        check(fused, plain, call)


class Net(Group):
    """Options, attributes that are read and some that are not, and another way in than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scale, self.names = Group(), 2.0, ["dog"]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        y = self.forward_features(x)
        z = self.act(self.norm(self.conv(y))) * self.scale
        return (z, y) if return_features else z


CALLS: dict[str, Callable[[Any], Any]] = {
    "positional": lambda net: net(image()),
    "default by position": lambda net: net(image(), False),
    "default by keyword": lambda net: net(image(), return_features=False),
    "all by keyword": lambda net: net(return_features=False, x=image()),
    "another option": lambda net: net(image(), True),
    "another size": lambda net: net(image(1)),
    "another entry point": lambda net: net.forward_features(image()),
    "a part": lambda net: net.stem(image()),
    "forward itself": lambda net: net.forward(image()),
    "a subclass of the input": lambda net: net(nn.Parameter(image())),
    "channels_last": lambda net: net(image().to(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("inputs", [None, image()], ids=["alone", "with_inputs"])
def test_ways_to_call(inputs: Tensor | None) -> None:
    """Each fused, whichever came before."""
    plain = prepared(Net())
    for calls in ([*CALLS.values()], [*CALLS.values()][::-1]):
        fused = fused_cna.fuse(plain, example_inputs=inputs)
        for call in (*calls, *calls):
            check(fused, plain, call)


CHANGES: dict[str, Callable[[Any], object]] = {
    "an attribute that nothing reads": lambda net: setattr(net, "names", {0: "cat"}),
    "a new attribute": lambda net: setattr(net, "comment", "trained on Monday"),
    "an attribute of a part": lambda net: setattr(net.stem.norm, "comment", ["frozen"]),
    "a value": lambda net: net.norm.weight.data.mul_(2),
    "an attribute that forward reads": lambda net: setattr(net, "scale", 3.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_that_nothing_reads_leave_it_fused(change: Callable[[Any], object]) -> None:
    plain = prepared(Net())
    fused = fused_cna.fuse(plain, example_inputs=image())
    for network in (plain, fused):
        change(network)
    with torch.no_grad():
        assert_same(fused(image()), plain(image()), TOLERANCE)
    # What does not hold any more may run as it was written, its parts may not.
    read = change is CHANGES["an attribute that forward reads"]
    assert norms_fused(fused, CALLS["positional"]) >= (1 if read else 2)


def test_a_new_size_needs_no_new_trace_and_options_without_end_make_no_end_of_them() -> None:
    plain = prepared(signatures.Options())
    fused = fused_cna.fuse(plain, example_inputs=image())
    made = len(fused.fused_cna_overlay.made)
    with torch.no_grad():
        for seed in (1, 2, 3):
            fused(image(seed))
        assert len(fused.fused_cna_overlay.made) == made
        for size in range(1, 120):
            assert_same(fused(image(), size), plain(image(), size), TOLERANCE)
    assert len(fused.fused_cna_overlay.made) < 100


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_getters_of_features_around_a_fused_network(library: str) -> None:
    torch.manual_seed(0)
    models = pytest.importorskip(f"{library}.models")
    plain = prepared(models.resnet18())
    fused = fused_cna.fuse(plain)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    layers = {"relu": "stem", "layer1": "low", "layer4": "high"}
    ways: list[Callable[[Any], Any]] = {
        "timm": [lambda net: net.forward_features(x), lambda net: net.forward_intermediates(x)],
        "torchvision": [lambda net: models._utils.IntermediateLayerGetter(net, layers)(x)],
    }[library]
    for way in ways:
        with torch.no_grad():
            assert_same(way(fused), way(plain), TOLERANCE)
        # These run the modules of the stem one by one.
        assert norms_fused(fused, way) >= norms_run(plain, way) - 1 == 19


UNFIT: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "nothing": ((), {}),
    "a number": ((3,), {}),
    "channels": ((torch.zeros(1, 3, 8, 9),), {}),
    "too few dimensions": ((torch.zeros(9),), {}),
    "dtype": ((torch.zeros(1, 4, 8, 9, dtype=torch.float16),), {}),
    "an unknown option": ((image(),), {"return_feature": True}),
    "too many": ((image(), False, image()), {}),
    "an option twice": ((image(), False), {"return_features": True}),
    "a list": (([image()],), {}),
    "none": ((None,), {}),
}


@pytest.mark.parametrize(("arguments", "keywords"), UNFIT.values(), ids=UNFIT)
def test_inputs_that_do_not_fit_get_the_networks_own_error(
    arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    plain = prepared(Net())
    fused = fused_cna.fuse(plain)
    for _ in range(2):
        with pytest.raises((TypeError, RuntimeError)) as expected:
            plain(*arguments, **keywords)
        with pytest.raises(type(expected.value)) as raised:
            fused(*arguments, **keywords)
        assert str(raised.value) == str(expected.value)
    check(fused, plain, CALLS["positional"])
