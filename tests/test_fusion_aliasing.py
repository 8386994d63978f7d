"""What the matcher must not move past: memory that something else overwrites meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._higher_order_ops.triton_kernel_wrap
import torch.nn.functional as F
from torch import Tensor, fx

from fused_cna.fusion.groups import match

library = torch.library.Library("fused_cna_aliasing_tests", "FRAGMENT")
library.define("read(Tensor x) -> Tensor")
library.define("overwrite(Tensor(a!) x) -> ()")
operators = torch.ops.fused_cna_aliasing_tests


def with_residual(between: Callable[..., object]) -> Callable[..., Tensor]:
    """A group whose call comes after ``between``, which gets all inputs."""

    def network(
        x: Tensor, other: Tensor, weight: Tensor, mean: Tensor, var: Tensor, residual: Tensor
    ) -> Tensor:
        y = F.conv2d(x, weight)
        between(x=x, other=other, weight=weight, mean=mean, var=var)
        y = F.batch_norm(y, mean, var)
        return torch.relu(y + residual)

    return network


def parts(network: Callable[..., Tensor]) -> tuple[bool, bool, bool]:
    """Whether norm, addition and activation are fused with the one convolution."""
    (group,) = match(fx.symbolic_trace(network).graph, {}, lambda a, b: True).groups
    return group.norm is not None, group.add is not None, group.act is not None


HARMLESS = {
    "nothing": lambda **values: None,
    "a_reader": lambda x, **values: operators.read(x),
    "a_reader_by_overload": lambda x, **values: operators.read.default(x),
    "another_tensor": lambda x, **values: torch.matmul(x, x).add_(1),
    "dropout_in_eval": lambda x, **values: F.dropout(x, 0.5, training=False),
}


@pytest.mark.parametrize("between", HARMLESS.values(), ids=HARMLESS)
def test_what_overwrites_nothing_is_in_nobodys_way(between: Callable[..., object]) -> None:
    assert parts(with_residual(between)) == (True, True, True)


OVERWRITING = {
    "method": lambda x, **values: x.mul_(2),
    "operator": lambda x, **values: operators.overwrite(x),
    "operator_by_overload": lambda x, **values: operators.overwrite.default(x),
    "higher_order_operator": lambda x, **values: x.tracer.create_proxy(
        "call_function", torch.ops.higher_order.triton_kernel_wrapper_mutation, (), {"kwargs": {"x": x}}
    ),
    "statistics": lambda other, mean, var, **values: F.batch_norm(other, mean, var, training=True),
    "a_view_that_the_caller_may_have_given": lambda other, **values: other.mul_(2),
}


@pytest.mark.parametrize("between", OVERWRITING.values(), ids=OVERWRITING)
def test_an_input_that_may_be_overwritten_before_the_addition(between: Callable[..., object]) -> None:
    _, add, _ = parts(with_residual(between))
    assert not add


@pytest.mark.parametrize("name", ["weight", "mean", "var"])
def test_a_parameter_that_is_overwritten_within_a_group(name: str) -> None:
    def network(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = F.conv2d(x, weight)
        {"weight": weight, "mean": mean, "var": var}[name].mul_(2)
        return torch.relu(F.batch_norm(y, mean, var))

    graph = fx.symbolic_trace(network).graph
    (group,) = match(graph, {}, lambda a, b: None).groups
    assert not group.is_fused
    assert group.missed
    assert group.reason == "a parameter may be overwritten within it, by mul_"
