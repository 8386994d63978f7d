"""The CUDA graphs of a fused network: what ``fuse(cuda_graphs=True)`` adds to its calls."""

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_cna import config, eager, plan
from fused_cna.fusion.capture import (
    Captured,
    CaptureFailedError,
    NotCapturableError,
    NotNowError,
    unknown_code,
)
from fused_cna.fusion.records import first_line

if TYPE_CHECKING:
    from fused_cna.fusion.overlay import Overlay

_MOST_GRAPHS = 8
# A graph that was replayed less often before it was out of date was not worth its capture; after so many in
# a row there are no more.
_WORTH, _MOST_WASTED = 16, 8

ADVICE = 'torch.compile(model, backend="fused_cna", mode="reduce-overhead") captures the parts that it can'


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


class Replays:
    """The CUDA graphs of a network, by inputs and by the settings that choose kernels.

    They share a memory pool, so they run one after the other, on whatever streams they are called.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._start_over()

    def _start_over(self) -> None:
        self.made: dict[Any, Captured | str] = {}
        """Graphs, and reasons why a call is none."""
        self._unknown: dict[Overlay, str] = {}
        self._stopped, self._wasted = "", 0
        self._side: Any = None
        self._pool: Any = None
        self._done: Any = None
        self._last_stream: Any = None

    def clear(self) -> None:
        """Drop all graphs, as of a network that is moved or cast."""
        with self._lock:
            self._start_over()

    def run(self, overlay: "Overlay", network: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """What an overlay that holds returns: by a replay where the call is one, else launched."""
        if not _may_replay(tensors):
            return overlay(network, tensors)
        key = (overlay, _settings(), *((x.shape, x.dtype, x.stride()) for x in tensors))
        made = self.made.get(key)
        if isinstance(made, Captured) and not made.holds(network):
            self._drop(key, made)
            made = None
        read = made.guard.tensors if isinstance(made, Captured) else network.parameters()
        if isinstance(made, str) or _wants_gradient(tensors, read):
            return overlay(network, tensors)
        with self._lock:
            found = self.made.get(key) or self._make(key, network, tensors)
            if isinstance(found, Captured):
                return self._replay(found, tensors)
        # A network that fails says so itself.
        result = overlay(network, tensors)
        if not isinstance(found, NotNowError):
            with self._lock:
                self.made[key] = str(found)
        self.say(network, str(found))
        return result

    def _drop(self, key: Any, captured: Captured) -> None:
        """Drop a graph that is out of date."""
        with self._lock:
            if self.made.get(key) is captured:
                del self.made[key]
                self._wasted = 0 if captured.uses >= _WORTH else self._wasted + 1

    def _make(self, key: Any, network: nn.Module, tensors: Sequence[Tensor]) -> Captured | NotCapturableError:
        """A graph, or why there is none."""
        try:
            self._check(key[0])
            captured = self._capture(key[0], network, tensors)
        except CaptureFailedError as error:
            self._stopped = f"its capture failed: {error}"
            return NotNowError(self._stopped)
        except NotCapturableError as error:
            return error
        # Of the network, or for want of memory.
        except Exception as error:
            return NotCapturableError(first_line(error))
        self.made[key] = captured
        return captured

    def _check(self, overlay: "Overlay") -> None:
        """Refuse what makes no sense to try."""
        if overlay not in self._unknown:
            self._unknown[overlay] = unknown_code(overlay)
        if name := self._unknown[overlay]:
            raise NotNowError(f"it calls {name}, whose Python code a replay would not run; {ADVICE}")
        if self._stopped:
            raise NotNowError(self._stopped)
        if self._wasted >= _MOST_WASTED:
            raise NotNowError("what it consists of is exchanged after every few calls")
        if len(self.made) >= _MOST_GRAPHS:
            raise NotNowError(f"there are {_MOST_GRAPHS} graphs already, for other inputs or settings")

    def _capture(self, overlay: "Overlay", network: nn.Module, tensors: Sequence[Tensor]) -> Captured:
        device = tensors[0].device
        if self._side is None:
            self._side, self._done = torch.cuda.Stream(device), torch.cuda.Event()
        elif self._last_stream is not None:
            # The memory of a graph that was dropped may still be in use there.
            self._side.wait_event(self._done)
        # A pool ends with its last graph.
        if not any(isinstance(made, Captured) for made in self.made.values()):
            self._pool = torch.cuda.graph_pool_handle()
        return Captured(overlay, network, tensors, self._side, self._pool)

    def _replay(self, captured: Captured, tensors: Sequence[Tensor]) -> Any:
        stream = torch.cuda.current_stream(tensors[0].device)
        if self._last_stream is not None and stream != self._last_stream:
            stream.wait_event(self._done)
        result = captured.replay(tensors)
        self._done.record(stream)
        self._last_stream = stream
        return result

    def say_untraced(self, network: nn.Module, reason: str, arguments: Any) -> None:
        """Say once that a call on a GPU runs as Python code, which is never captured."""
        on_gpu = (isinstance(one, Tensor) and _is_on_gpu(one) for one in pytree.tree_leaves(arguments))
        if reason not in self._said and eager.is_plain_call() and any(on_gpu):
            self.say(network, reason)

    def say(self, network: nn.Module, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            kind = getattr(network, "plain_class", type(network)).__name__
            what = f"{kind}, fused with cuda_graphs=True, launches its kernels one by one"
            warnings.warn(f"{what}: {reason}", stacklevel=5)

    def lines(self) -> Iterator[str]:
        """What became of the calls, in words."""
        for (_, _, *inputs), made in list(self.made.items()):
            given = ", ".join(f"{'x'.join(map(str, shape))} {dtype}" for shape, dtype, _ in inputs)
            yield f"{given.replace('torch.', '')}: {made if isinstance(made, str) else 'replayed'}"
        yield from sorted(self._said.difference(one for one in self.made.values() if isinstance(one, str)))


def _may_replay(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    return (
        _is_on_gpu(first)
        and all(type(x) is Tensor and x.device == first.device for x in tensors)
        and all(x.layout is torch.strided for x in tensors)
        and eager.is_plain_call()
        and not torch.cuda.is_current_stream_capturing()
    )


def _wants_gradient(*tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(one.requires_grad for some in tensors for one in some)


def _settings() -> tuple[Any, ...]:
    """What chooses kernels besides the tensors."""
    backends: Any = torch.backends
    return (
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        backends.cudnn.enabled,
        backends.cudnn.deterministic,
        backends.cudnn.conv.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        plan.forced_name(),
        config.strict,
    )
