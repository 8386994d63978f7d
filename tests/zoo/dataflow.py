"""What there is to fuse in a network, counted from one eager run and without asking the fuser.

The run is in eval mode. Only what depends on the network's input counts as a use.

Foldable pair: a convolution and a batch norm such that
  - the convolution is a call of an `nn.Conv2d` or a subclass, with the module's own parameter as its weight.
    That leaves out functional convolutions, transposed ones and those of other than two dimensions, and any
    weight that is computed: standardised, parametrized, mixed from experts;
  - the module has no hooks, and no other module has the same weight;
  - nothing but the norm takes the convolution's output, nor does the network return it;
  - the norm uses running statistics, and is an operator call (`nn.BatchNorm2d`, timm's `BatchNormAct2d`, ...)
    or the arithmetic of a frozen norm (torchvision's and timm's);
  - wherever the convolution is called, the same norm follows, and that norm follows no other convolution.

Residual add: an addition of two tensors of the result's shape, of which at least one is the output of a
convolution as above, or of its foldable norm, or of one activation in `ACTIVATIONS` right behind either, and
nothing else takes what is between. It counts once, also where both operands are such. A convolution that is
called several times counts if the same follows each time.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# ATen's names of those that are it with any arguments.
ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "mish")


@dataclass(frozen=True)
class Flow:
    """The counts of one network. Modules go by their names in it."""

    convolutions: int
    """Two-dimensional ones that are not transposed, each once however often it is called."""
    pairs: dict[str, str]
    """The norm of every convolution that is in a foldable pair."""
    adds: frozenset[tuple[str, ...]]
    """For each residual add, the convolutions whose output it takes: one or two."""
    calls: dict[str, int]
    """How often each convolution runs that has a module of its own."""


@dataclass(eq=False)
class _Operation:
    name: str
    arguments: tuple[Any, ...]
    shape: tuple[int, ...]
    sources: list["_Operation"]
    norm: nn.Module | None = None
    """The frozen norm that this is a part of."""
    users: list["_Operation"] = field(default_factory=list)

    @property
    def only_user(self) -> "_Operation | None":
        return self.users[0] if len(self.users) == 1 else None


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class _Recorder(TorchDispatchMode):
    """Follows tensors by identity, and keeps them: the identity of one that is gone may come again."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.inside: nn.Module | None = None
        self._made_by: dict[int, _Operation] = {}
        self._kept: list[Tensor] = []
        for tensor in inputs:
            self._made(tensor, _Operation("input", (), tuple(tensor.shape), []))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        sources = [self._made_by[id(one)] for one in _tensors((args, kwargs)) if id(one) in self._made_by]
        results = _tensors(result)
        if results and sources:
            name = func._schema.name.removeprefix("aten::").rstrip("_")
            operation = _Operation(name, args, tuple(results[0].shape), sources, self.inside)
            for source in sources:
                source.users.append(operation)
            self.operations.append(operation)
            for tensor in results:
                self._made(tensor, operation)
        return result

    def _made(self, tensor: Tensor, operation: _Operation) -> None:
        self._made_by[id(tensor)] = operation
        self._kept.append(tensor)

    def returned(self, output: Any) -> None:
        for tensor in _tensors(output):
            if id(tensor) in self._made_by:
                self._made_by[id(tensor)].users.append(_Operation("(returned)", (), (), []))


def observe(network: nn.Module, arguments: tuple[Any, ...]) -> Flow:
    """The counts of `network`, which is in eval mode, as it runs on `arguments`."""
    owners = _owners(network)
    recorder = _Recorder(_tensors(arguments))
    with torch.no_grad(), _inside_frozen_norms(network, recorder), recorder:
        output = network(*arguments)
    recorder.returned(output)
    calls = [
        (owners.get(id(operation.arguments[1])), operation)
        for operation in recorder.operations
        if operation.name == "convolution" and not operation.arguments[6] and len(operation.shape) == 4
    ]
    followed = _followed(calls, owners)
    pairs = {name: norm for name, (norm, _) in followed.items() if norm is not None}
    taken: dict[int, list[str]] = {}
    for name, (_, add) in followed.items():
        if add is not None:
            taken.setdefault(id(add), []).append(name)
    return Flow(
        convolutions=len({name if name is not None else id(call) for name, call in calls}),
        pairs=pairs,
        adds=frozenset(tuple(sorted(names)) for names in taken.values()),
        calls=dict(Counter(name for name, _ in calls if name is not None)),
    )


def _owners(network: nn.Module) -> dict[int, str]:
    """Names of modules by the identity of what their operator is called with.

    That is the weight of a convolution and the running mean of a norm; what two modules share, and what
    belongs to a convolution with hooks, is not there.
    """
    found = [
        (tensor, name, module)
        for name, module in network.named_modules()
        for tensor in (_identifying(module),)
        if tensor is not None
    ]
    uses = Counter(id(tensor) for tensor, _, _ in found)
    return {
        id(tensor): name for tensor, name, module in found if uses[id(tensor)] == 1 and not _is_hooked(module)
    }


def _identifying(module: nn.Module) -> Tensor | None:
    if isinstance(module, nn.Conv2d):
        return module._parameters.get("weight") if not parametrize.is_parametrized(module) else None
    return module._buffers.get("running_mean")


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _inside_frozen_norms(network: nn.Module, recorder: _Recorder) -> ExitStack:
    """Marks what runs inside a norm that is written out as arithmetic."""

    def enter(module: nn.Module, arguments: Any) -> None:
        recorder.inside = module

    def leave(module: nn.Module, arguments: Any, result: Any) -> None:
        recorder.inside = None

    hooks = ExitStack()
    for module in network.modules():
        if type(module).__name__.startswith("FrozenBatchNorm"):
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
    return hooks


def _followed(
    calls: list[tuple[str | None, _Operation]], owners: dict[int, str]
) -> dict[str, tuple[str | None, _Operation | None]]:
    """The foldable norm and the residual add behind each convolution, None where there is none.

    Of a convolution that is called several times it is the first call's add that stands for all.
    """
    behind: dict[str, list[tuple[str | None, _Operation]]] = {}
    for name, call in calls:
        if name is not None:
            behind.setdefault(name, []).append(_norm_after(call, owners))
    norms = {name: {norm for norm, _ in found} for name, found in behind.items()}
    users = Counter(norm for found in norms.values() for norm in found)
    followed: dict[str, tuple[str | None, _Operation | None]] = {}
    for name, found in behind.items():
        norm, *others = norms[name]
        if others or (norm is not None and users[norm] > 1):
            followed[name] = (None, None)
            continue
        adds = [_add_after(last) for _, last in found]
        followed[name] = (norm, adds[0] if all(add is not None for add in adds) else None)
    return followed


def _norm_after(call: _Operation, owners: dict[int, str]) -> tuple[str | None, _Operation]:
    """The norm right behind a convolution, and the last operation of the two."""
    following = call.only_user
    if following is None:
        return None, call
    if following.name in ("native_batch_norm", "_native_batch_norm_legit_no_training"):
        mean = following.arguments[3]
        in_training = following.name == "native_batch_norm" and following.arguments[5]
        if in_training or mean is None or id(mean) not in owners:
            return None, call
        return owners[id(mean)], following
    last = following.only_user
    if following.name == "mul" and following.norm is not None and last is not None and last.name == "add":
        mean = following.norm._buffers.get("running_mean")
        if last.norm is following.norm and len(last.sources) == 1 and id(mean) in owners:
            return owners[id(mean)], last
    return None, call


def _add_after(last: _Operation) -> _Operation | None:
    following = last.only_user
    if following is not None and _is_activation(following):
        following = following.only_user
    if following is None or following.name != "add" or len(following.sources) != 2:
        return None
    tensors = [one for one in following.arguments[:2] if isinstance(one, Tensor)]
    same = len(tensors) == 2 and all(tuple(tensor.shape) == following.shape for tensor in tensors)
    return following if same else None


def _is_activation(operation: _Operation) -> bool:
    if operation.name == "hardtanh":
        return tuple(operation.arguments[1:3]) == (0, 6)
    if operation.name == "elu":
        return all(factor == 1 for factor in operation.arguments[2:4])
    return operation.name in ACTIVATIONS
