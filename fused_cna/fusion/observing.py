"""The data flow of one run, as a graph: the way into networks whose Python code cannot be followed."""

import contextlib
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_cna.fusion.handover import METADATA
from fused_cna.fusion.records import FusionError
from fused_cna.fusion.side_effects import SideEffects

GIVEN = "tensor"
"""In the ``meta`` of nodes for tensors that were there before the run: which one, by ``id``."""

_LITERALS = (int, float, bool, str, type(None))


@dataclass
class Observation:
    """What ran, in order: calls of the modules asked for, and of torch's functions outside of them."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    """The modules that were called, by the targets of their nodes."""


def observe(network: nn.Module, inputs: tuple[Any, ...], parts: dict[nn.Module, str]) -> Observation:
    """Run a network once, without gradients, and leave no trace of it.

    Args:
        inputs: the arguments of the call; it is made with copies of them.
        parts: the modules whose calls become nodes of their own, by path.

    Raises:
        FusionError: the network does not run on these inputs.
    """
    observer = _Observer()
    inputs = pytree.tree_map_only(Tensor, _copy_of, inputs)
    with _as_it_was(network):
        with observer.watching(parts):
            try:
                # Compiled code would be traced anew, observer and all.
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    outputs = network(*inputs)
            except Exception as error:
                raise FusionError(
                    f"{type(network).__name__} does not run on example_inputs, which must be a tensor or a "
                    f"tuple of the positional arguments of a call in eval mode: {error}"
                ) from error
        del inputs
        observer.end(outputs)
    return Observation(observer.graph, observer.modules)


def _copy_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


@contextlib.contextmanager
def _as_it_was(network: nn.Module) -> Iterator[None]:
    """Puts back everything that a run can change: attributes, contents of tensors, random numbers."""
    effects = SideEffects(network)
    tensors = {
        id(value): value
        for module in network.modules()
        for held in (vars(module), module._parameters, module._buffers)
        for value in held.values()
        if isinstance(value, Tensor)
    }
    with torch.no_grad():
        contents = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    devices = {tensor.device.index for tensor in tensors.values() if tensor.is_cuda}
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        effects.undo()
        for tensor, content in contents:
            if tensor.is_mkldnn or torch.equal(tensor, content):
                continue
            with torch.no_grad():
                tensor.copy_(content)


class _Observer(TorchFunctionMode):
    """Makes the graph. What runs inside a call that is a node already makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self._nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self._is_inside = False

    @contextlib.contextmanager
    def watching(self, parts: dict[nn.Module, str]) -> Iterator[None]:
        before = [(module, module.__dict__.get("forward")) for module in parts]
        for module, path in parts.items():
            module.__dict__["forward"] = self._watched(module, path, module.forward)
        try:
            with self, _Unseen(self):
                yield
        finally:
            for module, forward in before:
                if forward is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = forward

    def _watched(self, module: nn.Module, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return forward(*args, **kwargs)
            self.modules[path] = module
            return self._call("call_module", path, forward, args, kwargs, path)

        return call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_inside or func in METADATA:
            return func(*args, **kwargs)
        name = _name_of(func)
        if getattr(Tensor, name, None) is func:
            return self._call("call_method", name, func, args, kwargs, name)
        return self._call("call_function", func, func, args, kwargs, name)

    def _call(self, op: str, target: Any, run: Any, args: Any, kwargs: Any, name: str) -> Any:
        inputs = pytree.tree_map(self._as_argument, (args, kwargs))
        self._is_inside = True
        try:
            result = run(*args, **kwargs)
        finally:
            self._is_inside = False
        self.add(op, target, inputs, result, name)
        return result

    def add(self, op: str, target: Any, inputs: Any, result: Any, name: str) -> None:
        """A node for a call; what the call returns is its result, also where that is one of its inputs."""
        args, kwargs = inputs
        node = self.graph.create_node(op, target, args, kwargs, name)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._nodes[id(leaf)] = (weakref.ref(leaf), node)

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note an operation that came past ``__torch_function__``."""
        if not self._is_inside:
            inputs = pytree.tree_map(self._as_argument, (args, kwargs))
            self.add("call_function", func, inputs, result, _name_of(func))

    def end(self, outputs: Any) -> None:
        """Note who has tensors after the run: the caller, and whoever kept one."""
        gc.collect()
        alive = [(tensor, node) for ref, node in self._nodes.values() if (tensor := ref()) is not None]
        returned = {id(leaf) for leaf in pytree.tree_leaves(outputs)}
        kept = tuple(node for tensor, node in alive if id(tensor) not in returned)
        self.graph.create_node("call_function", _keep, (kept,), name="what_is_kept")
        self.graph.output(tuple(node for tensor, node in alive if id(tensor) in returned))
        self._nodes.clear()

    def _as_argument(self, value: Any) -> Any:
        """An argument as graphs have them: a node for a tensor, literals, the class of everything else."""
        if not isinstance(value, Tensor):
            return value if isinstance(value, _LITERALS) else type(value).__name__
        ref, node = self._nodes.get(id(value), (None, None))
        if ref is None or node is None or ref() is not value:
            node = self.graph.placeholder("given")
            node.meta[GIVEN] = id(value)
            self._nodes[id(value)] = (weakref.ref(value), node)
        return node


def _name_of(function: Any) -> str:
    """What people call a function; the getter of a property goes by the name of the property."""
    name = getattr(function, "__name__", type(function).__name__)
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name


class _Unseen(TorchDispatchMode):
    """Sees what scripted code and extensions compute, which do not call torch's Python functions."""

    def __init__(self, observer: _Observer) -> None:
        super().__init__()
        self._observer = observer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._observer.see(func, args, kwargs, result)
        return result


def _keep(tensors: tuple[Tensor, ...]) -> None:
    """Stands for code that keeps tensors beyond the run."""
