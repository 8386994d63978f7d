"""What a fused network really computes in fused calls: seen, or spoiled, where all of them pass on a CPU."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor, nn

from fused_cna import eager
from fused_cna.fusion.frozen import FrozenConv

_PARAMETERS = tuple(inspect.signature(eager.conv_norm_act).parameters)
_WITHOUT: dict[str, dict[str, Any]] = {
    "norm": dict.fromkeys(("norm_weight", "norm_bias", "running_mean", "running_var")),
    "act": {"act": "identity", "act_params": ()},
    "add": {"residual": None},
}
KINDS = tuple(_WITHOUT)


@dataclass(frozen=True)
class FusedCall:
    """One fused call; modules go by their names in the network's state_dict."""

    conv: str
    norm: str | None
    act: str
    has_residual: bool

    def has(self, kind: str) -> bool:
        """Whether it has a part of one of KINDS."""
        return {"norm": self.norm is not None, "act": self.act != "identity", "add": self.has_residual}[kind]


def names_of(network: nn.Module) -> dict[int, str]:
    """Modules' names by the identity of their weights and running means, as `state_dict` names them."""
    return {
        id(tensor): name.rpartition(".")[0]
        for name, tensor in reversed(network.state_dict(keep_vars=True).items())
        if name.rpartition(".")[2] in ("weight", "running_mean")
    }


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[FusedCall]]:
    """The fused calls of `network` while this is open."""
    names = names_of(network)
    calls: list[FusedCall] = []

    def record(given: dict[str, Any]) -> None:
        calls.append(_call(given, names))

    with _intercepted(record):
        yield calls


@contextmanager
def spoiled(network: nn.Module, victim: FusedCall, kind: str) -> Iterator[None]:
    """Fused calls of the victim's convolution leave out its norm, activation or addition."""
    names = names_of(network)

    def spoil(given: dict[str, Any]) -> None:
        if _call(given, names) != victim:
            return
        given.update(_WITHOUT[kind])

    with _intercepted(spoil):
        yield


@contextmanager
def counted_frozen() -> Iterator[list[FrozenConv]]:
    """The frozen convolutions that run while this is open, one for each call."""
    run: list[FrozenConv] = []
    plain = FrozenConv.forward

    def forward(self: FrozenConv, *args: Any, **kwargs: Any) -> Tensor:
        run.append(self)
        return plain(self, *args, **kwargs)

    with mock.patch.object(FrozenConv, "forward", forward):
        yield run


def _call(given: dict[str, Any], names: dict[int, str]) -> FusedCall:
    mean = given["running_mean"]
    return FusedCall(
        conv=names.get(id(given["weight"]), "(a weight that is not in the state_dict)"),
        norm=None if mean is None else names.get(id(mean), "(a norm that is not in the state_dict)"),
        act=given["act"],
        has_residual=given["residual"] is not None,
    )


def _intercepted(look: Callable[[dict[str, Any]], None]) -> AbstractContextManager[object]:
    plain = eager.conv_norm_act

    def conv_norm_act(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
        look(given)
        return plain(**given)

    return mock.patch.object(eager, "conv_norm_act", conv_norm_act)
