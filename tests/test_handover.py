"""Groups in Python code that goes another way than it did when it was observed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_cna
from fused_cna import ops
from fused_cna.fusion.records import FusionError
from tests.observed import (
    Calls,
    assert_same,
    chain,
    image,
    observed,
    parts_of,
    untraceable,
)


@pytest.fixture(autouse=True)
def _groups_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "operator_everywhere", True)


def test_function_called_with_other_options_than_observed() -> None:
    plain = untraceable(lambda net, x: F.leaky_relu(net.bn1(net.conv1(x)), net.slope))
    plain.slope = 0.25
    fused = observed(plain)
    for slope in (0.25, 0.5):
        plain.slope = fused.slope = slope
        assert_same(fused, plain, image())


def without_gradients(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


OTHER_WAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "another norm": lambda net, x: net.relu(net.bn2(net.conv1(x))),
    "no norm": lambda net, x: net.conv1(x),
    "no activation": lambda net, x: net.bn1(net.conv1(x)),
    "norm twice": lambda net, x: net.bn1(net.bn1(net.conv1(x))),
    "activation twice": lambda net, x: net.relu(net.relu(net.bn1(net.conv1(x)))),
    "activation first": lambda net, x: net.bn1(net.relu(net.conv1(x))),
    "another input of the norm": lambda net, x: net.bn1(x.repeat(1, 2, 1, 1)),
    "result used before": lambda net, x: (y := net.conv1(x)).mean() * net.relu(net.bn1(y)),
    "result used after": lambda net, x: (y := net.conv1(x)).add(net.relu(net.bn1(y))),
    "result returned": lambda net, x: (y := net.conv1(x), net.relu(net.bn1(y))),
    "norm's result used": lambda net, x: (z := net.bn1(net.conv1(x))).mul(2) + net.relu(z),
    "norm's result used after": lambda net, x: net.relu(z := net.bn1(net.conv1(x))) + z,
    "overwritten": lambda net, x: net.relu(net.bn1(net.conv1(x).mul_(2))),
    "overwritten, name kept": lambda net, x: ((y := net.conv1(x)).mul_(2), net.relu(net.bn1(y)))[1],
    "written into": lambda net, x: ((y := net.conv1(x)).__setitem__(0, 0), net.relu(net.bn1(y)))[1],
    "next convolution at once": lambda net, x: net.conv2(net.conv1(x)),
    "gradients": lambda net, x: without_gradients(net.conv1, x).add(
        net.relu(net.bn1(without_gradients(net.conv1, x)))
    ),
    "in a list": lambda net, x: torch.cat([net.conv1(x), net.bn1(net.conv1(x))]),
    "same result for two norms": lambda net, x: net.bn2(y := net.conv1(x)) + net.bn1(y) + net.bn1(y),
    "outside of PyTorch": lambda net, x: torch.from_numpy(net.conv1(x).numpy(force=True)),
    "sizes": lambda net, x: net.relu(net.bn1(y := net.conv1(x))) * y.shape[1] * y.size(2) * len(y) * y.dim(),
    "strides": lambda net, x: net.relu(net.bn1(y := net.conv1(x))) * y.stride(1) * y.is_contiguous(),
}


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_other_way_than_observed(name: str) -> None:
    """What the run did not show is slower, and never wrong."""

    def between(net: Any, x: Tensor) -> Any:
        if x.sum() > 0:
            return net.relu(net.bn1(net.conv1(x)))
        return OTHER_WAYS[name](net, x)

    plain = untraceable(between)
    fused = observed(plain, image().abs())
    assert parts_of(fused)["conv1"] == "conv + norm + relu"
    assert_same(fused, plain, image().abs())
    assert_same(fused, plain, -image().abs())


def test_input_overwritten_before_an_unexpected_use() -> None:
    def between(net: Any, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return net.relu(net.bn1(net.conv1(x)))
        y = net.conv1(x)
        x.zero_()
        return y + 1

    fused = observed(untraceable(between), image().abs())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(FusionError, match="used in another way than for the example inputs"):
            fused(-image().abs())
    with torch.enable_grad():
        assert fused(-image().abs()).shape == (2, 6, 8, 9)


@pytest.mark.parametrize("exchanges", [False, True])
def test_statistics_change_before_the_norm(exchanges: bool) -> None:
    def between(net: Any, x: Tensor) -> Tensor:
        y = net.conv1(x)
        if x.sum() < 0 and exchanges:
            net.bn1.running_mean = net.bn1.running_mean * 2
        elif x.sum() < 0:
            net.bn1.running_mean.mul_(2)
        return net.relu(net.bn1(y))

    plain = untraceable(between)
    fused = observed(plain, image().abs())
    assert parts_of(fused)["conv1"] == "conv + norm + relu"
    x = -image().abs()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    # The input may have changed as well, for all that inference tensors tell.
    with torch.inference_mode(), pytest.raises(FusionError, match=r"torch\.no_grad"):
        fused(x.clone())


BETWEEN: dict[str, Callable[[Any], object]] = {
    "training": lambda net: net.bn1.train(),
    "eps": lambda net: setattr(net.bn1, "eps", 0.5),
    "hook": lambda net: net.bn1.register_forward_hook(lambda module, args, y: y * 2),
}


@pytest.mark.parametrize("change", BETWEEN.values(), ids=BETWEEN)
def test_the_norm_changes_before_it_runs(change: Callable[[Any], object]) -> None:
    def between(net: Any, x: Tensor) -> Tensor:
        y = net.conv1(x)
        if x.sum() < 0:
            change(net)
        return net.relu(net.bn1(y))

    plain = untraceable(between)
    fused = observed(plain, image().abs())
    assert parts_of(fused)["conv1"] == "conv + norm + relu"
    x = -image().abs()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)


def test_not_a_number_used_in_another_way_in_inference_mode() -> None:
    plain = untraceable(
        lambda net, x: net.relu(net.bn1(y)) if (y := net.conv1(x)).dim() and x[0, 0, 0, 0] > 0 else y
    )
    x = image().abs()
    fused = observed(plain, x)
    x = -x
    x[1, 0, 3, 3] = torch.nan
    with torch.inference_mode():
        torch.testing.assert_close(fused(x.clone()), plain(x.clone()), equal_nan=True)


def test_result_used_outside_of_autocast() -> None:
    def between(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = net.conv1(x)
            if x.sum() > 0:
                return net.relu(net.bn1(y))
        return y + y

    plain = untraceable(between).float()
    x = image().float().abs()
    fused = observed(plain, x)
    with torch.no_grad():
        assert torch.equal(fused(-x), plain(-x))


def test_result_overwritten_before_the_group_runs_again() -> None:
    """The result that was handed over is the caller's: it cannot be handed over again."""

    def between(net: Any, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return net.relu(net.bn1(net.conv1(x)))
        y = net.conv1(x)
        first = net.relu(net.bn1(y)).add_(1)
        return first * net.relu(net.bn1(y))

    plain = untraceable(between)
    fused = observed(plain, image().abs())
    x = -image().abs()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    # Inference tensors do not tell whether it was the result or the input that was overwritten.
    with torch.inference_mode(), pytest.raises(FusionError, match=r"torch\.no_grad"):
        fused(x.clone())


def test_activation_called_for_its_effect() -> None:
    def between(net: Any, x: Tensor) -> Tensor:
        z = net.bn1(net.conv1(x))
        net.relu(z)
        return z * 2

    plain = untraceable(between)
    fused = observed(plain)
    assert parts_of(fused)["conv1"] == "conv + norm + relu"
    assert_same(fused, plain, image())


def test_what_was_added_to_the_network_afterwards_is_respected() -> None:
    plain = untraceable(chain)
    fused = observed(plain)
    seen: dict[int, list[Tensor]] = {}
    for index, network in enumerate((plain, fused)):
        hooks = [
            module.register_forward_hook(
                lambda module, args, y, index=index: seen.setdefault(index, []).extend((args[0] + 0, y + 0))
            )
            for module in (network.conv1, network.bn1, network.bn2)
        ]
        with torch.no_grad():
            network(image())
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-12, atol=1e-12)
    for name, module in (("bn1", nn.Identity()), ("conv2", nn.Conv2d(6, 6, 1)), ("relu", nn.Tanh())):
        for network in (plain, fused):
            setattr(network, name, copy.deepcopy(module).double())
        assert_same(fused, plain, image())
    parametrizations.weight_norm(fused.conv1)
    assert_same(fused, plain, image())
    assert type(fused_cna.unfuse(fused).bn2) is nn.BatchNorm2d


def test_norm_in_training_mode() -> None:
    plain = untraceable(chain)
    fused = observed(plain)
    for network in (plain, fused):
        network.bn1.train()
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), plain(image()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


def test_training_goes_on() -> None:
    """The training code may take another way than the one that was observed in eval mode."""

    def between(net: Any, x: Tensor) -> Tensor:
        y = net.conv1(x)
        if net.training:
            return net.relu(net.bn1(y)) + y * 0.5
        return net.relu(net.bn1(y))

    plain = untraceable(between)
    fused = observed(plain)
    assert parts_of(fused)["conv1"] == "conv + norm + relu"
    for network in (plain, fused):
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            network(image(step)).square().mean().backward()
            optimizer.step()
        network.eval()
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    assert_same(fused, plain, image())


def test_copies_are_fused_and_their_own() -> None:
    plain = untraceable(chain)
    plain.between = chain
    fused = observed(plain)
    copies = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    with torch.no_grad():
        fused.bn1.weight.mul_(2)
    for network in copies:
        assert_same(network, plain, image())
        with torch.inference_mode(), Calls() as calls:
            network(image())
        assert (calls.fused, calls.norms) == (2, 0)
        assert type(fused_cna.unfuse(network).conv1) is nn.Conv2d
    with torch.no_grad():
        plain.bn1.weight.mul_(2)
    assert_same(fused, plain, image())


def test_parts_are_copied_and_move_alone() -> None:
    plain = untraceable(chain)
    fused = observed(plain)
    conv, norm = copy.deepcopy(fused.conv1), pickle.loads(pickle.dumps(fused.bn1))
    assert_same(nn.Sequential(conv, norm), nn.Sequential(plain.conv1, plain.bn1), image())
    fused.float()
    plain.float()
    with torch.no_grad():
        torch.testing.assert_close(fused(image().float()), plain(image().float()))
    # As nn.DataParallel does it, but for the copies of the parameters.
    replica = fused.conv1._replicate_for_data_parallel()
    replica.weight, replica._parameters["bias"] = fused.conv1.weight, None
    with torch.no_grad():
        assert type(replica(image().float())) is Tensor


def test_networks_are_freed_with_their_last_name() -> None:
    fused = observed(untraceable(chain))
    with torch.inference_mode():
        fused(image())
    weight = weakref.ref(fused.conv1)
    gc.collect()
    del fused
    gc.collect()
    assert weight() is None


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Converting a tensor"
)
def test_compiled_traced_and_vectorised() -> None:
    plain = untraceable(chain)
    fused = observed(plain)
    with torch.no_grad():
        y = plain(image())
        torch.testing.assert_close(torch.compile(fused, backend="eager")(image()), y)
        torch.testing.assert_close(torch.jit.trace(fused, image())(image()), y)
        group = nn.Sequential(fused.conv1, fused.bn1)
        expected = nn.Sequential(plain.conv1, plain.bn1)(image(4, 2, 2, 3, 8, 9).flatten(0, 1))
        vectorised = torch.func.vmap(group)(image(4, 2, 2, 3, 8, 9))
        torch.testing.assert_close(vectorised.flatten(0, 1), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = image().float()
        torch.testing.assert_close(fused.float()(x), plain.float()(x), rtol=0.05, atol=0.05)
