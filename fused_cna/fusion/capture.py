"""One call of a fused network as a CUDA graph: whether it can be one, its capture, its replay.

A capture fixes everything but the values in memory: addresses, shapes, kernels, and whatever Python decides.
What may decide otherwise another time, and could not be noticed, is not captured.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_cna import _tuned, layers
from fused_cna._graphs import capturing
from fused_cna.fusion.guards import MemoryGuard
from fused_cna.fusion.records import first_line
from fused_cna.fusion.signatures import is_constant

if TYPE_CHECKING:
    from fused_cna.fusion.overlay import Overlay

# Whose functions and modules decide by nothing but what is compared: shapes, attributes, modes.
_PACKAGES = ("torch", "torchvision", "timm", "fused_cna")
_KNOWN_FUNCTIONS = (*_PACKAGES, "_operator", "math", "builtins", "collections")
_KNOWN_MODULES = ("torch.nn.modules", "torchvision.ops", "timm.layers", "fused_cna")

# Of these the indices say whether the result has one shape.
_INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)

# Libraries choose algorithms and load kernels in their first calls; the run that is watched is one more.
_WARM_UPS = 2

_failed: list[torch.cuda.CUDAGraph] = []
"""Those whose capture failed are kept: torch's allocator still refers to them."""


class NotCapturableError(Exception):
    """A call cannot be a CUDA graph; the message says why."""


class NotNowError(NotCapturableError):
    """It may be one another time."""


class CaptureFailedError(NotCapturableError):
    """The capture itself failed, which torch does not recover from entirely."""


def unknown_code(overlay: "Overlay") -> str:
    """What an overlay calls whose Python code might decide otherwise in another call; empty for nothing."""
    for node in overlay.graph.graph.nodes:
        target: Any = node.target
        if node.op == "call_function" and not _is_of(target, _KNOWN_FUNCTIONS):
            return str(getattr(target, "__qualname__", type(target).__qualname__))
    kinds = (type(module) for module in _modules(overlay))
    return next((kind.__qualname__ for kind in kinds if not _is_of(kind, _KNOWN_MODULES)), "")


def _is_of(code: Any, packages: Sequence[str]) -> bool:
    name = getattr(code, "__module__", None) or ""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _modules(overlay: "Overlay") -> list[nn.Module]:
    """The modules of the network that an overlay runs."""
    return [
        one
        for one in overlay.graph.modules()
        # What is left out are the graph, what holds its modules by path, and the blocks, which are its own.
        if type(one) is not nn.Module
        and not isinstance(one, fx.GraphModule)
        and "group_name" not in vars(one)
    ]


def _check_modules(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        name = type(module).__qualname__
        if module.training:
            raise NotNowError(f"a {name} of it is in training mode")
        if hooks := layers.hooks_of(module):
            raise NotNowError(f"a {name} of it has {hooks}")
        if any(isinstance(value, Tensor) for value in vars(module).values()):
            raise NotNowError(f"a {name} of it has a tensor that is neither parameter nor buffer")


class _Watch(TorchDispatchMode):
    """A context that refuses operators for which the host waits, and tensors of other devices."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.cudagraph_unsafe)
        if func in _INDEXING:
            refused = any(one.dtype in (torch.bool, torch.uint8) for one in _tensors(args[1]))
        else:
            refused = any(tag in func.tags for tag in waits)
        if refused:
            raise NotCapturableError(f"it calls {func}, whose result decides what comes next")
        result = func(*args, **(kwargs or {}))
        for one in _tensors((args, kwargs, result)):
            if one.device != self._device:
                raise NotCapturableError(f"it calls {func} with a tensor on {one.device}")
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in pytree.tree_leaves(values) if isinstance(one, Tensor)]


class _Results:
    """What a call returned, whose memory every replay overwrites, and copies of it that nobody does.

    Copies lie as the results do, and share memory with each other where they do.
    """

    def __init__(self, result: Any) -> None:
        self._values, self._form = pytree.tree_flatten(result)
        self._sources: list[Tensor] = []
        self._places: list[tuple[int, tuple[Any, ...]]] = []
        places: dict[Any, int] = {}
        tensors = _tensors(self._values)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage.data_ptr(), tensor.dtype
            sharing = {id(one) for one in tensors if one.untyped_storage().data_ptr() == key[0]}
            is_whole = len(sharing) == 1 and tensor.clone().stride() == tensor.stride()
            if key not in places:
                places[key] = len(self._sources)
                length = storage.nbytes() // tensor.element_size()
                self._sources.append(tensor if is_whole else tensor.as_strided((length,), (1,), 0))
            view = () if is_whole else (tensor.shape, tensor.stride(), tensor.storage_offset())
            self._places.append((places[key], view))

    def copies(self) -> Any:
        clones = [source.clone() for source in self._sources]
        made = iter([clones[i].as_strided(*view) if view else clones[i] for i, view in self._places])
        values = [next(made) if isinstance(value, Tensor) else value for value in self._values]
        return pytree.tree_unflatten(values, self._form)


def _check_result(result: Any, others: Sequence[Tensor]) -> None:
    """Refuse a result that is no plain tensor or constant, or that is in the memory of one of the others."""
    taken = {one.untyped_storage().data_ptr() for one in others} - {0}
    for value in pytree.tree_leaves(result):
        is_tensor = isinstance(value, Tensor) and value.layout is torch.strided
        if is_tensor and value.untyped_storage().data_ptr() in taken:
            raise NotCapturableError("it returns an input or a parameter, or a view of one")
        if not (is_tensor and type(value) is Tensor) and not is_constant(value):
            raise NotCapturableError(f"it returns a {type(value).__qualname__}")


class Captured:
    """A CUDA graph of a call, with memory of its own for inputs and results.

    Args:
        stream: a stream beside the current one, always the same for a pool.
        pool: the memory pool that it shares with others, which run one after the other.

    Raises:
        NotCapturableError: the call cannot be captured.
        Exception: whatever the network raises.
    """

    def __init__(
        self, overlay: "Overlay", network: nn.Module, tensors: Sequence[Tensor], stream: Any, pool: Any
    ) -> None:
        _check_modules(_modules(overlay))
        self._overlay, self.uses = overlay, 0
        self._plans = _tuned.revision()
        device = tensors[0].device
        with (
            torch.cuda.device(device),
            # One graph is for all modes in which no gradient is wanted.
            torch.inference_mode(False),
            torch.no_grad(),
            _without_kept_casts(),
            # Runs that nobody sees draw no random numbers.
            torch.random.fork_rng([device.index] if device.type == "cuda" else []),
        ):
            values = overlay.values_of(network)
            self.guard = MemoryGuard(_modules(overlay), values)
            current = torch.cuda.current_stream(device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self._inputs = [
                    torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
                    for x in tensors
                ]
                self._warm_up(network, device)
            current.wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with (
                _no_trace_of_failure(self._graph, device, pool),
                capturing(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                result = overlay(network, self._inputs)
            self._results = _Results(result)

    def _warm_up(self, network: nn.Module, device: torch.device) -> None:
        versions = [one._version for one in self._inputs]
        with _Watch(device):
            result = self._overlay(network, self._inputs)
        if [one._version for one in self._inputs] != versions:
            raise NotCapturableError("its forward overwrites an input")
        _check_result(result, [*self._inputs, *self.guard.tensors])
        for _ in range(_WARM_UPS):
            self._overlay(network, self._inputs)

    def holds(self, network: nn.Module) -> bool:
        """Whether what was captured is what would run, given that the overlay holds."""
        return self._plans == _tuned.revision() and self.guard.holds(self._overlay.values_of(network))

    def replay(self, tensors: Sequence[Tensor]) -> Any:
        """What the network returns for tensors like those of the capture, in fresh memory."""
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        self._graph.replay()
        self.uses += 1
        return self._results.copies()


@contextlib.contextmanager
def _without_kept_casts() -> Iterator[None]:
    """A context in which autocast casts a weight at each use, so that the cast is part of the graph."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextlib.contextmanager
def _no_trace_of_failure(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> Iterator[None]:
    """A context for a capture, which leaves random numbers and memory usable where it fails."""
    generator = torch.cuda.default_generators[device.index]
    before = generator.clone_state()
    try:
        yield
    except Exception as error:
        _failed.append(graph)
        # Else it goes on to wait for the end of the capture.
        generator.graphsafe_set_state(before)
        # Else the allocator takes it for a capture under way, and frees nothing. It raises where it does not.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
        # What made the capture fail comes before the error at its end.
        raise CaptureFailedError(first_line(error.__context__ or error)) from error
