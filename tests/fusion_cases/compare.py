"""Whether two networks do the same, seen from outside, and whether one was left as it was."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fused_cna
from tests.fusion_cases.case import DRAWS, Case

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}

every_freeze = pytest.mark.parametrize("freeze", [False, True], ids=["live", "frozen"])


def assert_same(actual: Any, expected: Any, tolerance: float, what: str = "result") -> None:
    """The same structure, types, shapes and dtypes, and values within a bound relative to the largest."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{what}: {type(actual)} instead of a tensor"
        assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
        assert actual.shape == expected.shape, f"{what}: {actual.shape} instead of {expected.shape}"
        if expected.numel() == 0:
            return
        if not expected.is_floating_point():
            assert torch.equal(actual, expected), what
            return
        wanted = expected.detach().double()
        torch.testing.assert_close(
            actual.detach().double(),
            wanted,
            rtol=0,
            atol=tolerance * max(wanted.abs().max().item(), 1e-3),
            equal_nan=True,
            msg=lambda message: f"{what}: {message}",
        )
        return
    assert type(actual) is type(expected), f"{what}: {type(actual)} instead of {type(expected)}"
    if isinstance(expected, dict):
        assert list(actual) == list(expected), what
        for key in expected:
            assert_same(actual[key], expected[key], tolerance, f"{what}[{key!r}]")
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), what
        for index, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert_same(mine, theirs, tolerance, f"{what}[{index}]")
    elif dataclasses.is_dataclass(expected):
        assert_same(vars(actual), vars(expected), tolerance, what)
    elif isinstance(expected, float):
        assert math.isclose(actual, expected, rel_tol=tolerance), what
    else:
        assert actual == expected, what


def assert_equal_answers(fused: nn.Module, plain: nn.Module, tolerance: float = 1e-10) -> None:
    """The same results for two images, which both networks take alone."""
    dtype = next(value.dtype for value in plain.state_dict().values() if value.is_floating_point())
    for draw in DRAWS[:2]:
        x = draw.image().to(dtype)
        with torch.no_grad():
            assert_same(fused(x), plain(x), tolerance)


def number_fused(network: nn.Module) -> int:
    """How many convolutions are fused with something."""
    return sum(layer.fused for layer in fused_cna.report(network).layers)


def seed() -> None:
    torch.manual_seed(5)
    random.seed(5)


def storages(*values: Any) -> list[int]:
    """For each tensor the index of the first one that lies in the same memory."""
    places = [leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [places.index(place) for place in places]


def strides(values: Any) -> list[list[int]]:
    """Those that say where elements lie."""
    return [
        [step for step, size in zip(leaf.stride(), leaf.shape, strict=True) if size > 1]
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor) and leaf.numel() > 0
    ]


def backward(result: Any) -> None:
    loss: Any = 0
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            weights = torch.arange(leaf.numel(), dtype=leaf.dtype).cos().reshape(leaf.shape)
            loss = loss + (leaf * weights).sum()
    if isinstance(loss, Tensor):
        loss.backward()


def gradients(network: nn.Module) -> dict[str, Any]:
    return {name: value.grad for name, value in network.state_dict(keep_vars=True).items()}


def zero_gradients(network: nn.Module) -> None:
    for value in network.state_dict(keep_vars=True).values():
        value.grad = None


def call(network: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], mode: str) -> Any:
    seed()
    zero_gradients(network)
    with MODES[mode]():
        result = network(*arguments, **keywords)
        if mode == "grad":
            backward(result)
    return result


def has_gradients(case: Case) -> bool:
    """Whether autograd takes what the original does to its tensors."""
    arguments, keywords = case.arguments(case.draws[0])
    try:
        call(case.build(), arguments, keywords, "grad")
    except RuntimeError as error:
        if not re.search(r"backward|gradient|differentiation|view", str(error)):
            raise
        return False
    return True


def compare(case: Case, fused: Any, plain: Any, modes: tuple[str, ...] = tuple(MODES)) -> None:
    """Both called with the same: results and where they lie, arguments, memory shared, state, gradients."""
    for mode in modes:
        if mode == "grad" and not has_gradients(case):
            continue
        for draw in case.draws if mode == "no_grad" else case.draws[:2]:
            what = f"{mode}, {draw}"
            theirs, mine = case.arguments(draw), case.arguments(draw)
            expected = call(plain, *theirs, mode)
            actual = call(fused, *mine, mode)
            assert_same(actual, expected, case.tolerance, what)
            assert strides(actual) == strides(expected), f"strides, {what}"
            assert_same(mine, theirs, case.tolerance, f"arguments afterwards, {what}")
            assert storages(mine, actual) == storages(theirs, expected), f"memory shared, {what}"
            assert_same(
                dict(fused.state_dict()),
                dict(plain.state_dict()),
                case.tolerance,
                f"state afterwards, {what}",
            )
            if mode == "grad":
                assert_same(
                    gradients(fused), gradients(plain), 10 * case.tolerance, f"gradients afterwards, {what}"
                )
            for name in case.attributes:
                assert_same(getattr(fused, name), getattr(plain, name), case.tolerance, f"{name}, {what}")


class Snapshot:
    """A network as it was: its classes, attributes and hooks, and every tensor by identity and value."""

    def __init__(self, network: nn.Module, *, of_versions: bool = True) -> None:
        self.of_versions = of_versions
        """Whether a tensor may not even have been written to and put back."""
        self.modules = {
            name: (module, type(module), self._describe(module)) for name, module in network.named_modules()
        }
        self.tensors = {
            name: (value, value.detach().clone(), self._describe_tensor(value))
            for name, value in network.state_dict(keep_vars=True).items()
        }

    @staticmethod
    def _describe(module: nn.Module) -> dict[str, Any]:
        described: dict[str, Any] = {}
        for name, value in vars(module).items():
            if isinstance(value, (dict, list, set)):
                described[name] = (id(value), [(id(x), x if isinstance(x, str) else "") for x in value])
                if isinstance(value, dict):
                    described[name] += ([id(x) for x in value.values()],)
            elif isinstance(value, (bool, int, float, str, tuple)):
                described[name] = value
            else:
                described[name] = id(value)
        return described

    def _describe_tensor(self, value: Tensor) -> tuple[Any, ...]:
        return (
            value.data_ptr(),
            value._version if self.of_versions else None,
            value.stride(),
            value.dtype,
            value.device,
            value.requires_grad,
            None if value.grad is None else id(value.grad),
        )

    def check(self, network: nn.Module) -> None:
        modules = dict(network.named_modules())
        assert list(modules) == list(self.modules)
        for name, (module, kind, described) in self.modules.items():
            assert modules[name] is module, name
            assert type(module) is kind, f"{name!r} has become a {type(module)}"
            now = self._describe(module)
            changed = [key for key in {*now, *described} if now.get(key) != described.get(key)]
            assert not changed, f"attributes of {name!r} have changed: {changed}"
        tensors = network.state_dict(keep_vars=True)
        assert list(tensors) == list(self.tensors)
        for name, (tensor, values, described) in self.tensors.items():
            assert tensors[name] is tensor, f"{name} is another tensor"
            assert self._describe_tensor(tensor) == described, f"{name} has changed"
            assert tensor.is_meta or torch.equal(tensor.detach(), values), f"{name} has other values"
