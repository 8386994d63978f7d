"""The graph of a network by ``torch.fx``: one symbolic run of its ``forward`` for a signature, in eval mode.

What FX would bake in unseen is refused here or by :mod:`questions`. A module that cannot be followed is
called as it is, where the rest of the network can be.
"""

import contextlib
import copy
import gc
import inspect
import itertools
import operator
import random
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import inplace_methods
from torch.fx.proxy import TraceError
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from fused_cna import layers
from fused_cna.fusion.nodes import kind_of
from fused_cna.fusion.questions import ANY, Watch, stores_state
from fused_cna.fusion.records import first_line
from fused_cna.fusion.signatures import Key, arguments_of, contents_of
from fused_cna.modules import ConvNormAct

lock = threading.RLock()
"""Held while networks are fused, traced or copied: FX patches what all threads call."""

_PLAIN_ATTRIBUTES = {
    *("shape", "dtype", "device", "layout", "ndim", "T", "mT", "H", "mH", "real", "imag", "data"),
    *("requires_grad", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_meta", "is_mkldnn", "is_mps"),
    *("is_xpu", "itemsize", "nbytes"),
}
_OF_SHAPES = ("shape", "ndim", "size", "dim", "numel")
_REFUSED_METHODS = {
    "__hash__": "it looks up what depends on the input",
    "__len__": "it asks for a length that depends on the input",
    **dict.fromkeys(("__float__", "__int__"), "it makes a number of a tensor"),
    **dict.fromkeys(("__str__", "__repr__"), "it makes a text of a tensor"),
    "__array__": "it makes an array of a tensor",
}

# What returns its input in eval mode.
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_PASSING_FUNCTIONS = (
    *("torch.nn.functional.dropout", "torch.nn.functional.dropout2d"),
    "torchvision.ops.stochastic_depth.stochastic_depth",
)


class NotTraceableError(Exception):
    """FX cannot follow the network; the message says why."""


@contextlib.contextmanager
def left_as_it_is(network: nn.Module, *, of_tensors: bool = False) -> Iterator[list[str]]:
    """A context in which a network is in eval mode, and behind which it and random numbers are as before.

    What is as before are the attributes of modules, and with ``of_tensors`` parameters and buffers. The
    context gives a list that says behind it, in words, what had changed.
    """
    effects: list[str] = []
    state, torch_state = random.getstate(), torch.get_rng_state()
    containers = [
        (module, one, dict(one) if isinstance(one, dict) else list(one))
        for module in network.modules()
        for one in (vars(module), *vars(module).values())
        if isinstance(one, (dict, list, set, deque))
    ]
    tensors = (*network.parameters(), *network.buffers())
    values = [(one, one.detach().clone()) for one in tensors if of_tensors]
    try:
        # A trace runs nothing on a GPU.
        with torch.random.fork_rng(
            sorted({one.device.index for one in tensors if of_tensors and one.is_cuda})
        ):
            if network.training:
                network.eval()
            yield effects
            if random.getstate() != state or not torch.equal(torch.get_rng_state(), torch_state):
                effects.append("its forward draws random numbers")
    finally:
        random.setstate(state)
        for module, one, before in containers:
            if not _is_same(one, before):
                effects.append(f"its forward changes attributes of {type(module).__name__}")
                one.clear()
                (one.extend if isinstance(one, (list, deque)) else one.update)(before)
        for tensor, value in values:
            # Batch norm writes its statistics without a word to autograd.
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two containers hold the very same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return len(a) == len(b) and all(map(operator.is_, a, b))


class _Proxy(fx.Proxy):
    """Stands for a tensor, or what is read of one, and refuses what it would answer otherwise."""

    is_tensor = False
    """Whether it stands for a tensor, as far as is known."""
    held: Tensor | None = None
    """The parameter or buffer that it stands for, whose shape is part of the network."""
    own = ("tracer", "node", "is_tensor", "held")

    def __getattr__(self, name: str) -> Any:
        if self.held is not None and name in _OF_SHAPES:
            return getattr(self.held, name)
        if self.is_tensor:
            if not hasattr(Tensor, name):
                raise AttributeError(f"'Tensor' object has no attribute '{name}'")
            if name not in _PLAIN_ATTRIBUTES and not callable(getattr(Tensor, name)):
                self.refuse(f"it asks for {name} of a tensor")
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.own:
            self.refuse(f"it sets {name} of a tensor")
        super().__setattr__(name, value)

    def __format__(self, spec: str) -> str:
        return self.tracer.text()  # type: ignore[attr-defined,no-any-return]

    def __copy__(self, *_: Any) -> "_Proxy":
        # No error, as what the code keeps outside of its modules may be copied later.
        self.tracer.note_refusal("it copies a tensor with Python's copy")  # type: ignore[attr-defined]
        return self

    __deepcopy__ = __copy__  # type: ignore[assignment]

    def refuse(self, reason: str, *_: Any) -> Any:
        return self.tracer.refuse(reason)  # type: ignore[attr-defined]

    def emit(self, function: Callable[..., Any], *operands: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *operands), {})


def _calling(method: Callable[..., Any], first: Any) -> Callable[..., Any]:
    """What functools.partialmethod makes, without code outside of this package."""
    return lambda self, *arguments: method(self, first, *arguments)


for _name, _reason in _REFUSED_METHODS.items():
    setattr(_Proxy, _name, _calling(_Proxy.refuse, _reason))
# In-place operators stay in place.
for _name in inplace_methods:
    setattr(_Proxy, f"__{_name}__", _calling(_Proxy.emit, getattr(operator, _name)))


class _Attribute(_Proxy, fx.proxy.Attribute):
    """What is read of a proxy, such as a dtype."""

    own = ("tracer", "root", "attr", "_node")


# Tensors that torch.FloatTensor and the like tell apart.
_TENSORS = (torch.empty(0), torch.empty(0, dtype=torch.int8, device="meta"))


def _isinstance(value: Any, kind: Any) -> bool:
    """``isinstance`` for code that is being traced: what stands for a tensor, maybe of a subclass, is one."""
    if not issubclass(type(value), fx.Proxy):
        return isinstance(value, kind)
    answers = {isinstance(one, kind) for one in _TENSORS} | {issubclass(one, kind) for one in _kinds(Tensor)}
    if not value.is_tensor or len(answers) > 1:
        value.refuse(f"it asks for the type of what {value.node.name} returns")
    return answers.pop()


def _kinds(kind: Any) -> set[type]:
    return {kind, *(one for sub in kind.__subclasses__() for one in _kinds(sub))}


class Tracer(fx.Tracer):
    """Follows what is no leaf: modules of torch, parts of groups, what has hooks, and what is ``left``."""

    def __init__(self, network: nn.Module, left: set[nn.Module]) -> None:
        timm = sys.modules.get("timm.layers._fx")
        functions = [] if timm is None else [one for one in timm.get_notrace_functions() if callable(one)]
        super().__init__(autowrap_functions=tuple(functions))
        self._of_tensors = (ConvNormAct, *([] if timm is None else timm.get_notrace_modules()))
        self._left = left
        self._thread = threading.get_ident()
        named = (*network.named_parameters(), *network.named_buffers())
        self._names = {id(tensor): name for name, tensor in reversed(named)}
        self.made: list[weakref.ref[_Proxy]] = []
        self._calls = [network]
        """The modules whose code runs; after an error, down to the one that failed."""
        self._texts: list[str] = []
        self._numbers = itertools.count()
        self.entered: list[nn.Module] = []
        self.refusal: tuple[str, nn.Module] | None = None
        """Why there can be no graph, whether or not the code caught the error, and the innermost module."""
        self.unknown = ""
        """A module that may return anything, such as None."""

    def trace_call(self, network: nn.Module, forward: Callable[..., Any], key: Key) -> fx.Graph:
        """The graph of a call of ``forward`` with arguments of a signature."""

        def run() -> Any:
            inputs = (self._tensor("placeholder", f"input_{i}") for i in itertools.count())
            arguments = arguments_of(forward, key, inputs)
            before, containers = contents_of(arguments)
            result = forward(network, *arguments.args, **arguments.kwargs)
            self._check_texts()
            after, containers_after = contents_of(arguments)
            if containers != containers_after or not _is_same(before, after):
                self.refuse("it changes a container that it is called with")
            return result

        self._run = run
        return super().trace(network)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        return self._run, []

    def _tensor(self, kind: str, target: str) -> Any:
        made = self.create_proxy(kind, target, (), {})
        made.is_tensor = True  # type: ignore[attr-defined]
        return made

    def _returns_something(self, m: nn.Module) -> bool:
        """Whether a module is of a class that surely returns no None."""
        of_torch = layers.class_of(m).__module__.startswith("torch.nn.modules.") and not isinstance(
            m, (nn.Sequential, nn.MultiheadAttention, nn.RNNBase)
        )
        return of_torch or isinstance(m, self._of_tensors) or kind_of(m) is not None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self._left or layers.has_hooks(m) or parametrize.is_parametrized(m):
            return True
        return type(m) not in _PASSING and (
            isinstance(m, torch.jit.ScriptModule)
            or self._returns_something(m)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        self._calls.append(m)
        if self.is_leaf_module(m, ""):
            result: Any = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
            if layers.has_hooks(m) or not self._returns_something(m):
                self.unknown = self.unknown or type(m).__name__
            else:
                result.is_tensor = kind_of(m) is not None
        else:
            self.entered.append(m)
            # What is entered may be no part of the network, such as a slice of one.
            result = args[0] if type(m) in _PASSING and args else forward(*args, **kwargs)
            self._check_texts()
        self._calls.pop()
        return result

    def refuse(self, reason: str) -> Any:
        """Give up by an error, and also where the code that is traced goes on after it."""
        self.note_refusal(reason)
        raise TraceError(reason)

    def note_refusal(self, reason: str) -> None:
        """Give up at the next step, from where nothing can be raised."""
        self.refusal = self.refusal or (reason, self._calls[-1])

    def to_bool(self, obj: fx.Proxy) -> Any:
        return self.refuse("its control flow depends on the input")

    iter = to_bool

    def create_node(self, kind: str, target: Any, args: Any, *more: Any, **kwargs: Any) -> fx.Node:
        if self.refusal:
            raise TraceError(self.refusal[0])
        if target is torch._assert:
            self._texts = [text for text in self._texts if text not in str(args)]
        return super().create_node(kind, target, args, *more, **kwargs)

    def text(self) -> str:
        """A text of a value that depends on the input, which may only become the message of an assertion."""
        self._texts.append(f"<value {next(self._numbers)}>")
        return self._texts[-1]

    def _check_texts(self) -> None:
        if self._texts:
            self.refuse("it makes a text of a tensor")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers are values that the graph takes, whatever they hold now."""
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None or threading.get_ident() != self._thread:
            return attr_val
        made = self._tensor("get_attr", name)
        made.held = attr_val
        return made

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = _Proxy(node, self)
        self.made.append(weakref.ref(made))
        return made

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:
            items = [(self.create_arg(key), self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, dict) and type(a) is not dict:
            self.refuse(f"it makes a {type(a).__name__}")
        if isinstance(a, Tensor) and id(a) not in self._names:
            self.refuse("its code makes a tensor, which would become a constant")
        return super().create_arg(a)

    def has_leaked(self) -> bool:
        """Whether an object outside has kept what stands for a tensor."""
        if any(ref() is not None for ref in self.made):
            gc.collect()
        return any(ref() is not None for ref in self.made)


class _NoTensors(TorchDispatchMode):
    """A context in which code may not compute with tensors of its own: their dtype may depend on a mode."""

    def __init__(self, refuse: Callable[[str], Any]) -> None:
        super().__init__()
        self._refuse = refuse

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._refuse("its code makes a tensor, or computes with one")


@dataclass
class Trace:
    """A traced network."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    """The leaves that it calls, by path."""
    entered: list[nn.Module]
    """The modules whose ``forward`` became part of the graph, the network itself excluded."""
    reads: set[str] | None
    """The names of the attributes that the code may have read; None for any."""


def trace(network: nn.Module, forward: Callable[..., Any], key: Key, live: set[nn.Module]) -> Trace:
    """The graph of a network as it runs in eval mode, called with arguments of a signature.

    Args:
        forward: that of its class before it was fused.
        live: modules that are leaves whatever they are, because they are in training mode.

    Raises:
        NotTraceableError: the network cannot be followed, with the reason.
    """
    refused: set[nn.Module] = set()
    while True:
        traced = _run(network, forward, key, {*live, *refused})
        if isinstance(traced, Trace):
            return traced
        reason, blamed = traced
        # What one module's code does, all of its class do.
        alike = {one for one in network.modules() if type(one) is type(blamed) and one is not network}
        if blamed not in alike or blamed in refused or stores_state(blamed):
            raise NotTraceableError(reason)
        refused |= alike


def _run(network: nn.Module, forward: Any, key: Key, left: set[nn.Module]) -> Trace | tuple[str, nn.Module]:
    """A trace; else why there is none, and the innermost module to blame for it."""
    with lock, torch.inference_mode(False), torch.enable_grad(), left_as_it_is(network) as effects:
        in_circles = Tracer(network, left)
        watch = Watch(_isinstance, in_circles.note_refusal)
        try:
            with watch, _NoTensors(in_circles.refuse):
                graph = in_circles.trace_call(network, forward, key)
        # Code that is not made for tracing fails in any way.
        except Exception as error:
            in_circles.note_refusal(first_line(error))
        # FX leaves tracers behind in circles, and the weights that they know with them.
        tracer = copy.copy(in_circles)
        in_circles.__dict__ = {"refusal": ("what stood for a tensor is used after the trace", nn.Module())}
    if effects:
        # Where an attribute is changed, others may read it, so no module alone is to blame.
        return effects[-1], network
    if not tracer.refusal and tracer.has_leaked():
        tracer.note_refusal("its forward keeps a tensor in an object that is none of its modules")
    if watch.asks and tracer.unknown:
        tracer.note_refusal(f"it may ask whether what {tracer.unknown} returns is None")
    if tracer.refusal:
        return tracer.refusal
    modules = {}
    for node in graph.nodes:
        # Annotations say nothing about the graph, and torch 2.11 cannot pickle those that are strings.
        node.type = None
        if node.op == "call_module":
            modules[str(node.target)] = network.get_submodule(str(node.target))
    return Trace(graph, modules, tracer.entered, None if ANY in watch.reads else watch.reads)


def pass_through(traced: Trace) -> None:
    """Take functions out of the graph that hand their input on in eval mode."""
    for node in list(traced.graph.nodes):
        function: Any = node.target
        if f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}" in _PASSING_FUNCTIONS:
            given = inspect.signature(function).bind(*node.args, **node.kwargs).arguments
            if given.get("training", True) is False and isinstance(given["input"], fx.Node):
                node.replace_all_uses_with(given["input"])
                traced.graph.erase_node(node)
