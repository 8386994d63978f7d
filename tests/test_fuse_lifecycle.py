"""What happens to a network after `fused_cna.fuse`: training, checkpoints, copies, changes, and back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from tests.fusion_cases import (
    CASES,
    MODES,
    Group,
    Snapshot,
    assert_equal_answers,
    assert_same,
    compare,
    every_freeze,
    image,
    number_fused,
    randomise,
)
from tests.fusion_cases.sums import Bottleneck
from tests.zoo.fused_calls import counted_frozen, recorded

TOLERANCE = 1e-10
# Classes of these are importable, so that they pickle: two that FX traces whole, and two that it does not.
NETWORKS = ["bottlenecks", "yolo_block", "branch_around_traceable_parts", "loop_over_images"]
every_network = pytest.mark.parametrize("name", NETWORKS)


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    return fused_cna.fuse(CASES[name].build(), **options), CASES[name].build()


def calls_of(network: nn.Module) -> int:
    """How many fused or frozen calls a run makes."""
    with torch.no_grad(), recorded(network) as calls, counted_frozen() as frozen:
        network(image())
    return len(calls) + len(frozen)


def scaled(network: nn.Module) -> dict[str, Tensor]:
    return {
        key: value * 1.25 if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }


def stored(network: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def step(network: nn.Module, seed: int = 0) -> float:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    optimizer.zero_grad()
    loss = (network(image(seed)) - 0.3).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss)


def trained(network: nn.Module) -> None:
    network.train()
    for seed in (0, 1, 3):
        step(network, seed)
    network.eval()


def loaded_on_meta(network: nn.Module, assign: bool) -> None:
    state = scaled(network)
    network.to("meta")
    if not assign:
        network.to_empty(device="cpu")
        # What is in this memory by chance must not come out.
        assert network(image()).shape[0] == 2
    network.load_state_dict(state, assign=assign)


def replicated(network: nn.Module) -> Any:
    """As DataParallel does it: shallow, parameters tensors of another device, set as attributes."""
    replicas = {module: module._replicate_for_data_parallel() for module in network.modules()}
    tensors = {id(value): value.detach() * 1.5 for value in network.state_dict(keep_vars=True).values()}
    for module, replica in replicas.items():
        for key, child in module._modules.items():
            replica._modules[key] = None if child is None else replicas[child]
        for key, value in module._parameters.items():
            if value is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, tensors[id(value)])
        for key, value in module._buffers.items():
            replica._buffers[key] = None if value is None else tensors[id(value)]
    return replicas[network]


def swapped(network: nn.Module) -> None:
    for value in list(network.parameters()):
        torch.utils.swap_tensors(value, nn.Parameter(value.detach() * 2))


# What people do with a network: what comes back, or the network itself, computes what the plain one does.
STEPS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy twice": lambda network: copy.deepcopy(copy.deepcopy(network)),
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "torch.save": stored,
    "channels_last": lambda network: network.to(memory_format=torch.channels_last),
    "float32 and back": lambda network: network.float().double(),
    "training and back": lambda network: network.train().eval(),
    "state_dict": lambda network: network.load_state_dict(scaled(network)) and None,
    "state_dict assigned": lambda network: network.load_state_dict(scaled(network), assign=True) and None,
    "to_empty": lambda network: loaded_on_meta(network, assign=False),
    "assigned on meta": lambda network: loaded_on_meta(network, assign=True),
    "swapped tensors": swapped,
    "trained": trained,
    "one step in eval mode": lambda network: step(network) and None,
    "replicated": replicated,
    "unfused": lambda network: fused_cna.unfuse(network),
    "requires no gradients": lambda network: network.requires_grad_(False),
}
# These set it aside.
UNFUSED = ("unfused", "replicated")


@every_network
@every_freeze
@pytest.mark.parametrize("do", STEPS)
def test_both_answer_alike(name: str, freeze: bool, do: str) -> None:
    if freeze and do == "one step in eval mode":
        pytest.skip("a snapshot has no gradients for parameters")
    fused, plain = pair(name, freeze=freeze)
    tolerance = 1e-5 if "float32" in do else 1e-8
    assert_equal_answers(fused, plain)
    calls = calls_of(fused)
    after, expected = (STEPS[do](network) for network in (fused, plain))
    after, expected = after or fused, expected or plain
    assert_equal_answers(after, expected, tolerance)
    if do not in UNFUSED and (not freeze or after is not fused):
        assert calls_of(after) == calls
        assert number_fused(after) == number_fused(fused)
    assert isinstance(after, type(plain))
    assert not after.training
    assert list(after.state_dict()) == list(expected.state_dict())
    assert_same(dict(after.state_dict()), dict(expected.state_dict()), tolerance)
    # What was copied goes its own way.
    if after is not fused:
        with torch.no_grad():
            for value in fused.parameters():
                value.zero_()
        assert_equal_answers(after, expected, tolerance)


@every_network
@every_freeze
@pytest.mark.parametrize("inputs", [None, (image(),)], ids=["alone", "with_inputs"])
def test_the_original_is_untouched(name: str, freeze: bool, inputs: Any) -> None:
    plain, random_numbers = CASES[name].build(), torch.get_rng_state()
    before = Snapshot(plain)
    fused = fused_cna.fuse(plain, freeze=freeze, example_inputs=inputs)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    fused.train()
    fused.requires_grad_(False)
    before.check(plain)
    mine, theirs = ({value.data_ptr() for value in net.state_dict().values()} for net in (fused, plain))
    assert not mine & theirs
    for names in ("named_parameters", "named_buffers", "named_modules"):
        assert [key for key, _ in getattr(fused, names)()] == [key for key, _ in getattr(plain, names)()]


@every_network
@every_freeze
def test_in_place_and_back(name: str, freeze: bool) -> None:
    """The very modules and tensors, also those that an optimizer holds; and no trace is left."""
    plain, network = CASES[name].build(), CASES[name].build()
    tensors = {key: id(value) for key, value in network.state_dict(keep_vars=True).items()}
    modules = dict(network.named_modules())
    attributes = {key: dict(vars(module)) for key, module in modules.items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    assert fused_cna.fuse(network, inplace=True, freeze=freeze) is network
    assert fused_cna.fuse(network, inplace=True, freeze=freeze) is network
    assert dict(network.named_modules()) == modules
    compare(CASES[name], network, plain, ("no_grad", "inference_mode") if freeze else tuple(MODES))
    assert number_fused(network) > 0 or name == "loop_over_images"
    assert fused_cna.unfuse(network, inplace=True) is network
    assert {key: id(value) for key, value in network.state_dict(keep_vars=True).items()} == tensors
    kinds = {key: type(module) for key, module in plain.named_modules()}
    assert {key: type(module) for key, module in network.named_modules()} == kinds
    assert {key: dict(vars(module)) for key, module in modules.items()} == attributes
    before = network(image())
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(network(image()), before)


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
    assert (keys.missing_keys, keys.unexpected_keys) == ([missing], ["unknown.weight"])
    assert fused.state_dict()._metadata == plain.state_dict()._metadata


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
    assert fused.train().training
    assert not fused.norm.training
    plain.train()
    for seed in (0, 1):
        assert step(fused, seed) == pytest.approx(step(plain, seed), rel=1e-9)
    assert_equal_answers(fused.eval(), plain.eval())


def test_a_sequence_stays_one() -> None:
    """What was added is none of its layers, in no mode and by no way of asking."""
    fused, plain = pair("bottlenecks")
    assert len(fused) == len(plain)
    assert fused[-1] is fused.get_submodule("1")
    with torch.no_grad():
        assert_same(fused[1:](fused[:1](image())), plain(image()), TOLERANCE)
        for network in (fused, plain):
            network.append(nn.Tanh())
        assert_same(fused(image()), plain(image()), TOLERANCE)
        for network in (fused, plain):
            del network[0]
        x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
        assert_same(fused(x), plain(x), TOLERANCE)


def test_a_fused_network_inside_another() -> None:
    inner, plain_inner = pair("bottlenecks")
    plain = nn.Sequential(plain_inner, Bottleneck(6, 6, 1).double()).eval()
    fused = fused_cna.fuse(nn.Sequential(inner, copy.deepcopy(plain[1])).eval())
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_equal_answers(fused, plain)
    assert calls_of(fused) == calls_of(inner) + 3


def test_a_run_on_example_inputs_leaves_no_trace() -> None:
    """Neither in what forward keeps or counts, nor in its inputs, nor in random numbers."""
    kept = {"conv_output_kept": "last", "counting_in_python": "calls", "counting": "calls"}
    for name, attribute in kept.items():
        network, x = CASES[name].build(), image()
        state = (torch.get_rng_state(), random.getstate(), x._version)
        fused = fused_cna.fuse(network, example_inputs=(x,))
        assert_same(getattr(fused, attribute), getattr(network, attribute), 0)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert (random.getstate(), x._version) == state[1:]
        copy.deepcopy(fused)


@every_freeze
def test_weights_go_with_the_network(freeze: bool) -> None:
    """Not only when the garbage collector comes by: on a GPU that may be too late."""
    fused, _ = pair("bottlenecks", freeze=freeze)
    fused(image())
    weights = [weakref.ref(parameter) for parameter in fused.parameters()]
    gc.collect()
    gc.disable()
    try:
        del fused
        assert all(weight() is None for weight in weights)
    finally:
        gc.enable()
