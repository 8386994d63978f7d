"""Calls of ConvNormAct that go to the operator without Python: only while the module is as it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_cna import ConvNormAct, _arrangement, _extension, layers, ops
from fused_cna.fusion.rewrite import FusedBlock
from tests.plain import pair
from tests.test_submodules import CHANGES, PARAMETRIZED, Halved

pytestmark = pytest.mark.skipif(not _extension.is_available(), reason="the extension compares the modules")


@pytest.fixture(autouse=True)
def _fresh(operators: None) -> Iterator[None]:
    _arrangement.calls.clear()
    _arrangement._times.clear()
    yield
    _arrangement.calls.clear()
    _arrangement._times.clear()


def image(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def arranged(module: ConvNormAct, *arguments: Tensor) -> Any:
    """What the kept arrangement answers, without Python behind it."""
    return _arrangement.calls[id(module)](module, arguments[0], arguments[1] if arguments[1:] else None)


X = image(2, 4, 8, 9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "act": partial(nn.LeakyReLU, 0.3)},
        {"norm": None, "act": None},
        {"norm": partial(nn.BatchNorm2d, affine=False), "act": nn.Hardswish, "groups": 2},
        {"stride": 2, "padding": (2, 0), "dilation": (1, 2), "act": partial(nn.Hardtanh, 0.0, 6.0)},
        {"residual_order": "act_add", "act": nn.GELU},
    ],
)
def test_the_second_call_needs_no_python(
    options: dict[str, Any], mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, plain = pair(4, 6, **options)
    with mode():
        residual = torch.ones_like(plain(X))
        fused(X)
        monkeypatch.setattr(ConvNormAct, "_compute", None)
        torch.testing.assert_close(fused(X), plain(X))
        torch.testing.assert_close(fused(X, residual), plain(X, residual))
        other = image(3, 4, 11, 7)
        torch.testing.assert_close(fused(other), plain(other))


def replaced(name: str, value: object) -> Callable[[Any], object]:
    return lambda module: module.register_module(name, value)


def hooked(name: str, register: str) -> Callable[[Any], object]:
    def hook(*arguments: Any) -> Any:
        return arguments[-1] * 2 if register == "register_forward_hook" else None

    return lambda module: getattr(module.get_submodule(name), register)(hook)


SEEN: dict[str, Callable[[Any], object]] = {
    **CHANGES,
    **PARAMETRIZED,
    **{
        f"{name} {hook}": hooked(name, f"register_{hook}")
        for name in ("conv", "norm", "act")
        for hook in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    },
    "forward": lambda module: setattr(module.norm, "forward", lambda x: x + 1),
    "groups": lambda module: (
        setattr(module.conv, "groups", 2),
        setattr(module.conv, "weight", nn.Parameter(torch.full((6, 2, 3, 3), 0.2))),
    ),
    "padding_mode": lambda module: setattr(module.conv, "padding_mode", "reflect"),
    "padding_by_name": lambda module: setattr(module.conv, "padding", "valid"),
    "list": lambda module: setattr(module.conv, "stride", [2, 2]),
    "norm_trains": lambda module: module.norm.train(),
    "trains": lambda module: module.train(),
    "conv_class": lambda module: setattr(
        module, "conv", parametrized(nn.Conv2d(4, 6, 3, padding=1, bias=False))
    ),
    "bias_none": lambda module: module.conv.register_parameter("bias", None),
    "norm_none": replaced("norm", None),
    "act_none": replaced("act", None),
    "order": lambda module: setattr(module, "residual_order", "act_add"),
    "float64": lambda module: module.double(),
    "shorter": lambda module: setattr(module, "conv", nn.Conv2d(4, 6, 1)),
}


def parametrized(conv: nn.Conv2d) -> nn.Conv2d:
    torch.nn.utils.parametrize.register_parametrization(conv, "weight", Halved())
    return conv


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_changes_are_seen_by_the_next_call(change: Callable[[Any], object]) -> None:
    """With what Python finds out at each call as the judge, which other tests compare with plain modules."""
    fused, _ = pair(4, 6, act=partial(nn.LeakyReLU, 0.1))
    with torch.no_grad():
        fused(X)
        assert arranged(fused, X) is not NotImplemented
    torch.manual_seed(3)
    change(fused)
    x = X.to(fused.conv.weight.dtype)
    with torch.no_grad():
        residual = torch.ones(fused(x).shape, dtype=x.dtype)
        for arguments in ((x, None), (x, residual)):
            actual = fused(*arguments), fused(*arguments)
            expected = fused._compute(*arguments, None)
            assert all(torch.equal(y, expected) for y in actual)


@pytest.mark.parametrize("act", [nn.ReLU6, partial(nn.LeakyReLU, 0.2), partial(nn.ELU, 0.5), nn.GELU])
def test_every_attribute_that_python_reads_is_compared(
    act: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, _ = pair(4, 6, act=act)
    names = {fused: "own", fused.conv: "conv", fused.norm: "norm", fused.act: "act"}
    read: dict[str, set[str]] = {name: set() for name in names.values()}

    def getattribute(module: nn.Module, name: str) -> Any:
        if (
            module in names
            and not name.startswith("__")
            and name in object.__getattribute__(module, "__dict__")
        ):
            read[names[module]].add(name)
        return object.__getattribute__(module, name)

    for kind in {type(module) for module in names}:
        monkeypatch.setattr(kind, "__getattribute__", getattribute, raising=False)
    with torch.no_grad():
        fused._compute(X, torch.ones(2, 6, 8, 9), None)
    monkeypatch.undo()
    tensors_and_children = {"_parameters", "_buffers", "_modules"}
    compared = {
        "own": {*_arrangement._OWN},
        "conv": {*_arrangement._OF_CONV, *layers.HOOKS},
        "norm": {*_arrangement._OF_NORM, *layers.HOOKS},
        "act": {*_arrangement._OF_ACT, *layers.HOOKS},
    }
    for name, attributes in read.items():
        assert attributes - tensors_and_children <= compared[name], name
    assert "stride" in read["conv"]
    assert "eps" in read["norm"]


@pytest.mark.parametrize("name", _arrangement._GLOBAL_HOOKS)
def test_global_hooks_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _ = pair(4, 6)
    with torch.no_grad():
        fused(X)
        assert arranged(fused, X) is not NotImplemented
        monkeypatch.setattr(module_hooks, name, {0: lambda *_: None})
        assert arranged(fused, X) is NotImplemented


class Tagged(Tensor):
    pass


class Sees(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.saw: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.saw.add(func)
        return func(*args, **(kwargs or {}))


class Records(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.saw: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.saw.append(func)
        return func(*args, **(kwargs or {}))


def test_what_python_has_to_see_goes_through_python() -> None:
    fused, _ = pair(4, 6)
    residual = torch.ones(2, 6, 8, 9)
    with torch.no_grad():
        fused(X)
        declined: list[tuple[Any, ...]] = [
            (X.as_subclass(Tagged),),
            (X[0],),
            (X.double(),),
            (X.to("meta"),),
            (FakeTensorMode().from_tensor(X),),
            (X, residual.as_subclass(Tagged)),
            (X, residual.double()),
            (X, residual[:1]),
            (X, 1.0),
        ]
        assert all(arranged(fused, *arguments) is NotImplemented for arguments in declined)
        assert arranged(fused, X, residual) is not NotImplemented
        with Sees() as mode:
            assert fused(X).shape == residual.shape
        assert ops.operator in mode.saw
    assert arranged(fused, X) is NotImplemented  # a gradient may be wanted
    assert fused(X).requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_the_dispatcher_sees_the_operator() -> None:
    fused, plain = pair(4, 6)
    with torch.no_grad():
        fused(X)
        with Records() as mode:
            arranged(fused, X)
        assert ops.operator in mode.saw
        with torch.autocast("cpu", torch.bfloat16):
            assert arranged(fused, X).dtype == torch.bfloat16
        traced = torch.jit.trace(fused, (X,), check_trace=False)
        assert "fused_cna::conv_norm_act" in [node.kind() for node in traced.graph.nodes()]
        batched = torch.vmap(fused)(X.expand(3, *X.shape))
        torch.testing.assert_close(batched[2], plain(X))
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        x = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        assert torch.autograd.forward_ad.unpack_dual(fused(x)).tangent is not None


def test_operator_everywhere_and_the_operator_itself_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _ = pair(4, 6)
    with torch.no_grad():
        fused(X)
        monkeypatch.setattr(ops, "operator_everywhere", False)
        assert arranged(fused, X) is NotImplemented
        monkeypatch.setattr(ops, "operator_everywhere", True)
        monkeypatch.setattr(ops, "operator", torch.ops.fused_cna._dry_run.default)
        assert arranged(fused, X) is NotImplemented


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_what_cannot_be_compared_is_not_kept() -> None:
    for options in (
        {"padding": "same"},
        {"padding_mode": "reflect"},
        {"act": nn.Softplus},
        {"norm": nn.InstanceNorm2d},
    ):
        fused, _ = pair(4, 6, **options)
        with torch.no_grad():
            fused(X)
        assert id(fused) not in _arrangement.calls
    fused(X)  # with a gradient Python stays
    assert not _arrangement.calls


def test_refusals_are_those_of_the_operator() -> None:
    fused, _ = pair(4, 6)
    with torch.no_grad():
        fused(X)
        said = []
        for call in (fused, lambda *arguments: fused._compute(*arguments, None, None)):
            with pytest.raises(RuntimeError) as refused:
                call(image(2, 3, 8, 9))
            said.append(str(refused.value))
    assert said[0] == said[1]
    assert "to have 4 channels, but got 3" in said[0]


def test_a_residual_that_does_not_fit_a_fused_block_broadcasts() -> None:
    plain = pair(4, 6)[1]
    block = FusedBlock.from_modules(plain.conv, plain.norm, plain.act).eval()
    with torch.no_grad():
        for residual in (torch.ones(2, 6, 8, 9), torch.ones(6, 1, 1), torch.ones(2, 6, 8, 9)):
            torch.testing.assert_close(block(X, residual), plain.act(plain.norm(plain.conv(X)) + residual))
    assert id(block) in _arrangement.calls


def test_a_module_carries_nothing_of_it() -> None:
    fused, plain = pair(4, 6)
    before, attributes = pickle.dumps(fused), set(vars(fused))
    with torch.no_grad():
        fused(X)
        assert pickle.dumps(fused) == before
        assert set(vars(fused)) == attributes
        torch.save(fused, io.BytesIO())
        other = copy.deepcopy(fused)
        other.conv.weight.zero_()
        torch.testing.assert_close(fused(X), plain(X))
        # An arrangement holds for all that looks the same: ids are used again.
        _arrangement.calls[id(other)] = _arrangement.calls[id(fused)]
        assert torch.equal(arranged(other, X), other._compute(X, None, None))


def test_no_tensor_and_no_module_is_kept_alive() -> None:
    fused, _ = pair(4, 6)
    with torch.no_grad():
        fused(X)
    kept = [weakref.ref(fused), weakref.ref(fused.conv), *map(weakref.ref, fused.parameters())]
    del fused
    gc.collect()
    assert not any(one() is not None for one in kept)


def test_a_module_that_keeps_changing_is_no_longer_kept() -> None:
    fused, plain = pair(4, 6)
    with torch.no_grad():
        for step in range(1, 12):
            fused.norm.eps = plain.norm.eps = step / 10
            torch.testing.assert_close(fused(X), plain(X))
        assert arranged(fused, X) is NotImplemented


def test_many_modules_are_forgotten_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arrangement, "_MOST_CALLS", 3)
    modules = [pair(4, 6)[0] for _ in range(5)]
    with torch.no_grad():
        for module in modules:
            module(X)
    assert len(_arrangement.calls) == 2


def test_threads() -> None:
    fused, plain = pair(4, 6)
    states = [{name: value + i for name, value in plain.state_dict().items()} for i in range(2)]
    expected = []
    with torch.no_grad():
        for state in states:
            plain.norm.bias.copy_(state["norm.bias"])
            expected.append(plain(X))
    biases = [nn.Parameter(state["norm.bias"]) for state in states]
    wrong: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            for _ in range(100):
                y = fused(X)
                if not any(torch.allclose(y, one, atol=1e-5) for one in expected):
                    wrong.append(y)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for bias in biases:
            fused.norm.bias = bias
    assert not wrong


def test_a_compiler_traces_the_module_whole(graphs: Any) -> None:
    fused, plain = pair(4, 6)
    with torch.no_grad():
        fused(X)
        y = torch.compile(fused, backend=graphs, fullgraph=True)(X)
        torch.testing.assert_close(y, plain(X))
        assert len(graphs.made) == len(graphs.calls) == 1
