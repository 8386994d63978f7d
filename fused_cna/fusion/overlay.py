"""A network that runs as a graph of fused blocks where it can, and as its own Python code everywhere else.

The network keeps its modules, names, class and methods; what is added is one attribute, the overlay, whose
blocks share the network's own modules. So nothing can go stale, and taking the overlay away undoes it all.
The overlay is none of the network's children, so that code which walks these sees what it always saw.
"""

import copyreg
import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_cna.fusion.symbolic import NotTraceableError
from fused_cna.fusion.unchanged import AsTraced

NAME = "fused_cna_overlay"
"""The attribute of a network that holds its overlay."""


class Overlay(nn.Module):
    """The graph of fused blocks over a network, and what has to hold for it to be what the network computes.

    It owns nothing, except for the tensors of snapshots.

    Args:
        graph: takes the inputs, then the values of ``values``.
        inputs: the names of the arguments of the network's ``forward`` that the graph takes.
        values: paths of the parameters and buffers, from the network on, that the graph takes.
        as_traced: what the network was like.
    """

    def __init__(
        self, graph: nn.Module, inputs: Sequence[str], values: Sequence[str], as_traced: AsTraced
    ) -> None:
        super().__init__()
        self.graph = graph
        self.inputs = tuple(inputs)
        self.values = tuple(values)
        self._as_traced = as_traced

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The graph's inputs for a call of the network; None where the call is none that was traced."""
        if kwargs:
            names = self.inputs[len(args) :]
            if len(kwargs) != len(names) or not all(name in kwargs for name in names):
                return None
            args += tuple(kwargs[name] for name in names)
        if len(args) != len(self.inputs) or not all(isinstance(x, Tensor) for x in args):
            return None
        return args

    def holds(self, network: nn.Module) -> bool:
        """Whether the network still is what was traced, as :class:`AsTraced` knows."""
        return self._as_traced.holds(network)

    def forward(self, network: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """What ``network`` returns for ``inputs`` as :meth:`bind` gives them."""
        return self.graph(*inputs, *[operator.attrgetter(path)(network) for path in self.values])

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The fused blocks by the name of their convolution."""
        modules = self.graph.modules()
        return [(str(module.group_name), module) for module in modules if hasattr(module, "group_name")]

    def move(self, fn: Callable[..., Any]) -> None:
        """Apply what moves or casts the network to what blocks hold for themselves."""
        for module in self.graph.modules():
            if getattr(module, "is_snapshot", False):
                module._apply(fn)

    def extra_repr(self) -> str:
        return f"{len(self.blocks())} fused blocks"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class FusedNetwork(nn.Module):
    """What the class of a fused network is besides the class that it was."""

    plain_class: type[nn.Module]

    # Of a method without arguments, since torch 2.11 takes no module as a constant one.
    @torch.compiler.assume_constant_result
    def _overlay_holds(self) -> bool:
        return bool(self.__dict__[NAME].holds(self))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A class that makes more of its own kind, as a slice of nn.Sequential is made, makes plain ones.
        overlay: Any = self.__dict__.get(NAME)
        if overlay is not None and not self.training and self._overlay_holds():
            inputs = overlay.bind(args, kwargs)
            if inputs is not None:
                return overlay(self, inputs)
        return self.plain_class.forward(self, *args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "FusedNetwork":
        super()._apply(fn, recurse)
        if NAME in self.__dict__:
            self.__dict__[NAME].move(fn)
        return self

    def _replicate_for_data_parallel(self) -> nn.Module:
        """A replica has modules of its own, which the overlay does not know: it runs as it was written."""
        replica = super()._replicate_for_data_parallel()
        take_off(replica)  # type: ignore[arg-type]
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self.plain_class
        if _pickles_itself(plain):
            clone = object.__new__(plain)
            clone.__dict__ = self.__dict__
            return _as_fused, (clone,)
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _new, (plain,), state


def _pickles_itself(kind: type) -> bool:
    """Whether a class has its own way of being copied and pickled, as graph modules have."""
    return hasattr(kind, "__deepcopy__") or any(
        "__reduce_ex__" in base.__dict__ or "__reduce__" in base.__dict__ for base in kind.__mro__[:-1]
    )


def _new(plain: type[nn.Module]) -> nn.Module:
    return copyreg.__newobj__(fused_class(plain))  # type: ignore[attr-defined]


def _as_fused(network: nn.Module) -> nn.Module:
    if NAME in network.__dict__:
        network.__class__ = fused_class(type(network))
    return network


_classes: weakref.WeakKeyDictionary[type, weakref.ref[type[FusedNetwork]]] = weakref.WeakKeyDictionary()


def fused_class(plain: type[nn.Module]) -> type[FusedNetwork]:
    """The class of the fused networks of a class, made once."""
    reference = _classes.get(plain)
    kind = None if reference is None else reference()
    if kind is None:
        kind = _make_fused_class(plain)
        _classes[plain] = weakref.ref(kind)
    return kind


def _make_fused_class(plain: type[nn.Module]) -> type[FusedNetwork]:
    """The class of the fused networks of a class: a subclass, with the same signature of ``forward``."""

    @functools.wraps(plain.forward)
    def forward(self: FusedNetwork, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs)

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    attributes = {**names, "forward": forward, "plain_class": plain}
    return type(f"Fused{plain.__name__}", (FusedNetwork, plain), attributes)  # type: ignore[return-value]


def check_class(plain: type[nn.Module]) -> None:
    """Refuse a class that cannot be subclassed with no more than a name.

    Raises:
        NotTraceableError: it cannot.
    """
    try:
        fused_class(plain)
    # A class may refuse subclasses in any way it likes.
    except Exception as error:
        raise NotTraceableError(f"its class cannot have a subclass: {error}") from error


def lay_over(network: nn.Module, overlay: Overlay) -> None:
    """Turn a network into its fused self, in place."""
    network.__dict__[NAME] = overlay.eval()
    network.__class__ = fused_class(type(network))


def take_off(network: FusedNetwork) -> None:
    """Undo :func:`lay_over`."""
    network.__dict__.pop(NAME, None)
    network.__class__ = network.plain_class  # type: ignore[assignment]
