"""The signature of a call: which of its arguments are tensors, in which containers, and the constants."""

import enum
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Key = tuple[pytree.TreeSpec, tuple[Any, ...]]
"""The containers of the arguments, and what is in them: Tensor, or a constant by type and value."""

_CONSTANTS = (bool, int, str, type(None), complex, torch.dtype, torch.device, torch.Size)


@functools.lru_cache(1024)
def parameters_of(forward: Callable[..., Any]) -> inspect.Signature:
    """The parameters of a ``forward``, without ``self``."""
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _required(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = parameters_of(forward).parameters.values()
    return [one for one in parameters if one.default is one.empty and not one.kind.name.startswith("VAR_")]


def contents_of(arguments: inspect.BoundArguments) -> tuple[list[Any], pytree.TreeSpec]:
    """What arguments hold, and in which containers."""

    def is_leaf(value: Any) -> bool:
        kind = type(value)
        return kind not in (dict, OrderedDict, list, tuple) and not hasattr(kind, "_fields")

    return pytree.tree_flatten(tuple(arguments.arguments.values()), is_leaf)


def key_of(forward: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Key, list[Tensor]]:
    """The signature of a call with options at their defaults, and its tensors in order.

    Raises:
        TypeError: ``forward`` does not take the arguments, or one is neither a tensor nor a constant, nor a
            container of such.
    """
    parameters = parameters_of(forward)
    if any(isinstance(one.default, Tensor) for one in parameters.parameters.values()):
        raise TypeError("its forward has a tensor for a default")
    arguments = parameters.bind(*args, **kwargs)
    arguments.apply_defaults()
    leaves, containers = contents_of(arguments)
    return (containers, tuple(map(_key, leaves))), [one for one in leaves if isinstance(one, Tensor)]


def _key(value: Any) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        return Tensor
    if kind is float:
        # Of which some equal others, and some not even themselves.
        return kind, value, value.hex()
    if is_constant(value):
        return kind, value
    raise TypeError(f"it is called with a {kind.__name__}")


def is_constant(value: Any) -> bool:
    """Whether a value never changes, and compares by value."""
    return type(value) in (float, *_CONSTANTS) or isinstance(value, enum.Enum)


def default_key(forward: Callable[..., Any]) -> tuple[Key, int]:
    """The signature of a call with one tensor for each argument that has no default, and how many these are.

    Raises:
        TypeError: there is no such argument, or one that can only be given by keyword.
    """
    count = len(_required(forward))
    if count == 0:
        raise TypeError("its forward takes no input by name")
    return key_of(forward, [torch.empty(0)] * count, {})[0], count


def arguments_of(forward: Callable[..., Any], key: Key, tensors: Iterator[Any]) -> inspect.BoundArguments:
    """Arguments of a signature, with what stands for its tensors in order."""
    leaves = [next(tensors) if one is Tensor else one[1] for one in key[1]]
    parameters = parameters_of(forward)
    values = zip(parameters.parameters, pytree.tree_unflatten(leaves, key[0]), strict=True)
    return inspect.BoundArguments(parameters, OrderedDict(values))


def words_of(forward: Callable[..., Any]) -> str:
    """What a ``forward`` takes, with an example of ``example_inputs``."""
    names = [one.name for one in _required(forward) if one.kind is not one.KEYWORD_ONLY]
    given = ", ".join(names) + "," * (len(names) == 1)
    return f".forward takes {parameters_of(forward)}, as in example_inputs=({given})"
