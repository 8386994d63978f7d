"""What happens to a network after `fused_cna.fuse`: training, checkpoints, changes, and back."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from tests.fusion_cases import (
    CASES,
    DRAWS,
    Group,
    Snapshot,
    assert_equal_answers,
    assert_same,
    compare,
    number_fused,
    randomise,
)
from tests.fusion_cases.sums import Bottleneck, chain

TOLERANCE = 1e-10

# Two networks that FX traces whole, and one that it does not.
NETWORKS = ["bottlenecks", "yolo_block", "conv_modules_by_argument"]
UNTRACEABLE = ["branch_around_traceable_parts", "loop_over_images"]
every_network = pytest.mark.parametrize("name", NETWORKS + UNTRACEABLE)
every_freeze = pytest.mark.parametrize("freeze", [False, True], ids=["live", "frozen"])


def image(seed: int = 0) -> Tensor:
    return DRAWS[seed].image()


def fuse(name: str, network: nn.Module | None = None, **options: Any) -> Any:
    """The case's network fused; example inputs go to those that need them."""
    if name in UNTRACEABLE:
        options["example_inputs"] = (image(),)
    return fused_cna.fuse(CASES[name].build() if network is None else network, **options)


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    return fuse(name, **options), CASES[name].build()


@every_network
@every_freeze
def test_the_original_is_untouched(name: str, freeze: bool) -> None:
    plain = CASES[name].build()
    before = Snapshot(plain)
    fused = fuse(name, plain, freeze=freeze)
    assert_equal_answers(fused, plain)
    fused.train()
    fused.requires_grad_(False)
    before.check(plain)
    mine = {value.data_ptr() for value in fused.state_dict().values() if value.numel()}
    theirs = {value.data_ptr() for value in plain.state_dict().values() if value.numel()}
    assert not mine & theirs


@every_network
def test_inplace_returns_the_same_object(name: str) -> None:
    plain = CASES[name].build()
    tensors = {key: id(value) for key, value in plain.state_dict(keep_vars=True).items()}
    fused = fuse(name, plain, inplace=True)
    assert fused is plain
    assert {key: id(value) for key, value in fused.state_dict(keep_vars=True).items()} == tensors
    assert number_fused(fused) > 0
    compare(CASES[name], fused, CASES[name].build())


def test_inplace_leaves_references_to_submodules_valid() -> None:
    plain = CASES["bottlenecks"].build()
    first = plain[0]
    fused_cna.fuse(plain, inplace=True)
    assert plain[0] is first
    assert first.conv1.weight is plain.state_dict(keep_vars=True)["0.conv1.weight"]


@every_network
@every_freeze
def test_names(name: str, freeze: bool) -> None:
    fused, plain = pair(name, freeze=freeze)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert isinstance(fused, type(plain))
    assert len(list(fused.parameters())) == len(list(plain.parameters()))
    if name in NETWORKS:
        assert [key for key, _ in fused.named_parameters()] == [key for key, _ in plain.named_parameters()]
    if name in NETWORKS and not freeze:
        assert [key for key, _ in fused.named_buffers()] == [key for key, _ in plain.named_buffers()]


def test_a_sequence_stays_one() -> None:
    """What was added is none of its layers, in no mode and by no way of asking."""
    plain = CASES["bottlenecks"].build()
    fused = fused_cna.fuse(plain)
    assert len(fused) == len(plain)
    assert [type(layer) for layer in fused] == [type(layer) for layer in plain]
    assert fused[-1] is fused.get_submodule("1")
    with torch.no_grad():
        assert_same(fused[:1](image()), plain[:1](image()), TOLERANCE)
        assert_same(fused[1:](fused[:1](image())), plain(image()), TOLERANCE)
        both = torch.randn(2, 6, 4, 5, dtype=torch.float64)
        for network in (fused, plain):
            network.append(nn.Tanh())
        assert_same(fused[2](both), plain[2](both), TOLERANCE)
        assert_same(fused(image()), plain(image()), TOLERANCE)
        for network in (fused, plain):
            del network[0]
        assert len(fused) == len(plain) == 2
        x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
        assert_same(fused(x), plain(x), TOLERANCE)


@every_network
def test_checkpoints_both_ways(name: str) -> None:
    fused, plain = pair(name)
    with torch.no_grad():
        for value in plain.state_dict().values():
            if value.is_floating_point():
                value.mul_(1.25)
    fused.load_state_dict(plain.state_dict(), strict=True)
    assert_equal_answers(fused, plain)
    another = CASES[name].build()
    another.load_state_dict(fused.state_dict(), strict=True)
    assert_equal_answers(fused, another)


@every_network
def test_checkpoints_are_checked(name: str) -> None:
    fused, plain = pair(name)
    state = plain.state_dict()
    missing = next(iter(state))
    del state[missing]
    state["unknown.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=rf"(?s)(?=.*{missing})(?=.*unknown\.weight)"):
        fused.load_state_dict(state)
    keys = fused.load_state_dict(state, strict=False)
    assert keys.missing_keys == [missing]
    assert keys.unexpected_keys == ["unknown.weight"]


@every_network
def test_checkpoints_by_assignment(name: str) -> None:
    fused, plain = pair(name)
    state = {
        key: value * 1.5 if value.is_floating_point() else value for key, value in plain.state_dict().items()
    }
    fused.load_state_dict(state, assign=True)
    plain.load_state_dict(state)
    assert_equal_answers(fused, plain)


def step(network: nn.Module, seed: int) -> float:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    loss = (network(image(seed)) - 0.3).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss)


@every_network
def test_training_goes_on_as_before(name: str) -> None:
    fused, plain = pair(name)
    assert_equal_answers(fused, plain)
    for network in (fused, plain):
        network.train()
        assert all(module.training for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    for seed in (0, 1, 3):
        assert step(fused, seed) == pytest.approx(step(plain, seed), rel=1e-9)
    assert_same(dict(fused.state_dict()), dict(plain.state_dict()), 1e-8)
    assert_equal_answers(fused.eval(), plain.eval(), 1e-8)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_in_eval_mode(name: str) -> None:
    fused, plain = pair(name)
    grads = []
    for network in (fused, plain):
        x = image().requires_grad_()
        network(x).square().sum().backward()
        grads.append({"x": x.grad, **{key: value.grad for key, value in network.named_parameters()}})
    assert_same(grads[0], grads[1], TOLERANCE)


def test_a_train_method_of_ones_own() -> None:
    """The usual way to keep norms frozen while the rest trains."""

    class NormsFrozen(Group):
        def train(self, mode: bool = True) -> NormsFrozen:
            super().train(mode)
            self.norm.eval()
            return self

    torch.manual_seed(0)
    plain = NormsFrozen()
    randomise(plain)
    fused = fused_cna.fuse(plain.double().eval())
    fused.train()
    plain.train()
    assert fused.training
    assert not fused.norm.training
    for seed in (0, 1):
        assert step(fused, seed) == pytest.approx(step(plain, seed), rel=1e-9)
    assert_same(dict(fused.state_dict()), dict(plain.state_dict()), 1e-9)
    assert_equal_answers(fused.eval(), plain.eval())


@every_network
@every_freeze
def test_unfuse(name: str, freeze: bool) -> None:
    fused, plain = pair(name, freeze=freeze)
    with torch.no_grad():
        for network in (fused, plain):
            for value in network.parameters():
                value.mul_(1.1)
    back = fused_cna.unfuse(fused)
    assert type(back) is type(plain)
    assert [type(module) for module in back.modules()] == [type(module) for module in plain.modules()]
    assert [key for key, _ in back.named_modules()] == [key for key, _ in plain.named_modules()]
    assert list(back.state_dict()) == list(plain.state_dict())
    assert_same(dict(back.state_dict()), dict(plain.state_dict()), 0)
    assert_equal_answers(back, plain)
    assert set(vars(back)) == set(vars(plain))


@every_network
def test_fused_again(name: str) -> None:
    fused, plain = pair(name)
    again = fuse(name, fused)
    assert number_fused(again) == number_fused(fused)
    assert list(again.state_dict()) == list(plain.state_dict())
    compare(CASES[name], again, plain)
    assert type(fused_cna.unfuse(again)) is type(plain)


def test_a_fused_network_inside_another() -> None:
    inner = fuse("bottlenecks")
    plain = nn.Sequential(CASES["bottlenecks"].build(), Bottleneck(6, 6, 1).double()).eval()
    outer = nn.Sequential(inner, copy.deepcopy(plain[1])).eval()
    fused = fused_cna.fuse(outer)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_equal_answers(fused, plain)
    assert number_fused(fused) == number_fused(inner) + 3


@every_network
def test_verify_passes_and_changes_nothing(name: str) -> None:
    plain = CASES[name].build()
    before = Snapshot(plain)
    fused = fused_cna.fuse(plain, example_inputs=(image(),), verify=True)
    before.check(plain)
    compare(CASES[name], fused, CASES[name].build())


def test_verify_leaves_statistics_alone() -> None:
    case = CASES["norm_in_training_mode"]
    fused = fused_cna.fuse(case.build(), example_inputs=(image(),), verify=True)
    assert_same(dict(fused.state_dict()), dict(case.build().state_dict()), 0)


def test_no_trace_is_left_behind_in_the_fused_network() -> None:
    """A forward that keeps something must not keep what the trace put there."""
    for name, attribute in (("conv_output_kept", "last"), ("conv_output_appended", "history")):
        network = CASES[name].build()
        before = copy.deepcopy(getattr(network, attribute))
        fused = fused_cna.fuse(network, example_inputs=(image(),))
        assert getattr(fused, attribute) == before
        copy.deepcopy(fused)


@every_freeze
def test_threads(freeze: bool) -> None:
    fused, plain = pair("bottlenecks", freeze=freeze)
    images = [torch.randn(2, 4, 8, 9, dtype=torch.float64) for _ in range(8)]
    results: dict[int, Tensor] = {}

    def run(index: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                results[index] = fused(images[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for index, x in enumerate(images):
            assert_same(results[index], plain(x), TOLERANCE)


def test_freeze_is_a_snapshot() -> None:
    plain = chain()
    frozen, snapshot = fused_cna.fuse(plain, freeze=True), copy.deepcopy(plain)
    with torch.no_grad():
        frozen.body.conv.weight.mul_(3)
        frozen.body.norm.running_mean.add_(1)
        plain.body.conv.weight.mul_(3)
        plain.body.norm.running_mean.add_(1)
    assert_equal_answers(frozen, snapshot)
    assert_equal_answers(fused_cna.unfuse(frozen), plain)


def test_freeze_and_training() -> None:
    """In training mode the parameters are used, and changed, that `unfuse` gives back."""
    frozen, plain = pair("bottlenecks", freeze=True)
    frozen.train()
    plain.train()
    assert step(frozen, 0) == pytest.approx(step(plain, 0), rel=1e-9)
    assert_same(dict(frozen.state_dict()), dict(plain.state_dict()), 1e-8)
    assert_equal_answers(fused_cna.unfuse(frozen).eval(), plain.eval(), 1e-8)
