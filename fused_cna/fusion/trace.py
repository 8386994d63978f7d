"""The graph of a network by ``torch.fx``: one symbolic run of its ``forward`` for a signature, in eval mode.

What FX would bake in unseen is refused here or by :mod:`questions`. A module that cannot be followed is
called as it is, where the rest of the network can be.
"""

import contextlib
import gc
import operator
import random
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Proxy, TraceError
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from fused_cna import layers
from fused_cna.fusion.nodes import kind_of
from fused_cna.fusion.questions import Watch, stores_state
from fused_cna.fusion.signatures import Key, arguments_of, is_same
from fused_cna.modules import ConvNormAct

_CONTROL_FLOW = "its control flow depends on the input"
_PLAIN_ATTRIBUTES = {
    *("shape", "dtype", "device", "layout", "ndim", "T", "mT", "H", "mH", "real", "imag", "data"),
    *("requires_grad", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_meta", "is_mkldnn", "is_mps"),
    *("is_xpu", "itemsize", "nbytes"),
}

lock = threading.RLock()
"""Held while networks are fused, traced or copied: FX patches what all threads call."""


@contextlib.contextmanager
def left_as_it_is(network: nn.Module, *, of_tensors: bool = False) -> Iterator[None]:
    """A context in which a network is in eval mode; behind it is as it was, and so are random numbers."""
    before, random_state = SideEffects(network, of_tensors=of_tensors), random.getstate()
    devices = sorted({p.device.index for p in network.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices):
            if network.training:
                network.eval()
            yield
    finally:
        random.setstate(random_state)
        before.undo()


class NotTraceableError(Exception):
    """FX cannot follow the network; the message says why."""


class _Refusing(Proxy):
    """A proxy that refuses what would be answered for itself, and not for a tensor."""

    def _refuse(self, reason: str) -> Any:
        return self.tracer.refuse(reason)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)

    def __hash__(self) -> int:
        return self._refuse("it looks up what depends on the input")  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return self._refuse("it asks for a length that depends on the input")  # type: ignore[no-any-return]

    def __float__(self) -> float:
        return self._refuse("it makes a number of a tensor")  # type: ignore[no-any-return]

    def __int__(self) -> int:
        return self._refuse("it makes a number of a tensor")  # type: ignore[no-any-return]

    def __format__(self, spec: str) -> str:
        return self._refuse("it makes a text of a tensor")  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return self._refuse("it makes a text of a tensor")  # type: ignore[no-any-return]

    __repr__ = __str__

    def __array__(self, *_: Any) -> Any:
        return self._refuse("it makes an array of a tensor")

    def __copy__(self) -> Any:
        self.tracer.note_refusal("it copies a tensor with Python's copy")  # type: ignore[attr-defined]
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__copy__()


class _TensorProxy(_Refusing):
    """A proxy whose in-place operators stay in place, and that has no attribute that a tensor has not."""

    def __getattr__(self, name: str) -> Any:
        if self.node.meta.get("is_tensor", False):
            if not hasattr(torch.Tensor, name):
                raise AttributeError(f"'Tensor' object has no attribute '{name}'")
            if name not in _PLAIN_ATTRIBUTES and not callable(getattr(torch.Tensor, name)):
                self._refuse(f"it asks for {name} of a tensor")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "held"):
            self._refuse(f"it sets {name} of a tensor")
        super().__setattr__(name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _inplace(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "imatmul",
):
    setattr(_TensorProxy, f"__{_name}__", _inplace(getattr(operator, _name)))


class _Attribute(_Refusing, fx.proxy.Attribute):
    """What is read of a proxy, such as a dtype."""


class _HeldProxy(_TensorProxy):
    """A parameter or buffer, whose shape is part of the network."""

    held: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.held.shape

    @property
    def ndim(self) -> int:
        return self.held.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.held.shape if dim is None else self.held.shape[dim]

    def dim(self) -> int:
        return self.held.ndim

    def numel(self) -> int:
        return self.held.numel()


def _isinstance(value: Any, kind: Any) -> bool:
    """``isinstance`` for code that is being traced: what stands for a tensor is one.

    Raises:
        TraceError: what the value stands for is not known.
    """
    if not issubclass(type(value), Proxy) or isinstance(value, kind):
        return isinstance(value, kind)
    classes = _classes(kind)
    known = type(value) in (_TensorProxy, _HeldProxy) and value.node.meta.get("is_tensor", False)
    if not known or any(one is not torch.Tensor and issubclass(one, torch.Tensor) for one in classes):
        value.tracer.refuse(f"it asks for the type of what {value.node.name} returns")
    return any(issubclass(torch.Tensor, one) for one in classes)


def _classes(kind: Any) -> list[type]:
    if isinstance(kind, tuple):
        return [one for each in kind for one in _classes(each)]
    return [one for one in getattr(kind, "__args__", (kind,)) if isinstance(one, type)]


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


class Tracer(fx.Tracer):
    """Follows what is not a leaf: torch's own modules, parts of groups, and what is called with hooks."""

    def __init__(self, live: set[nn.Module], opaque: set[nn.Module]) -> None:
        timm = sys.modules.get("timm.layers._fx")
        functions = [] if timm is None else [f for f in timm.get_notrace_functions() if callable(f)]
        super().__init__(autowrap_functions=tuple(functions))
        self._timm = () if timm is None else tuple(timm.get_notrace_modules())
        self._live, self._opaque = live, opaque
        self._modes = _modes()
        self._thread = threading.get_ident()
        self._proxies: list[weakref.ref[Proxy]] = []
        self._caches: list[dict[str, Any]] = []
        self._calls: list[nn.Module] = []
        self._held: dict[int, str] = {}
        self.entered: list[nn.Module] = []
        self.refused = ""
        """Why there can be no graph, whether or not the code has caught the error."""
        self.blamed: nn.Module | None = None
        """The innermost module whose code could not be followed."""
        self.unknown = ""
        """A module that may return anything, such as None."""

    def trace_call(self, network: nn.Module, forward: Callable[..., Any], key: Key) -> fx.Graph:
        """The graph of a call of ``forward`` with arguments of a signature."""
        named = (*network.named_parameters(), *network.named_buffers())
        self._held = {id(tensor): name for name, tensor in reversed(named)}
        inputs: list[Proxy] = []

        def make_input(name: str) -> Proxy:
            inputs.append(_known(self.create_proxy("placeholder", name, (), {})))
            return inputs[-1]

        def run() -> Any:
            self._calls.append(network)
            args, kwargs = arguments_of(forward, key, make_input)
            result = forward(network, *args, **kwargs)
            given, left = (*args, *kwargs.values()), iter(inputs)
            parts = [one for one in key if one not in ((tuple,), (dict,))]
            if len(given) == len(parts) and not all(
                is_same(one, value, left) for one, value in zip(parts, given, strict=True)
            ):
                self.refuse("it changes a container that it is called with")
            return result

        self._run = run
        return super().trace(network)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        return self._run, []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            kind_of(m) is not None
            or layers.has_hooks(m)
            or parametrize.is_parametrized(m)
            or m in self._live
            or m in self._opaque
            or isinstance(m, (*self._timm, ConvNormAct, torch.jit.ScriptModule))
            or super().is_leaf_module(m, module_qualified_name)
        )

    def _returns_a_tensor(self, m: nn.Module) -> bool:
        """Whether a leaf surely returns no None."""
        of_torch = type(m).__module__.startswith("torch.nn") and not isinstance(
            m, (nn.MultiheadAttention, nn.RNNBase)
        )
        known = m not in self._opaque and (
            of_torch or kind_of(m) is not None or isinstance(m, (*self._timm, ConvNormAct))
        )
        return known and not layers.has_hooks(m)

    def refuse(self, reason: str) -> Any:
        """Give up, also where the code that is traced goes on.

        Raises:
            TraceError: always.
        """
        self.note_refusal(reason)
        raise TraceError(reason)

    def note_refusal(self, reason: str) -> None:
        """Give up at the next step, from where nothing can be raised."""
        if not self.refused:
            self.refused, self.blamed = reason, self.blamed or (self._calls[-1] if self._calls else None)

    def to_bool(self, obj: Proxy) -> bool:
        return self.refuse(_CONTROL_FLOW)  # type: ignore[no-any-return]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self.refused:
            raise TraceError(self.refused)
        if _modes() != self._modes:
            self.refuse("it switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers are values that the graph takes, whatever they hold now."""
        if threading.get_ident() != self._thread or not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self._held.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            self._caches.append(parameter_proxy_cache)
            proxy = _HeldProxy(self.create_node("get_attr", name, (), {}), self)
            proxy.held = attr_val
            parameter_proxy_cache[name] = _known(proxy)
        return parameter_proxy_cache[name]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        self._calls.append(m)
        is_leaf = self.is_leaf_module(m, "")
        self.entered += [] if is_leaf else [m]
        try:
            # What is entered may be no part of the network, such as a slice of one.
            result = super().call_module(m, forward, args, kwargs) if is_leaf else forward(*args, **kwargs)
        except Exception:
            self.blamed = self.blamed or m
            raise
        self._calls.pop()
        if is_leaf and isinstance(result, Proxy):
            if kind_of(m) is not None:
                _known(result)
            if not self._returns_a_tensor(m):
                self.unknown = self.unknown or type(m).__name__
        return result

    def proxy(self, node: fx.Node) -> Proxy:
        made = _TensorProxy(node, self)
        self._proxies.append(weakref.ref(made))
        return made

    def let_go(self) -> tuple[list[nn.Module], nn.Module | None]:
        """Refer to the network no more, since FX leaves tracers in circles behind, and weights with them.

        Returns:
            The modules that were entered, and the one to blame.
        """
        entered, blamed = self.entered, self.blamed
        self.root, self.submodule_paths = nn.Module(), None
        self.entered, self.blamed, self._calls, self._run = [], None, [], lambda: None
        self._live, self._opaque = set(), set()
        for cache in self._caches:
            cache.clear()
        return entered, blamed

    def has_leaked(self) -> bool:
        """Whether an object outside has kept what stands for a tensor."""
        if any(ref() is not None for ref in self._proxies):
            gc.collect()
        return any(ref() is not None for ref in self._proxies)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), Proxy):
            return a.node
        if type(a) is OrderedDict:
            items = [(self.create_arg(key), self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, dict) and type(a) is not dict:
            self.refuse(f"it makes a {type(a).__name__}")
        if isinstance(a, torch.Tensor) and id(a) not in self._held:
            self.refuse("its code makes a tensor, which would become a constant")
        return super().create_arg(a)


class _Computing(TorchDispatchMode):
    """A context in which code may not compute with tensors of its own: their dtype may depend on a mode."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._tracer.note_refusal("its code makes a tensor, or computes with one")
        return func(*args, **(kwargs or {}))


def _known(proxy: Any) -> Any:
    """A proxy of which it is known that it stands for a tensor."""
    proxy.node.meta["is_tensor"] = True
    return proxy


class SideEffects:
    """What running Python code leaves behind besides its result: attributes, tensors, random numbers."""

    def __init__(self, network: nn.Module, *, of_tensors: bool = False) -> None:
        self._attributes = [(module, _copy_of(vars(module))) for module in network.modules()]
        self._random = (random.getstate(), torch.get_rng_state())
        held = (*network.parameters(), *network.buffers()) if of_tensors else ()
        self._values = [(one, one.detach().clone()) for one in held]

    def undo(self) -> str:
        """Put attributes back as they were; which effect there was, in words, empty for none."""
        effect = ""
        state, torch_state = self._random
        if random.getstate() != state or not torch.equal(torch.get_rng_state(), torch_state):
            effect = "its forward draws random numbers"
        for tensor, value in self._values:
            # Batch norm writes its statistics without a word to autograd.
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)
        for module, before in self._attributes:
            now = vars(module)
            if now.keys() == before.keys() and all(_is_as_before(now[k], *old) for k, old in before.items()):
                continue
            effect = f"its forward changes attributes of {type(module).__name__}"
            now.clear()
            for name, (value, content) in before.items():
                now[name] = value
                if not _is_as_before(value, value, content):
                    value.clear()
                    value.extend(content) if isinstance(value, (list, deque)) else value.update(content)
        return effect


def _copy_of(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    kinds = (dict, list, set, deque)
    return {name: (one, one.copy() if isinstance(one, kinds) else None) for name, one in attributes.items()}


def _is_as_before(now: Any, value: Any, content: Any) -> bool:
    if now is not value or content is None:
        return now is value
    if isinstance(value, dict):
        return value.keys() == content.keys() and all(value[key] is content[key] for key in content)
    return len(value) == len(content) and all(map(operator.is_, value, content))


@dataclass
class Trace:
    """A traced network."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    """The leaves that it calls, by path."""
    entered: list[nn.Module]
    """The modules whose ``forward`` became part of the graph, the network itself excluded."""
    live: set[nn.Module]
    """Modules that are in training mode although the network is not, and so run as they are."""
    reads: set[str] | None
    """The names of the attributes that the code may have read; None for any."""
    refused: dict[nn.Module, str] = field(default_factory=dict)
    """Leaves whose own code cannot be followed, and why."""


def trace(network: nn.Module, forward: Callable[..., Any], key: Key, live: set[nn.Module]) -> Trace:
    """The graph of a network as it runs in eval mode, called with arguments of a signature.

    Args:
        forward: that of its class before it was fused.
        live: modules that are leaves whatever they are, because they are in training mode.

    Raises:
        NotTraceableError: the network cannot be followed, with the reason.
    """
    if "forward" in network.__dict__:
        raise NotTraceableError("it has a forward of its own")
    if isinstance(network, torch.jit.ScriptModule):
        raise NotTraceableError("it is scripted")
    refused: dict[nn.Module, str] = {}
    while True:
        traced, blamed, reason = _run(network, forward, key, live, set(refused))
        if traced is not None:
            break
        # What one module's code does, all of its class do.
        alike = {one: reason for one in network.modules() if type(one) is type(blamed) and one is not network}
        if blamed not in alike or blamed in refused or stores_state(blamed):
            raise NotTraceableError(reason)
        refused |= alike
    traced.refused = {module: why for module, why in refused.items() if module in traced.modules.values()}
    return traced


def _run(
    network: nn.Module, forward: Any, key: Key, live: set[nn.Module], opaque: set[nn.Module]
) -> tuple[Trace | None, nn.Module | None, str]:
    """A trace; else the innermost module whose code could not be followed, if one is known, and why."""
    graph = None
    with lock, torch.inference_mode(False), torch.enable_grad():
        before = SideEffects(network)
        tracer = Tracer(live, opaque)
        watch = Watch(_isinstance, tracer.note_refusal)
        reason = ""
        try:
            with watch, _Computing(tracer):
                graph = tracer.trace_call(network, forward, key)
        # Code that is not made for tracing fails in any way.
        except Exception as error:
            reason = tracer.refused or _in_words(error)
        finally:
            entered, blamed = tracer.let_go()
            effect = before.undo()
        if graph is not None and not effect and tracer.has_leaked():
            effect = "its forward keeps a tensor in an object that is none of its modules"
        if effect:
            # Where an attribute is changed, others may read it, so no module alone is to blame.
            blamed, reason = None, effect
        if not (reason or tracer.refused) and watch.asks and tracer.unknown:
            reason = f"it may ask whether what {tracer.unknown} returns is None"
    if graph is None or reason or tracer.refused:
        return None, blamed, reason or tracer.refused
    modules = {}
    for node in graph.nodes:
        node.meta.pop("is_tensor", None)
        # Annotations say nothing about the graph, and torch 2.11 cannot pickle those that are strings.
        node.type = None
        if node.op == "call_module":
            modules[str(node.target)] = network.get_submodule(str(node.target))
    return Trace(graph, modules, entered, live, watch.reads), None, ""


def _in_words(error: Exception) -> str:
    message = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, TraceError) and "control flow" in message:
        return _CONTROL_FLOW
    return message if len(message) <= 200 else message[:197] + "..."


# What returns its input in eval mode.
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_PASSING_FUNCTIONS = {
    "torch.nn.functional.dropout": ("input", "p", "training", "inplace"),
    "torch.nn.functional.dropout2d": ("input", "p", "training", "inplace"),
    "torchvision.ops.stochastic_depth.stochastic_depth": ("input", "p", "mode", "training"),
}


def pass_through(traced: Trace) -> None:
    """Take out of the graph what hands its input on in eval mode."""
    for node in list(traced.graph.nodes):
        x = _passed(node, traced)
        if x is not None:
            node.replace_all_uses_with(x)
            traced.graph.erase_node(node)


def _passed(node: fx.Node, traced: Trace) -> fx.Node | None:
    """The input that a node returns as it is; None if it does more."""
    if node.op == "call_module" and len(node.all_input_nodes) == len(node.args) == 1:
        module = traced.modules[str(node.target)]
        if type(module) in _PASSING and not layers.has_hooks(module) and module not in traced.live:
            traced.entered.append(module)
            return node.all_input_nodes[0]
    if node.op == "call_function":
        target: Any = node.target
        names = _PASSING_FUNCTIONS.get(
            f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
        )
        given = None if names is None else {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given is not None and given.get("training", True) is False and isinstance(given["input"], fx.Node):
            return given["input"]
    return None
