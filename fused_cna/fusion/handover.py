"""Fused groups in Python code that cannot be followed: a convolution computes its group, and hands it over.

The modules stay what and where they are. The convolution returns a :class:`Handed` tensor in the name of its
own result; the norm and the activation behind it take what is in there, in place of computing it. Whoever
else looks at a handed tensor finds what the Python code expects there, computed when it is asked for. So the
network computes what it computed, whichever way its code takes; the way that was observed is the fast one.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_cna import layers, ops
from fused_cna.fusion.records import FusionError
from fused_cna.modules import ConvNormAct

STEPS = "_fused_cna_steps"
"""The attribute of a convolution with what follows it in its group."""

_SIMPLE = (int, float, bool, str, type(None))

# What may be asked of a handed tensor without computing it: norms and activations leave it as it is.
METADATA = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.__len__,
    torch.numel,
    torch.is_floating_point,
}


@dataclass(frozen=True)
class FunctionStep:
    """An activation that Python code calls as a function or method of a tensor, as it calls it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    """Those after the tensor."""
    kwargs: dict[str, Any]
    act: nn.Module
    """What computes the same."""
    overwrites: bool

    def is_call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call, given without its tensor, is the one that was observed."""
        return (
            function is self.function
            and all(type(value) in _SIMPLE for value in (*args, *kwargs.values()))
            and args == self.args
            and kwargs == self.kwargs
        )


Step = nn.Module | FunctionStep


_State = tuple[Any, ...]
"""Of a module: its tensors, how often each has been written to, its mode and its numbers."""

_NUMBERS = (bool, int, float, str, tuple)


class Handed(Tensor):
    """What a convolution, or a norm after it, returns while the result of the whole group is there already.

    It has the metadata of a result but no memory: code that reads memory past PyTorch fails, rather than to
    read something else.
    """

    _conv: "FusedConv"
    _x: Tensor
    _x_version: int | None
    _autocasts: bool
    _states: list[_State]
    _result: Tensor
    _steps: tuple[Step, ...]
    _done: int
    _is_open: bool
    _plain: Tensor | None

    @staticmethod
    def hand(
        conv: "FusedConv",
        x: Tensor,
        result: Tensor,
        steps: tuple[Step, ...],
        done: int,
        states: list[_State],
    ) -> "Handed":
        """The tensor after ``done`` of the ``steps`` behind ``conv``; ``states`` are of all these modules."""
        handed: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            Handed, result.shape, strides=result.stride(), dtype=result.dtype, device=result.device
        )
        handed._conv, handed._x, handed._result = conv, x, result
        handed._x_version = None if x.is_inference() else x._version
        handed._autocasts = torch.is_autocast_enabled(x.device.type)
        handed._steps, handed._done, handed._states = steps, done, states
        handed._is_open, handed._plain = True, None
        return handed

    def awaits(self, step: Step) -> bool:
        """Whether ``step`` comes next, and would now make of this what was made of it already."""
        return (
            self._is_open
            and self._steps[self._done] is step
            and not torch.is_grad_enabled()
            and all(map(_is_unchanged, self._steps, self._states[1:]))
        )

    def hand_on(self, overwrites: bool) -> Tensor:
        """What comes of the next step, which may overwrite its input."""
        self._is_open = False
        done = self._done + 1
        if done < len(self._steps):
            return Handed.hand(self._conv, self._x, self._result, self._steps, done, self._states)
        if overwrites:
            self._plain = self._result
        return self._result

    def as_expected(self) -> Tensor:
        """What the Python code expects here.

        Raises:
            FusionError: it would have to be computed from a tensor that was overwritten since.
        """
        if self._plain is None:
            self._is_open = False
            if not self._has_input():
                raise FusionError(
                    "the result of a fused convolution is used in another way than for the example inputs, "
                    "and its input or parameters may have been overwritten since; call the network under "
                    "torch.no_grad() instead of torch.inference_mode(), fuse it with example inputs that "
                    "take this way, or use unfuse()"
                )
            autocast = torch.autocast(
                self.device.type, self.dtype if self._autocasts else None, self._autocasts
            )
            with torch.no_grad(), autocast:
                z = self._conv.plain_class.forward(self._conv, self._x)
                for step in self._steps[: self._done]:
                    assert isinstance(step, FusedStep)
                    z = step.plain_class.forward(step, z)
            self._plain = z
        return self._plain

    def _has_input(self) -> bool:
        computed = (self._conv, *self._steps[: self._done])
        if not all(map(_is_unchanged, computed, self._states)):
            return False
        if self._x_version is not None:
            return self._x._version == self._x_version
        # Inference tensors count no versions. The same result once more says that nothing has changed;
        # another one may also say that the result was, but what cannot be told is refused.
        with torch.no_grad():
            again = block_of(self._conv, self._steps)(self._x)
            return torch.allclose(again, self._result, rtol=0, atol=0, equal_nan=True)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        x = args[0] if args else None
        if type(x) is Handed and x._is_open:
            step = x._steps[x._done]
            if isinstance(step, FunctionStep) and step.is_call(func, args[1:], kwargs) and x.awaits(step):
                return x.hand_on(step.overwrites)
        args, kwargs = pytree.tree_map_only(Handed, Handed.as_expected, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Calls that come past ``__torch_function__``, such as those of scripted code."""
        args, kwargs = pytree.tree_map_only(Handed, Handed.as_expected, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Part(nn.Module):
    """What the class of a part of a group is besides the class that it was."""

    plain_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        role = FusedConv if isinstance(self, FusedConv) else FusedStep
        if type(self) is not _part_class(role, self.plain_class):
            return super().__reduce_ex__(protocol)
        return _new, (role, self.plain_class), self.__dict__


class FusedConv(_Part):
    """A convolution that computes its whole group where nobody will miss what is between."""

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        steps = self.__dict__.get(STEPS)
        if (
            steps is None
            or kwargs
            or len(args) != 1
            or type(args[0]) is not Tensor
            # Where there is no kernel, plain modules are the fastest.
            or not (args[0].is_cuda or ops.operator_everywhere)
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # type: ignore[attr-defined]
            # Transforms such as vmap unwrap results below PyTorch's Python functions.
            or torch._C._functorch.peek_interpreter_stack() is not None
            # The steps of a replica are those of the network that it was made of, on another device.
            or "_is_replica" in self.__dict__
            or layers.has_global_hooks()
            or not _is_as_fused(self)
            or not all(_is_as_fused(step) for step in steps if isinstance(step, nn.Module))
        ):
            return self.plain_class.forward(self, *args, **kwargs)
        x = args[0]
        states = [state for part in (self, *steps) if (state := _state_of(part)) is not None]
        if len(states) <= len(steps):
            return self.plain_class.forward(self, *args, **kwargs)
        return Handed.hand(self, x, block_of(self, steps)(x), steps, 0, states)


class FusedStep(_Part):
    """A norm or an activation that takes its result from a convolution that has computed it."""

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if type(x) is Handed and len(args) + len(kwargs) == 1 and x.awaits(self):
            return x.hand_on(bool(self.__dict__.get("inplace", False)))
        return self.plain_class.forward(self, *args, **kwargs)


def _state_of(step: Step) -> _State | None:
    """The state of a module; None where its tensors do not tell."""
    if not isinstance(step, nn.Module):
        return ()
    held = (*step._parameters.values(), *step._buffers.values())
    tensors = [tensor for tensor in held if tensor is not None]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    numbers = {name: value for name, value in vars(step).items() if type(value) in _NUMBERS}
    return [(id(tensor), tensor._version) for tensor in tensors], layers.has_hooks(step), numbers


def _is_unchanged(step: Step, state: _State) -> bool:
    return _state_of(step) == state


def _is_as_fused(part: nn.Module) -> bool:
    return not part.training and not layers.has_hooks(part) and "parametrizations" not in part._modules


def _new(role: type[_Part], plain: type[nn.Module]) -> nn.Module:
    return object.__new__(_part_class(role, plain))


_classes: dict[tuple[type, type], type[_Part]] = {}


def _part_class(role: type[_Part], plain: type[nn.Module]) -> type[_Part]:
    """The class of a part of a group, made once."""
    if (role, plain) not in _classes:
        _classes[role, plain] = _make_part_class(role, plain)
    return _classes[role, plain]


def _make_part_class(role: type[_Part], plain: type[nn.Module]) -> type[_Part]:
    """A subclass of the class of a part, with the same signature of ``forward``."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs)

    attributes = {"__module__": __name__, "__doc__": plain.__doc__, "forward": forward, "plain_class": plain}
    return type(f"Fused{plain.__name__}", (role, plain), attributes)


_blocks: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Step, ...], ConvNormAct]] = (
    weakref.WeakKeyDictionary()
)


def block_of(conv: FusedConv, steps: tuple[Step, ...]) -> ConvNormAct:
    """What computes the group of a convolution, made once; no part of the network nor of its copies."""
    known = _blocks.get(conv)
    if known is not None and known[0] is steps:
        return known[1]
    parts: list[Any] = [step.act if isinstance(step, FunctionStep) else _as_plain(step) for step in steps]
    first = steps[0]
    has_norm = len(parts) == 2 or (isinstance(first, nn.Module) and layers.is_batch_norm(parts[0]))
    norm = parts.pop(0) if has_norm else None
    block = ConvNormAct.from_modules(_as_plain(conv), norm, parts[0] if parts else None)
    _blocks[conv] = (steps, block)
    return block


def _as_plain(part: Any) -> Any:
    """The same module, state and all, under the class that it was of."""
    twin = object.__new__(part.plain_class)
    object.__setattr__(twin, "__dict__", part.__dict__)
    return twin


def join(conv: nn.Module, steps: tuple[Step, ...]) -> None:
    """Make a group of a convolution and what follows it; a norm or an activation may be in several groups."""
    conv.__dict__[STEPS] = steps
    conv.__class__ = _part_class(FusedConv, type(conv))
    for step in steps:
        if isinstance(step, nn.Module) and not isinstance(step, _Part):
            step.__class__ = _part_class(FusedStep, type(step))


def part(module: nn.Module) -> None:
    """Make a part of a group the plain module again that it was."""
    module.__dict__.pop(STEPS, None)
    _blocks.pop(module, None)
    if isinstance(module, _Part) and type(module).__dict__.get("plain_class") is not None:
        module.__class__ = module.plain_class  # type: ignore[assignment]
