"""Questions about a tensor that what stands for it in a trace answers otherwise, and no error tells."""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import math
import operator
from builtins import isinstance as is_a
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, is_tensor, nn
from torch import is_tensor as looks_like_a_tensor
from torch.overrides import has_torch_function

from tests.fusion_cases.case import DRAWS, WHOLE, Group, add, case, is_plain, net


class Block(Group):
    """Its result depends on the answers, of its input and of a result of its own."""

    ask: Callable[[Any], Any]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * (2 * self.ask(x) + 1) + 2 * self.ask(y)


def ask(name: str, block: Callable[[], nn.Module]) -> None:
    """A network with the block in its middle, around which nothing is asked."""
    add(
        f"asks_{name}",
        lambda: nn.Sequential(Group(), block(), Group()),
        fused={"0.conv": WHOLE, "2.conv": WHOLE},
        draws=DRAWS[:2],
    )


def block_of(question: Callable[..., Any], base: type[Block] = Block) -> type[Block]:
    return type("Asking", (base,), {"ask": question})


def matched_class(x: Any) -> int:
    match x:
        case Tensor():
            return 1
    return 2


def matched_sequence(x: Any) -> int:
    match x.shape:
        case (_, _, _, _):
            return 1
    return 2


@functools.singledispatch
def dispatched(x: object) -> int:
    return 1


@dispatched.register
def _(x: Tensor) -> int:
    return 2


def by_default(x: Any, is_a: Callable[..., bool] = isinstance) -> bool:
    return is_a(x, Tensor)


# Each tells a tensor from everything else.
KINDS: dict[str, Callable[[Any], Any]] = {
    "torch_jit_isinstance": lambda x: torch.jit.isinstance(x, Tensor),
    "type_is": lambda x: type(x) is Tensor,
    "type_by_name": lambda x: type(x).__name__ == "Tensor",
    "type_by_map": lambda x: [*map(type, [x])] == [Tensor],
    "type_by_operator": lambda x: operator.is_(type(x), Tensor),
    "class": lambda x: x.__class__ is Tensor,
    "class_by_getattr": lambda x: getattr(x, "__cla" + "ss__") is Tensor,
    "issubclass": lambda x: issubclass(type(x), Tensor),
    "matched_class": matched_class,
    "matched_sequence": matched_sequence,
    "singledispatch": dispatched,
    "isinstance_aliased": lambda x: is_a(x, Tensor),
    "isinstance_of_builtins": lambda x: builtins.isinstance(x, Tensor),
    "isinstance_as_default": by_default,
    "isinstance_by_partial": lambda x: functools.partial(isinstance, x)(Tensor),
    "isinstance_by_map": lambda x: all(map(isinstance, [x], [Tensor])),
    "isinstance_by_instancecheck": lambda x: type.__instancecheck__(Tensor, x),
    "isinstance_of_a_dtype": lambda x: isinstance(x.dtype, torch.dtype),
    "isinstance_of_a_shape": lambda x: isinstance(x.shape, tuple),
    "is_tensor": lambda x: torch.is_tensor(x),
    "is_tensor_aliased": lambda x: looks_like_a_tensor(x) and is_tensor(x),
    "has_torch_function": lambda x: has_torch_function((x,)),
    "callable": lambda x: callable(x),
    "hasattr": lambda x: hasattr(x, "__call__"),  # noqa: B004
    "getattr_with_default": lambda x: getattr(x, "tracer", 3) == 3,
    "eval": lambda x: eval("type(x) is Tensor", {"Tensor": Tensor, "x": x}),
}

# What is read of a tensor is a constant by which identity tells.
ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "dtype_is": lambda x: x.dtype is torch.float64,
    "device_type": lambda x: {"cpu": 1}.get(x.device.type, 2),
    "requires_grad": lambda x: x.requires_grad is True,
    "grad": lambda x: x.is_leaf is True and x.grad is None,
    "is_leaf": lambda x: x.is_leaf is not False,
    "names": lambda x: getattr(x, "names", (None,))[0] is None,
    "base": lambda x: x._base is None,
    "layout": lambda x: x.layout is torch.strided,
    "shape_compared": lambda x: (x.shape[1] == 4) is True,
    "id": lambda x: id(x.contiguous()) == id(x),
    "same_object": lambda x: x.contiguous() is x,
    "index_in_a_list": lambda x: [x.contiguous()].index(x) + 1,
    "found_in_a_list": lambda x: x.contiguous() in [x],
    "largest_of_a_shape": lambda x: max(x.shape),
    "sorted": lambda x: sorted([x.mean(), x.sum()])[0],
    "copy": lambda x: type(copy.copy(x.detach())) is Tensor,
    "deepcopy": lambda x: copy.deepcopy(x.detach()).mean(),
    "numpy": lambda x: float(np.asarray(x.detach()).mean()),
}

TEXTS: dict[str, Callable[[Any], Any]] = {
    "f_string": lambda x: "float64" in f"{x.dtype}",
    "f_string_of_a_size": lambda x: {"size 4": 1}.get(f"size {x.shape[1]}", 2),
    "format": lambda x: "{:d}".format(x.shape[1]) == "4",  # noqa: UP032
    "format_function": lambda x: format(x.shape[1], "d") == "4",
    "str": lambda x: str(x).startswith("tensor"),
    "repr": lambda x: repr(x.detach())[:6] == "tensor",
    "str_joined": lambda x: ",".join(map(str, x.shape[1:2])) == "4",
}


# What a proxy refuses, and a tensor does.
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda x: int(x.detach().sum()),
    "float": lambda x: float(x.detach().mean()),
    "bool": lambda x: bool(x.mean() > 0) + 1,
    "len": lambda x: len(x),
    "iter": lambda x: len([*iter(x)]),
    "sqrt": lambda x: math.sqrt(x.detach().abs().mean()),
    "index": lambda x: operator.index(x.argmax()) % 3,
    "range": lambda x: len(range(x.shape[1])),
    "hash": lambda x: {x: 1}[x],
    "numpy": lambda x: float(x.detach().numpy().mean()),
}


def catching_type_errors(compute: Callable[[Any], Any], x: Any) -> Any:
    try:
        return compute(x)
    except TypeError:
        return 7


def catching_all(compute: Callable[[Any], Any], x: Any) -> Any:
    try:
        answer = compute(x)
    except Exception:
        answer = 7
    return answer


def suppressing(compute: Callable[[Any], Any], x: Any) -> Any:
    answer = 7
    with contextlib.suppress(Exception):
        answer = compute(x)
    return answer


def leaving(compute: Callable[[Any], Any], x: Any) -> Any:
    answer = 7
    try:
        answer = compute(x)
    finally:
        return answer  # noqa: B012


class Quiet:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> bool:
        return True


def in_a_context(compute: Callable[[Any], Any], x: Any) -> Any:
    with Quiet():
        return compute(x)
    return 7


for name, question in {**KINDS, **ATTRIBUTES, **TEXTS}.items():
    ask(name, block_of(staticmethod(question)))
for name, question in NUMBERS.items():
    ask(f"{name}_or_type_error", block_of(staticmethod(functools.partial(catching_type_errors, question))))
for catch in (catching_all, suppressing, leaving, in_a_context):
    ask(f"number_{catch.__name__}", block_of(staticmethod(functools.partial(catch, NUMBERS["float"]))))


class Elsewhere(Block):
    """One question, in another place than the code of forward."""

    def __getattr__(self, name: str) -> Any:
        return is_plain if name == "found" else super().__getattr__(name)

    @property
    def given(self) -> Callable[[Any], bool]:
        return lambda x: type(x) is Tensor

    def of_the_object(self, x: Any) -> bool:
        return type(x) is Tensor


class Plain:
    def __call__(self, x: Any) -> bool:
        return type(x) is Tensor


@functools.cache
def decorated(question: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return functools.wraps(question)(lambda x: question(x))


# At the root, of the network's own input.
add(
    "asks_in_forward",
    net(lambda self, x: Group.forward(self, x) * (2 if type(x) is Tensor else 3)),
    draws=DRAWS[:2],
)


PLACES: dict[str, Callable[..., Any]] = {
    "in_another_module": lambda net, x: is_plain(x),
    "in_a_method": lambda net, x: net.of_the_object(x),
    "in_a_property": lambda net, x: net.given(x),
    "by_getattr": lambda net, x: net.found(x),
    "in_an_object": lambda net, x: Plain()(x),
    "in_a_decorated_function": lambda net, x: decorated(is_plain)(x),
    "in_a_generator": lambda net, x: all(type(one) is Tensor for one in (x, x)),
    "in_a_list": lambda net, x: [type(one) is Tensor for one in (x,)] == [True],
    "in_a_nested_function": lambda net, x: (lambda: (lambda: type(x) is Tensor)())(),
    "by_a_method_of_torch": lambda net, x: torch.utils._pytree.tree_all(lambda one: type(one) is Tensor, [x]),
}
for name, question in PLACES.items():
    ask(name, block_of(question, Elsewhere))


class Part(nn.Module):
    """Hooks are not followed, so nobody knows what comes of it."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.register_forward_hook(lambda module, args, y: y if result is None else result(args[0]))

    def forward(self, x: Tensor) -> Any:
        return None


class Unknown(Group):
    """Asks what a module returned that a trace does not enter."""

    def __init__(self, result: Any, then: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.part, self.then = Part(result), then

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.then(x, self.part(x))


RESULTS: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {
    "a_tuple_that_lacks_a_method": (lambda x: (x, 2), lambda x, y: y.mul(3) if hasattr(y, "mul") else y[1]),
    "a_tuple_by_default": (lambda x: (x, 2), lambda x, y: y[1] if getattr(y, "mean", None) is None else 3),
    "a_tuple_by_isinstance": (lambda x: (x, 2), lambda x, y: y[1] if isinstance(y, tuple) else 3),
    "a_dict": (lambda x: {"a": 2}, lambda x, y: y["a"] if "a" in [*y] else 3),
    "none": (None, lambda x, y: 2 if y is None else 3),
    "none_as_truth": (None, lambda x, y: y or 2),
    "a_number": (lambda x: 2.0, lambda x, y: y if isinstance(y, float) else 3),
    "a_function": (lambda x: torch.neg, lambda x, y: y(x) if callable(y) else 3),
}
for name, (result, then) in RESULTS.items():
    ask(f"of_{name}", functools.partial(Unknown, result, then))


# What nearly every network asks, and a trace can be told: these have to be fused.
ANSWERED: dict[str, Callable[[Any, Any], Any]] = {
    "is_tensor": lambda net, x: Group.forward(net, x * 2 if torch.is_tensor(x) else x),
    "isinstance": lambda net, x: Group.forward(net, x * 2 if isinstance(x, Tensor) else x),
    "no_tuple": lambda net, x: Group.forward(net, x[0] if isinstance(x, (tuple, list)) else x),
    "what_tensors_lack": lambda net, x: Group.forward(net, x.tensors if hasattr(x, "tensors") else x),
    "default": lambda net, x: Group.forward(net, x) if getattr(x, "mask", None) is None else x.mask,
}
for name, question in ANSWERED.items():
    add(f"answers_{name}", type("Answered", (Group,), {"forward": question}), fused=WHOLE)


@case(fused=WHOLE)
def asserting(self: Any, x: Tensor) -> Tensor:
    """A text of sizes may be the message of an assertion, and nothing else."""
    torch._assert(x.shape[2] > 0, f"an image of {x.shape[2]} rows")
    return Group.forward(self, x)
