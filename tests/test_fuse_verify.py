"""``verify=True`` and ``strict=True``: what is compared, what is named, and what is let pass."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from fused_cna import FusionError, fuse
from fused_cna.fusion import boundaries, handover, verification
from fused_cna.fusion.reference_runs import copied
from fused_cna.fusion.verification import verify_fused
from tests.verified_networks import InPython, Network, block_of, call_of, graph_of, image, network


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_right_network_passes(dtype: torch.dtype, freeze: bool) -> None:
    plain = network(dtype=dtype)
    state = copy.deepcopy(plain.state_dict())
    random_numbers = torch.get_rng_state()
    fused = fuse(plain, example_inputs=image(dtype), verify=True, freeze=freeze)
    assert type(fused).__name__ == "FusedNetwork"
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert not any(module._forward_hooks for module in [*fused.modules(), *graph_of(fused).modules()])


def other_norm(fused: nn.Module) -> None:
    fused.first.bn1.weight.data[3] *= 1.01


def other_statistics(fused: nn.Module) -> None:
    fused.second.bn2.running_mean[0] += 1e-3


def other_weight(fused: nn.Module) -> None:
    fused.second.conv1.weight.data[0] += 1e-3


def other_activation(fused: nn.Module) -> None:
    block_of(fused, "first.conv2").act = nn.LeakyReLU(0.1)


def no_activation(fused: nn.Module) -> None:
    block_of(fused, "stem").act = nn.Identity()


def no_residual(fused: nn.Module) -> None:
    node = call_of(fused, "first.conv2")
    node.args = node.args[:1]
    graph_of(fused).recompile()


def other_order(fused: nn.Module) -> None:
    block_of(fused, "second.conv2").residual_order = "act_add"


def other_residual(fused: nn.Module) -> None:
    node = call_of(fused, "first.conv2")
    node.args = (node.args[0], call_of(fused, "first.conv1"))
    graph_of(fused).recompile()


def no_pad(fused: nn.Module) -> None:
    block_of(fused, "stem").zero_pad = (1, 0, 1, 0)


def no_gate(fused: nn.Module) -> None:
    gate = call_of(fused, "first.gate")
    (product,) = gate.users
    product.replace_all_uses_with(call_of(fused, "first.conv1"))
    graph_of(fused).recompile()


def other_end(fused: nn.Module) -> None:
    graph = graph_of(fused)
    last = [node for node in graph.graph.nodes if node.target == "mean"][-1]
    last.target = "amax"
    graph.recompile()


SABOTAGE = [
    (other_norm, "first.conv1 (conv + norm + relu) does not compute its formula: relative error 0.00"),
    (other_statistics, "second.conv2 (conv + norm + add + relu) does not compute its formula"),
    (other_weight, "second.conv1 (conv + norm + relu) does not compute its formula"),
    (
        other_activation,
        "first.conv2 is to compute conv + norm + add + relu, but computes conv + norm + add + ",
    ),
    (no_activation, "stem is to compute pad + conv + norm + silu, but computes pad + conv + norm"),
    (no_residual, "first.conv2 is to compute conv + norm + add + relu, but computes conv + norm + relu"),
    (
        other_order,
        "second.conv2 is to compute conv + norm + add + relu, but computes conv + norm + relu + add",
    ),
    (other_residual, "first.conv2 computes its formula, but not what the original hands to second.conv1"),
    (no_pad, "the input of stem is not what the original gives it"),
    (
        no_gate,
        "first.conv1 computes its formula, but not what the original hands to first.conv2 in its place",
    ),
    (other_end, "output is not what the original returns, though every convolution gets what it gets there"),
]


@pytest.mark.parametrize(("spoil", "message"), SABOTAGE, ids=[spoil.__name__ for spoil, _ in SABOTAGE])
def test_the_first_layer_that_differs_is_named(spoil: Callable[[nn.Module], None], message: str) -> None:
    plain = network()
    fused = fuse(plain)
    verify_fused(plain, fused, (image(),))
    spoil(fused)
    with pytest.raises(FusionError, match=re.escape(message)) as raised:
        verify_fused(plain, fused, (image(),))
    assert "The first difference, in float32" in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_difference_below_the_rounding_of_the_dtype_shows_in_float32(dtype: torch.dtype) -> None:
    plain = network(dtype=dtype)
    fused = fuse(plain)
    fused.first.bn1.eps = 1.2e-4
    with pytest.raises(FusionError, match=r"in float32: first\.conv1 \(conv"):
        verify_fused(plain, fused, (image(dtype),))


def test_a_stale_snapshot_is_found() -> None:
    plain = network()
    fused = fuse(plain, freeze=True)
    block_of(fused, "first.gate").bias[0] += 0.01
    with pytest.raises(FusionError, match=r"first\.gate \(conv \+ sigmoid\) does not compute its formula"):
        verify_fused(plain, fused, (image(),))


def test_what_was_allowed_is_said() -> None:
    plain = network()
    fused = fuse(plain)
    other_weight(fused)
    with pytest.raises(FusionError) as raised:
        verify_fused(plain, fused, (image(),))
    error, allowed = map(float, re.findall(r"\d\S*e-\d+|\d\.\d+", str(raised.value))[-2:])
    assert 1e-8 < allowed < 1e-5 < 1e-4 < error < 1e-1


class Functional(nn.Module):
    """A convolution that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(torch.conv2d(x, self.weight, None, 1, 1))))


def test_a_call_that_is_no_module_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = network(Functional)
    fused = fuse(plain, example_inputs=image(), verify=True)
    right = fused_cna.conv_norm_act

    def wrong(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = right(x, *args, **kwargs)
        return y if x.dtype == torch.float64 or torch.is_grad_enabled() else y * 1.001

    graph = graph_of(fused)
    for node in graph.graph.nodes:
        if node.target is right:
            node.target = wrong
    graph.recompile()
    monkeypatch.setattr(boundaries, "conv_norm_act", wrong)
    with pytest.raises(FusionError, match="the convolution by weight does not compute its formula"):
        verify_fused(plain, fused, (image(),))


@dataclass
class Result:
    logits: Tensor
    maps: list[Tensor]


class ManyOutputs(Network):
    """Returns what networks return."""

    def forward(self, x: Tensor) -> Any:
        x = nn.functional.silu(self.bn(self.stem(self.pad(x))))
        y = self.head(self.second(self.first(x)))
        return {
            "result": Result(y.mean((2, 3)), [x, y]),
            "pair": (y.argmax(1), None),
            "names": ["a", "b"],
        }


def test_results_of_any_structure_are_compared() -> None:
    plain = network(ManyOutputs)
    fused = fuse(plain, example_inputs=image(), verify=True)
    graph = graph_of(fused)
    node = next(node for node in graph.graph.nodes if node.target == "argmax")
    node.args = (node.args[0], 2)
    graph.recompile()
    with pytest.raises(FusionError, match=re.escape("output['pair'][0] is not what the original returns")):
        verify_fused(plain, fused, (image(),))


def test_parts_of_a_result_that_are_missing_are_named() -> None:
    plain = network(ManyOutputs)
    fused = fuse(plain)
    graph = graph_of(fused)
    (node,) = [node for node in graph.graph.nodes if node.op == "output"]
    node.args = ({**node.args[0], "names": ["a"]},)
    graph.recompile()
    with pytest.raises(FusionError, match=re.escape("other parts, after second.conv2: output['names'][1]")):
        verify_fused(plain, fused, (image(),))


class Noisy(Network):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x + 0.1 * torch.rand_like(x))


def test_a_random_network_is_refused_with_the_reason() -> None:
    noisy = network(Noisy)
    with pytest.raises(FusionError, match=r"Noisy is not deterministic.* two runs .* differ in output by 0"):
        verify_fused(noisy, fuse(noisy), (image(),))


class Dropping(Network):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        return self.drop(super().forward(x))


def test_a_dropout_in_training_mode_is_named() -> None:
    plain = network(Dropping)
    plain.drop.train()
    with pytest.raises(FusionError, match=r"not deterministic.* in training mode are drop \(Dropout\)"):
        fuse(plain, example_inputs=image(), verify=True)


def test_a_network_in_training_mode_is_verified_in_eval_mode() -> None:
    plain = network(Dropping).train()
    with pytest.warns(UserWarning, match="training mode"):
        fused = fuse(plain, example_inputs=image(), verify=True)
    assert plain.training
    assert fused.training
    assert fused.drop.training
    other_norm(fused)
    with pytest.raises(FusionError, match=r"first\.conv1"):
        verify_fused(plain, fused, (image(),))


def test_an_original_that_fails_is_told_from_a_fused_one_that_does() -> None:
    plain = network()
    fused = fuse(plain)
    with pytest.raises(FusionError, match="Network itself fails on example_inputs"):
        verify_fused(plain, fused, (image()[:, :2],))
    block_of(fused, "second.conv1").zero_pad = (0, 0, 0, -30)
    with pytest.raises(FusionError, match=r"the fused Network fails .* after first\.conv2"):
        verify_fused(plain, fused, (image(),))


def test_blocks_that_do_not_run_are_not_taken_for_right() -> None:
    plain = network()
    fused = fuse(plain)
    fused.first.register_forward_hook(lambda module, args, y: None)
    with pytest.raises(FusionError, match="7 of 7 fused blocks of Network do not run on the example inputs"):
        verify_fused(plain, fused, (image(),))


class OnlyFloat32Inside(nn.Module):
    """FX follows the inner network, not this."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Network()

    def forward(self, x: Tensor) -> Any:
        if x.dtype != torch.float32:
            raise TypeError("only float32")
        return self.inner(x)


def test_without_float64_it_is_compared_with_the_original_as_it_is() -> None:
    plain = network(OnlyFloat32Inside)
    fused = fuse(plain)
    with pytest.warns(UserWarning, match="does not run in float64, so it is verified without: only float32"):
        verify_fused(plain, fused, (image(),))
    other_norm(fused.inner)
    with (
        pytest.warns(UserWarning, match="does not run in float64"),
        pytest.raises(FusionError, match=r"inner\.first\.conv1 \(conv \+ norm \+ relu\)"),
    ):
        verify_fused(plain, fused, (image(),))


def test_a_failed_verification_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(original: nn.Module, fused: nn.Module, inputs: Any) -> None:
        raise FusionError("it differs")

    monkeypatch.setattr(verification, "verify_fused", refuse)
    plain = network()
    with pytest.raises(FusionError, match="it differs"):
        fuse(plain, example_inputs=image(), verify=True, inplace=True)
    assert type(plain) is Network
    assert "_fused_cna_record" not in vars(plain)


def test_verify_needs_inputs() -> None:
    with pytest.raises(FusionError, match="verify=True needs example_inputs"):
        fuse(network(), verify=True)


def handed_block(fused: nn.Module, name: str) -> Any:
    conv: Any = fused.get_submodule(name)
    return handover.block_of(conv, vars(conv)[handover.STEPS])


def test_groups_in_python_code_are_compared() -> None:
    plain = network(InPython)
    plain.first = nn.Sequential(plain.first.conv1, plain.first.bn1, plain.first.relu).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = fuse(plain, example_inputs=image(), verify=True)
    assert handed_block(fused, "stem").norm.eps == 1e-5
    fused.bn.weight.data[0] += 0.1
    with pytest.raises(FusionError, match=r"stem \(conv \+ norm \+ silu\) does not compute its formula"):
        verify_fused(plain, fused, (image(),))


def test_what_python_code_gets_is_compared() -> None:
    plain = network(InPython)
    fused = fuse(plain, example_inputs=image())
    vars(fused.stem)[handover.STEPS] = vars(fused.stem)[handover.STEPS][:1]
    with pytest.raises(
        FusionError, match=r"stem is to compute conv \+ norm \+ silu, but computes conv \+ norm$"
    ):
        verify_fused(plain, fused, (image(),))


def test_what_goes_wrong_only_where_nothing_observes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = network()
    fused = fuse(plain, example_inputs=image())
    copies: list[Any] = []

    def second_is_spoilt(given: nn.Module, dtype: torch.dtype | None) -> nn.Module:
        made = copied(given, dtype)
        if given is fused:
            copies.append(made)
            made.head.bias.data += len(copies) - 1
        return made

    monkeypatch.setattr(verification, "copied", second_is_spoilt)
    with pytest.raises(FusionError, match="returns, but only when nothing observes the run"):
        verify_fused(plain, fused, (image(),))
    assert len(copies) == 2
