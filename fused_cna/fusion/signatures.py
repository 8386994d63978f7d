"""The signature of a call: which of its arguments are tensors, in which containers, and the constants."""

import enum
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Key = tuple[Any, ...]
"""The arguments in the order of ``forward``: Tensor, containers of keys, and constants by type and value."""

_CONSTANTS = (bool, int, str, type(None), complex, torch.dtype, torch.device, torch.Size)


class UnsupportedError(Exception):
    """Arguments that no trace can stand for; the message says why."""


@functools.lru_cache(1024)
def parameters_of(forward: Callable[..., Any]) -> inspect.Signature:
    """The parameters of a ``forward``, without ``self``."""
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def key_of(forward: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Key, list[Tensor]]:
    """The signature of a call with options at their defaults, and its tensors in order.

    Raises:
        TypeError: ``forward`` does not take the arguments.
        UnsupportedError: an argument is neither a tensor nor a constant, nor a container of such.
    """
    bound = parameters_of(forward).bind(*args, **kwargs)
    bound.apply_defaults()
    tensors: list[Tensor] = []
    return tuple(_key(value, tensors) for value in bound.arguments.values()), tensors


def default_key(forward: Callable[..., Any]) -> Key:
    """The signature of a call with one tensor for each argument that has no default.

    Raises:
        UnsupportedError: there is no such argument, or one that can only be given by keyword.
    """
    key: list[Any] = []
    for parameter in parameters_of(forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            key.append((tuple,))
        elif parameter.kind is parameter.VAR_KEYWORD:
            key.append((dict,))
        elif parameter.default is not parameter.empty:
            key.append(_key(parameter.default, []))
        elif parameter.kind is parameter.KEYWORD_ONLY:
            raise UnsupportedError(f"its forward needs {parameter.name} by keyword")
        else:
            key.append(Tensor)
    if Tensor not in key:
        raise UnsupportedError("its forward takes no input by name")
    return tuple(key)


def required_of(forward: Callable[..., Any]) -> int:
    """How many arguments have to be given."""
    return sum(
        one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        for one in parameters_of(forward).parameters.values()
    )


def _key(value: Any, tensors: list[Tensor]) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor
    if kind in _CONSTANTS or isinstance(value, enum.Enum):
        return kind, value
    if kind is float:
        return kind, value.hex()
    if kind in (dict, OrderedDict):
        return kind, *((name, _key(one, tensors)) for name, one in value.items())
    if kind in (list, tuple) or (isinstance(value, tuple) and hasattr(kind, "_fields")):
        return kind, *(_key(one, tensors) for one in value)
    raise UnsupportedError(f"it is called with a {kind.__name__}")


def arguments_of(
    forward: Callable[..., Any], key: Key, tensors: Callable[[str], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a signature; ``tensors`` makes what stands for a tensor of a name."""
    parameters = parameters_of(forward)
    values = {name: _value(one, name, tensors) for name, one in zip(parameters.parameters, key, strict=True)}
    bound = inspect.BoundArguments(parameters, values)  # type: ignore[arg-type]
    return bound.args, bound.kwargs


def _value(key: Any, name: str, tensors: Callable[[str], Any]) -> Any:
    if key is Tensor:
        return tensors(name)
    kind, *rest = key
    if kind is float:
        return float.fromhex(rest[0])
    if kind in (dict, OrderedDict):
        return kind((one, _value(inner, f"{name}_{one}", tensors)) for one, inner in rest)
    if kind is torch.Size or not issubclass(kind, (list, tuple)):
        return rest[0]
    values = [_value(one, f"{name}_{i}", tensors) for i, one in enumerate(rest)]
    return kind(values) if kind in (list, tuple) else kind(*values)


def is_same(key: Any, value: Any, tensors: Iterator[Any]) -> bool:
    """Whether arguments are still made of the same ``tensors`` in the same containers."""
    if key is Tensor:
        return value is next(tensors, None)
    kind, *rest = key
    if type(value) is not kind:
        return False
    if kind in (dict, OrderedDict):
        return list(value) == [name for name, _ in rest] and all(
            is_same(inner, value[name], tensors) for name, inner in rest
        )
    if kind is torch.Size or kind in (*_CONSTANTS, float):
        return True
    return len(value) == len(rest) and all(
        is_same(one, inner, tensors) for one, inner in zip(rest, value, strict=True)
    )


def words_of(forward: Callable[..., Any]) -> str:
    """What a ``forward`` takes, with an example of ``example_inputs``."""
    required = [
        name
        for name, one in parameters_of(forward).parameters.items()
        if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    given = ", ".join(required) + "," * (len(required) == 1)
    return f".forward takes {parameters_of(forward)}, as in example_inputs=({given})"
