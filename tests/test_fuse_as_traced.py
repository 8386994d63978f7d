"""Whatever a network's code reads besides tensors may change later: then it runs as it was written."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_cna


class Network(nn.Module):
    """One group, and all that code may read to decide what becomes of its result."""

    of_class = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.own_conv, self.own_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1)])
        self.named = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1)})
        self.factors = nn.ParameterList([nn.Parameter(torch.ones(1))])
        self.swish = Swish()
        self.register_module("down", None)
        self.register_parameter("shift", None)
        self.sized = nn.Parameter(torch.ones(5))
        self.public, self._private = 1.5, 0.5
        self.settings = {"scale": 2.0, "more": [1.0]}
        self.config = types.SimpleNamespace(scale=2.0)

    def post(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.swish(self.relu(self.norm(self.conv(x))))
        for layer in (*self.layers, *self.named.values()):
            x = layer(x)
        for factor in self.factors:
            x = x * factor
        conv, norm = self.own_conv, self.own_norm
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
        x = F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, 0.1, norm.eps
        )
        x = x * self.public * self._private * self.of_class * self.sized.shape[0]
        x = x * self.settings["scale"] * self.settings["more"][0] * self.config.scale
        x = x if self.shift is None else x + self.shift
        return self.post(x if self.down is None else self.down(x))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Softsign(Swish):
    def forward(self, x: Tensor) -> Tensor:
        return F.softsign(x)


CHANGES: dict[str, Callable[[Any], object]] = {
    "attribute": lambda net: setattr(net, "public", 3.0),
    "private attribute": lambda net: setattr(net, "_private", 3.0),
    "over an attribute of the class": lambda net: setattr(net, "of_class", 3.0),
    "method of the instance": lambda net: setattr(net, "post", lambda x: 5 * x),
    "dict": lambda net: net.settings.update(scale=3.0),
    "list in a dict": lambda net: net.settings["more"].__setitem__(0, 3.0),
    "object": lambda net: setattr(net.config, "scale", 3.0),
    "module list": lambda net: net.layers.append(nn.Tanh()),
    "module dict": lambda net: net.named.update({"b": nn.Tanh()}),
    "parameter list": lambda net: net.factors.append(nn.Parameter(torch.full((1,), 3.0))),
    "module without leaves": lambda net: setattr(net, "swish", nn.Tanh()),
    "class of a module": lambda net: setattr(net.swish, "__class__", Softsign),
    "module that was None": lambda net: setattr(net, "down", nn.Tanh()),
    "parameter that was None": lambda net: setattr(net, "shift", nn.Parameter(torch.ones(1))),
    "shape of a parameter": lambda net: setattr(net, "sized", nn.Parameter(torch.ones(7))),
    "eps that is only read": lambda net: setattr(net.own_norm, "eps", 0.7),
    "stride that is only read": lambda net: setattr(net.own_conv, "stride", (2, 2)),
    "mode that is only read": lambda net: net.own_norm.train(),
}
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda network: network,
    "deepcopy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
}


def network(kind: type[nn.Module] = Network) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().double()


def image() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[Any], object], copied: Callable[[nn.Module], nn.Module]) -> None:
    plain = network()
    fused = copied(fused_cna.fuse(plain))
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), plain(image()))
        assert fused.fused_cna_overlay.holds(fused)
        before = plain(image())
        for one in (plain, fused):
            change(one)
        after = plain(image())
        assert before.shape != after.shape or not torch.allclose(before, after)
        torch.testing.assert_close(fused(image()), after)


@pytest.mark.parametrize("freeze", [False, True], ids=["live", "frozen"])
def test_weights_go_with_the_network(freeze: bool) -> None:
    """Not only when the garbage collector comes by: on a GPU that may be too late."""
    fused = fused_cna.fuse(network(), freeze=freeze)
    weights = [weakref.ref(parameter) for parameter in fused.parameters()]
    gc.disable()
    try:
        del fused
        assert all(weight() is None for weight in weights)
    finally:
        gc.enable()


class Group(nn.Module):
    """A convolution, a norm and an activation that the tests put code around."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.kept: Any = types.SimpleNamespace(last=None)
        self.calls: deque[int] = deque()

    def group(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


KEPT: list[Tensor] = []


def caught(net: Any, x: Tensor) -> Tensor:
    try:
        if x.shape[0] == 2:
            return net.group(x) * 2
    except Exception:
        pass
    return net.group(x)


def keeping(net: Any, x: Tensor) -> Tensor:
    KEPT.append(net.group(x))
    return KEPT[-1]


def keeping_in_an_object(net: Any, x: Tensor) -> Tensor:
    net.kept.last = net.group(x)
    return net.kept.last


def setting_data(net: Any, x: Tensor) -> Tensor:
    y = net.group(x)
    y.data = y.data * 2
    return y


def counting(net: Any, x: Tensor) -> Tensor:
    net.calls.append(1)
    return net.group(x)


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a caught error": (caught, "control flow"),
    "a dict of dtypes": (lambda net, x: net.group(x) * {torch.float32: 2}.get(x.dtype, 1), "looks up"),
    "a length": (lambda net, x: net.group(x) * len(x), "length"),
    "a type of a result": (
        lambda net, x: net.group(x.chunk(2)[0] if isinstance(x.chunk(2), tuple) else x),
        "asks for the type",
    ),
    "autocast": (lambda net, x: net.group(x) * (2 if torch.is_autocast_enabled("cpu") else 1), "autocast"),
    "inference mode": (
        lambda net, x: net.group(x) * (2 if torch.is_inference_mode_enabled() else 1),
        "inference mode",
    ),
    "all parameters": (lambda net, x: net.group(x.to(next(net.parameters()).dtype)), "all parameters"),
    "a state dict": (lambda net, x: net.group(x) * len(net.state_dict()), "all parameters"),
    "a list outside": (keeping, "keeps a tensor"),
    "an object outside": (keeping_in_an_object, "keeps a tensor"),
    "data that is set": (setting_data, "sets data"),
    "a deque": (counting, "changes attributes"),
}


@pytest.mark.parametrize(("code", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_graph_cannot_ask_again_is_not_traced(
    code: Callable[[Any, Tensor], Tensor], reason: str
) -> None:
    plain = network(type("Refused", (Group,), {"forward": code}))
    with pytest.raises(fused_cna.FusionError, match=reason):
        fused_cna.fuse(plain)
    KEPT.clear()


ANSWERED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "is_tensor": lambda net, x: net.group(x * 2 if torch.is_tensor(x) else x),
    "isinstance": lambda net, x: net.group(x * 2 if isinstance(x, Tensor) else x),
    "no tuple": lambda net, x: net.group(x[0] if isinstance(x, (tuple, list)) else x),
    "an attribute that tensors lack": lambda net, x: net.group(x.tensors if hasattr(x, "tensors") else x),
    "a default": lambda net, x: net.group(x) if getattr(x, "mask", None) is None else x.mask,
}


@pytest.mark.parametrize("code", ANSWERED.values(), ids=ANSWERED)
def test_questions_about_the_input_are_answered_as_for_a_tensor(
    code: Callable[[Any, Tensor], Tensor],
) -> None:
    plain = network(type("Answered", (Group,), {"forward": code}))
    fused = fused_cna.fuse(plain)
    assert fused_cna.report(fused).layers[0].fused
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), plain(image()))
    assert "isinstance" not in globals()


@pytest.mark.parametrize("kind", ["shape", "dtype", "number"])
def test_a_functional_norm_and_a_sum_that_broadcasts(kind: str) -> None:
    class Functional(Group):
        def forward(self, x: Tensor, other: Any) -> Tensor:
            norm = self.norm
            y = F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)
            return F.relu(y + other)

    plain = network(Functional)
    fused = fused_cna.fuse(plain)
    other = {"shape": torch.ones(1, 4, 1, 1), "dtype": image().double(), "number": 2}[kind]
    with torch.no_grad():
        torch.testing.assert_close(fused(image(), other), plain(image(), other))


def test_other_threads_run_as_ever_while_one_fuses() -> None:
    other, stop, errors = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).double(), threading.Event(), []
    expected = other(image())

    def run() -> None:
        try:
            while not stop.is_set():
                assert torch.equal(other(image()), expected)
        except Exception as error:
            errors.append(error)

    runner = threading.Thread(target=run)
    runner.start()
    networks = [network(type("Plain", (Group,), {"forward": Group.group})) for _ in range(10)]
    fusers = [
        threading.Thread(target=fused_cna.fuse, args=(one,), kwargs={"inplace": True}) for one in networks
    ]
    for thread in fusers:
        thread.start()
    for thread in fusers:
        thread.join()
    stop.set()
    runner.join()
    assert errors == []
    assert all(fused_cna.report(one).layers[0].fused for one in networks)
    assert torch.equal(other(image()), expected)
