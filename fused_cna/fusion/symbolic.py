"""The graph of a network by ``torch.fx``: one symbolic run of its ``forward``, in eval mode.

What FX would bake in unseen is refused here: options of ``forward`` keep their defaults, in-place operators
stay in place, and constants that the code makes are no part of a graph.
"""

import gc
import inspect
import operator
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Proxy, TraceError
from torch.nn.utils import parametrize

from fused_cna import layers
from fused_cna.fusion.calls import kind_of
from fused_cna.fusion.side_effects import SideEffects
from fused_cna.fusion.watching import Watch
from fused_cna.modules import ConvNormAct

_CONTROL_FLOW = "its control flow depends on the input"

_lock = threading.RLock()


class NotTraceableError(Exception):
    """FX cannot follow the network; the message says why."""


class _TensorProxy(Proxy):
    """A proxy whose in-place operators stay in place, and that passes for nothing that a tensor is not."""

    def __getattr__(self, name: str) -> Any:
        if self.node.meta.get("is_tensor", False) and not hasattr(torch.Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "held"):
            self.tracer.refuse(f"it sets {name} of a tensor")  # type: ignore[attr-defined]
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        return self.tracer.refuse("it looks up what depends on the input")  # type: ignore[attr-defined,no-any-return]

    def __len__(self) -> int:
        return self.tracer.refuse("it asks for a length that depends on the input")  # type: ignore[attr-defined,no-any-return]


class _Attribute(fx.proxy.Attribute):
    """What is read of a proxy, such as a dtype."""

    def __hash__(self) -> int:
        return self.tracer.refuse("it looks up what depends on the input")  # type: ignore[attr-defined,no-any-return]


def _isinstance(value: Any, kind: Any) -> bool:
    """``isinstance`` for code that is being traced: what stands for a tensor is one.

    Raises:
        TraceError: what the value stands for is not known.
    """
    if type(value) not in (_TensorProxy, _HeldProxy) or isinstance(value, kind):
        return isinstance(value, kind)
    if not value.node.meta.get("is_tensor", False):
        value.tracer.refuse(f"it asks for the type of what {value.node.name} returns")
    return any(issubclass(torch.Tensor, one) for one in _classes(kind))


def _classes(kind: Any) -> list[type]:
    if isinstance(kind, tuple):
        return [one for each in kind for one in _classes(each)]
    return [one for one in getattr(kind, "__args__", (kind,)) if isinstance(one, type)]


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


def _set_item(self: Proxy, key: Any, value: Any) -> None:
    self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


setattr(_TensorProxy, "__setitem__", _set_item)  # noqa: B010


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


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def required_inputs(function: Callable[..., Any]) -> list[str]:
    """The arguments of a ``forward`` that have to be given, by name.

    Raises:
        NotTraceableError: there are none, or some can only be given by keyword.
    """
    names = []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise NotTraceableError(f"its forward needs {parameter.name} by keyword")
        names.append(parameter.name)
    if not names:
        raise NotTraceableError("its forward takes no input by name")
    return names


class Tracer(fx.Tracer):
    """Follows what is not a leaf: torch's own modules, parts of groups, and what is called with hooks."""

    def __init__(self, live: Collection[nn.Module] = ()) -> None:
        timm = sys.modules.get("timm.layers._fx")
        functions = [] if timm is None else [f for f in timm.get_notrace_functions() if callable(f)]
        super().__init__(autowrap_functions=tuple(functions))
        self._live = live
        self._modes = _modes()
        self._thread = threading.get_ident()
        self._proxies: list[weakref.ref[Proxy]] = []
        self.refused = ""
        """Why there can be no graph, whether or not the code has caught the error."""
        self._leaf_classes = () if timm is None else tuple(timm.get_notrace_modules())
        self._caches: list[dict[str, Any]] = []
        self.entered: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            kind_of(m) is not None
            or layers.has_hooks(m)
            or parametrize.is_parametrized(m)
            or m in self._live
            or isinstance(m, (*self._leaf_classes, ConvNormAct, torch.jit.ScriptModule))
            or super().is_leaf_module(m, module_qualified_name)
        )

    def refuse(self, reason: str) -> Any:
        """Give up, also where the code that is traced goes on.

        Raises:
            TraceError: always.
        """
        self.refused = self.refused or reason
        raise TraceError(reason)

    def note_refusal(self, reason: str) -> None:
        """Give up at the end, from where nothing can be raised."""
        self.refused = self.refused or reason

    def to_bool(self, obj: Proxy) -> bool:
        return self.refuse(_CONTROL_FLOW)  # type: ignore[no-any-return]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            self.refuse("it switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers are values that the graph takes, whatever they hold now."""
        if threading.get_ident() != self._thread or not isinstance(attr_val, torch.Tensor):
            return attr_val
        for name, held in (*self.root.named_parameters(), *self.root.named_buffers()):
            if held is attr_val:
                if name not in parameter_proxy_cache:
                    self._caches.append(parameter_proxy_cache)
                    proxy = _HeldProxy(self.create_node("get_attr", name, (), {}), self)
                    proxy.node.meta["is_tensor"] = True
                    proxy.held = attr_val
                    parameter_proxy_cache[name] = proxy
                return parameter_proxy_cache[name]
        return attr_val

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        is_leaf = self.is_leaf_module(m, self.path_of_module(m))
        if not is_leaf:
            self.entered.append(m)
        result = super().call_module(m, forward, args, kwargs)
        if is_leaf and kind_of(m) is not None and isinstance(result, Proxy):
            result.node.meta["is_tensor"] = True
        return result

    def let_go(self) -> None:
        """Refer to the network no more, since FX leaves tracers in circles behind, and weights with them."""
        self.root = nn.Module()
        self.submodule_paths = None
        for cache in self._caches:
            cache.clear()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in required_inputs(root_fn)]
        for x in inputs:
            x.node.meta["is_tensor"] = True
        return root_fn, [self.root, *inputs]

    def proxy(self, node: fx.Node) -> Proxy:
        if node.op == "get_attr":
            node.meta["is_tensor"] = True
        made = _TensorProxy(node, self)
        self._proxies.append(weakref.ref(made))
        return made

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
        if isinstance(a, torch.Tensor) and not self._is_held(a):
            self.refuse("its code makes a tensor, which would become a constant")
        return super().create_arg(a)

    def _is_held(self, tensor: torch.Tensor) -> bool:
        held = (*self.root.parameters(), *self.root.buffers())
        return any(tensor is one for one in held)


@dataclass
class Trace:
    """A traced network."""

    graph: fx.Graph
    inputs: list[str]
    """The names of the arguments that the graph takes."""
    modules: dict[str, nn.Module]
    """The leaves that it calls, by path."""
    entered: list[nn.Module]
    """The modules whose ``forward`` became part of the graph, the network itself excluded."""
    live: Collection[nn.Module]
    """Modules that are in training mode although the network is not, and so run as they are."""


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


def trace(network: nn.Module, live: Collection[nn.Module] = ()) -> Trace:
    """The graph of a network as it runs in eval mode with its options at their defaults.

    Args:
        live: modules that are leaves whatever they are, because they will be in training mode.

    Raises:
        NotTraceableError: the network cannot be followed, with the reason.
    """
    kind = type(network)
    if "forward" in network.__dict__:
        raise NotTraceableError("it has a forward of its own")
    if isinstance(network, torch.jit.ScriptModule):
        raise NotTraceableError("it is scripted")
    inputs = required_inputs(kind.forward)
    graph, tracer = _run(network, live, gradients=True)
    without_gradients, _ = _run(network, live, gradients=False)
    if str(graph) != str(without_gradients):
        raise NotTraceableError("it computes something else where gradients are off")
    for node in graph.nodes:
        node.meta.pop("is_tensor", None)
        # Annotations say nothing about the graph, and torch 2.11 cannot pickle those that are strings.
        node.type = None
    modules = {
        str(node.target): network.get_submodule(str(node.target))
        for node in graph.nodes
        if node.op == "call_module"
    }
    return Trace(graph, inputs, modules, tracer.entered, live)


def _run(network: nn.Module, live: Collection[nn.Module], *, gradients: bool) -> tuple[fx.Graph, Tracer]:
    # FX patches what all threads call.
    with _lock, torch.inference_mode(False), torch.set_grad_enabled(gradients):
        before = SideEffects(network)
        tracer = Tracer(live)
        try:
            with Watch(_isinstance, tracer.note_refusal):
                graph = tracer.trace(network)
        # Code that is not made for tracing fails in any way it likes.
        except Exception as error:
            raise NotTraceableError(tracer.refused or _in_words(error)) from error
        finally:
            tracer.let_go()
            effect = before.undo()
        if tracer.has_leaked():
            effect = effect or "its forward keeps a tensor in an object that is none of its modules"
    if tracer.refused or effect:
        raise NotTraceableError(tracer.refused or effect)
    return graph, tracer


def _in_words(error: Exception) -> str:
    message = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, TraceError) and "control flow" in message:
        return _CONTROL_FLOW
    return message if len(message) <= 200 else message[:197] + "..."
