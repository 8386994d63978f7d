"""A network that runs as a graph of fused blocks where it can, and as its own Python code everywhere else.

The network keeps its modules, names, class and methods; what is added is one attribute, the overlays, whose
blocks share the network's own modules. So nothing can go stale, and taking it away undoes it all. They are
none of the network's children, so that code which walks these sees what it always saw.

A network is traced for each signature that it is called with. Copies start without traces, and make theirs.
"""

import copy
import copyreg
import functools
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fused_cna import eager
from fused_cna.fusion.guards import Guard
from fused_cna.fusion.records import OVERLAYS, LayerRecord
from fused_cna.fusion.replay import ADVICE, Replays
from fused_cna.fusion.signatures import Key, default_key, key_of
from fused_cna.fusion.trace import NotTraceableError, lock

_MOST_SIGNATURES = 8

state = threading.local()
"""``observer``, if set, runs the overlays of this thread: ``observer(overlay, network, tensors)``."""


@dataclass(eq=False)
class Overlay:
    """The graph of fused blocks over a network for one signature, and what has to hold for it."""

    graph: fx.GraphModule
    """Takes the tensors of the call, then the values of ``values``."""
    values: list[str]
    """Paths of the parameters and buffers, from the network on, that the graph takes."""
    guard: Guard
    """What the network was like."""
    layers: list[LayerRecord]
    """What became of its convolutions."""
    leaves: dict[str, nn.Module]
    """The modules that the graph calls as they are, by path."""
    is_idle: bool
    """Whether nothing is fused, so that the network may as well run as it was written."""
    plain: fx.Graph
    """The graph before it was fused, to verify what it became."""
    pairs: dict[fx.Node, fx.Node]
    """For nodes of the fused graph those of the plain one that compute the same."""

    def holds(self, network: nn.Module) -> bool:
        """Whether the network still is what was traced, as :class:`Guard` knows."""
        return self.guard.holds(network)

    def __call__(self, network: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """What ``network`` returns for the tensors of a call."""
        return self.graph(*tensors, *self.values_of(network))

    def values_of(self, network: nn.Module) -> list[Tensor]:
        """The parameters and buffers that the graph takes."""
        return [operator.attrgetter(path)(network) for path in self.values]


class Overlays:
    """The overlays of a network by signature, made when such a call first comes.

    Args:
        make: makes an overlay of a network, or says why there is none.
        frozen: whether its convolutions are folded and packed.
        cuda_graphs: whether its calls are captured into CUDA graphs.
    """

    def __init__(
        self, make: Callable[[nn.Module, Key, bool], Overlay | str], frozen: bool, cuda_graphs: bool = False
    ) -> None:
        self._make, self.frozen = make, frozen
        self.replays = Replays() if cuda_graphs else None
        self.made: dict[Key, Overlay | str] = {}
        """Replaced whole, never written to: other threads read it."""
        self.by_count: dict[int, Overlay | str] = {}
        """The same by the number of arguments, of calls with nothing but tensors by position."""

    def __reduce__(self) -> Any:
        """Copies trace and capture anew: what was traced are other modules."""
        return Overlays, (self._make, self.frozen, self.replays is not None)

    def find(self, network: "FusedNetwork", args: Any, kwargs: Any) -> tuple[Any, Sequence[Tensor]]:
        """The overlay for a call, None if none holds, and the tensors to call it with."""
        # The operators of a snapshot are known to no transform.
        if self.frozen and not eager.is_plain_call():
            return None, ()
        tensors: Sequence[Tensor] = args
        only_tensors = not kwargs and all(type(x) is Tensor for x in args)
        overlay = self.by_count.get(len(args)) if only_tensors else None
        if overlay is None:
            try:
                key, tensors = key_of(network.plain_class.forward, args, kwargs)
            # The network's own code says what is wrong with the arguments.
            except TypeError:
                return None, ()
            overlay = (self.made.get(key) or self.make(network, key)) if tensors else None
            if only_tensors and overlay is not None:
                self.by_count = {**self.by_count, len(args): overlay}
        return (overlay, tensors) if _runs(overlay, network) else (None, ())

    def make_default(self, network: "FusedNetwork") -> Overlay | str | None:
        """The overlay for calls with one tensor for each argument that has to be given."""
        try:
            key, count = default_key(network.plain_class.forward)
        except TypeError:
            return None
        made = self.make(network, key)
        if made is not None:
            self.by_count = {**self.by_count, count: made}
        return made

    def make(self, network: nn.Module, key: Key) -> Overlay | str | None:
        """The overlay for a signature, or why there is none; None where now is no time to make one."""
        # Neither a trace nor folded weights may be made of what a compiler or a transform looks on with.
        if not eager.is_plain_call():
            return None
        with lock:
            if key not in self.made and len(self.made) < _MOST_SIGNATURES:
                try:
                    made = self._make(network, key, self.frozen)
                except NotTraceableError as error:
                    made = str(error)
                self.made = {**self.made, key: made}
            return self.made.get(key)

    def run(self, overlay: Overlay, network: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """What an overlay that was found returns."""
        observer = getattr(state, "observer", None)
        if observer is not None:
            return observer(overlay, network, tensors)
        if self.replays is not None:
            return self.replays.run(overlay, network, tensors)
        return overlay(network, tensors)

    def say_why_none(self, network: nn.Module, arguments: Any) -> None:
        """Where calls were to be captured, say once why one that ran as Python code was not."""
        if self.replays is not None:
            refused = (made for made in self.made.values() if isinstance(made, str))
            why = next(refused, "nothing in it is fused, or it was changed since, see report()")
            self.replays.say_untraced(network, f"it runs as Python code ({why}); {ADVICE}", arguments)

    def moved(self) -> None:
        """Forget what was made of tensors that were moved or cast: snapshots and CUDA graphs."""
        if self.frozen:
            self.made, self.by_count = {}, {}
        if self.replays is not None:
            self.replays.clear()


def _runs(overlay: Any, network: nn.Module) -> bool:
    return isinstance(overlay, Overlay) and not overlay.is_idle and overlay.holds(network)


class FusedNetwork(nn.Module):
    """What the class of a fused network is besides the class that it was."""

    plain_class: type[nn.Module]

    # Of a method without arguments, since torch 2.11 takes no module as a constant one.
    @eager.constant_under_compile
    def _counts_that_run(self) -> tuple[int, ...]:
        return tuple(count for count, one in self.__dict__[OVERLAYS].by_count.items() if _runs(one, self))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A class that makes more of its own kind, as a slice of nn.Sequential is made, makes plain ones.
        overlays: Any = self.__dict__.get(OVERLAYS)
        if overlays is not None and not self.training:
            if torch.compiler.is_compiling():
                only_tensors = not kwargs and all(isinstance(x, Tensor) for x in args)
                if only_tensors and len(args) in self._counts_that_run():
                    return overlays.by_count[len(args)](self, args)
            else:
                overlay, tensors = overlays.find(self, args, kwargs)
                if overlay is not None:
                    return overlays.run(overlay, self, tensors)
                result = self.plain_class.forward(self, *args, **kwargs)
                overlays.say_why_none(self, (args, kwargs))
                return result
        return self.plain_class.forward(self, *args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "FusedNetwork":
        super()._apply(fn, recurse)
        overlays = self.__dict__.get(OVERLAYS)
        if overlays is not None:
            overlays.moved()
        return self

    def _replicate_for_data_parallel(self) -> nn.Module:
        """A replica has modules of its own, which no overlay knows: it runs as it was written."""
        replica = super()._replicate_for_data_parallel()
        take_off(replica)  # type: ignore[arg-type]
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self.plain_class
        with lock:
            if _pickles_itself(plain):
                return _as_fused, (_as_plain(self),)
            held = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
            # Another thread may put something there while a copy is made of it.
            return _new, (plain,), dict(held) if type(held) is dict else held


def _as_plain(network: FusedNetwork) -> nn.Module:
    """The same modules and tensors in a network of the class that it was."""
    clone = object.__new__(network.plain_class)
    clone.__dict__ = dict(network.__dict__)
    return clone


def _copied_by_itself(self: FusedNetwork, memo: dict[int, Any]) -> nn.Module:
    """A copy of a network whose class copies itself, which may be into another class."""
    made = memo[id(self)] = _as_fused(copy.deepcopy(_as_plain(self), memo))
    return made


def _pickles_itself(kind: type) -> bool:
    """Whether a class has its own way of being copied and pickled, as graph modules have."""
    return hasattr(kind, "__deepcopy__") or any(
        "__reduce_ex__" in base.__dict__ or "__reduce__" in base.__dict__ for base in kind.__mro__[:-1]
    )


def _new(plain: type[nn.Module]) -> nn.Module:
    return copyreg.__newobj__(fused_class(plain))  # type: ignore[attr-defined]


def _as_fused(network: nn.Module) -> nn.Module:
    if OVERLAYS in network.__dict__:
        network.__class__ = fused_class(type(network))
    return network


_classes: weakref.WeakKeyDictionary[type, weakref.ref[type[FusedNetwork]]] = weakref.WeakKeyDictionary()


def fused_class(plain: type[nn.Module]) -> type[FusedNetwork]:
    """The class of the fused networks of a class, made once: a subclass with the same signature of forward.

    Raises:
        NotTraceableError: the class cannot have a subclass.
    """
    reference = _classes.get(plain)
    kind = None if reference is None else reference()
    if kind is not None:
        return kind

    @functools.wraps(plain.forward)
    def forward(self: FusedNetwork, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs)

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    attributes: dict[str, Any] = {**names, "forward": forward, "plain_class": plain}
    if hasattr(plain, "__deepcopy__"):
        attributes["__deepcopy__"] = _copied_by_itself
    try:
        kind = type(f"Fused{plain.__name__}", (FusedNetwork, plain), attributes)
    # A class may refuse subclasses.
    except Exception as error:
        raise NotTraceableError(f"its class cannot have a subclass: {error}") from error
    _classes[plain] = weakref.ref(kind)
    return kind


def lay_over(network: nn.Module, overlays: Overlays) -> None:
    """Turn a network into its fused self, in place."""
    kind = fused_class(type(network))
    network.__dict__[OVERLAYS] = overlays
    network.__class__ = kind


def take_off(network: FusedNetwork) -> None:
    """Undo :func:`lay_over`."""
    network.__dict__.pop(OVERLAYS, None)
    network.__class__ = network.plain_class  # type: ignore[assignment]
