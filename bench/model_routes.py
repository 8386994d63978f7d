"""Every way to run a whole network: as it is, fused by us, and compiled by PyTorch with and without us."""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import fused_cna
from bench.model_cases import Model
from bench.setting import Setting

Call = Callable[[Tensor], Tensor]

EAGER = ("eager NCHW", "eager channels_last")
FUSED = "fused"
FROZEN = "fused frozen"
INDUCTOR_FROZEN = "inductor frozen"
BACKEND_MODULE = "fused_cna.fusion.compiler"


class ModelRoute(ABC):
    """One way to run a network. `prepare` gets it in the route's memory format and must not change it."""

    name: str
    ours = False
    compiles = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    memory_format = torch.channels_last

    def why_not(self) -> str | None:
        """None where the route can be taken here, else the reason why not."""
        return None

    @abstractmethod
    def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
        """What is timed. It was called with an input like `x` if the first call does what others do not."""


class EagerNchw(ModelRoute):
    name = EAGER[0]
    memory_format = torch.contiguous_format

    def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
        return model.answers(network)


class EagerChannelsLast(ModelRoute):
    name = EAGER[1]

    def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
        return model.answers(network)


class Fused(ModelRoute):
    """What fused_cna.fuse makes of the network."""

    name = FUSED
    ours = True

    def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
        return model.answers(fused_cna.fuse(network))


class FusedFrozen(ModelRoute):
    """The same with norms folded once and weights packed for a CPU."""

    name = FROZEN
    ours = True
    devices = ("cpu",)

    def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
        call = model.answers(fused_cna.fuse(network, freeze=True))
        call(x)
        return call


class Compiled(ModelRoute):
    """torch.compile with inductor. On a CPU with its weights frozen, as it is fastest there."""

    compiles = True

    def __init__(self, name: str, device: str, freezing: bool = False, **options: Any) -> None:
        self.name = name
        self.devices = (device,)
        self._freezing = freezing
        self._options = options

    def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
        import torch._inductor.config as inductor

        return _compiled_for(
            x, model.answers(network), inductor.patch(freezing=self._freezing), self._options
        )


class CompiledFused(ModelRoute):
    """torch.compile with the backend of fused_cna, which leaves the rest of the graph to inductor."""

    name = "compile fused_cna"
    ours = True
    compiles = True

    def why_not(self) -> str | None:
        if importlib.util.find_spec(BACKEND_MODULE) is None:
            return f"this version of fused_cna has no {BACKEND_MODULE}, the backend of torch.compile"
        return None

    def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
        # By its function, as the backend's name is known only where fused_cna was installed.
        backend = importlib.import_module(BACKEND_MODULE).compile_graph
        return _compiled_for(x, model.answers(network), nullcontext(), {"backend": backend})


def _compiled_for(x: Tensor, network: nn.Module, during: Any, options: dict[str, Any]) -> Call:
    call = torch.compile(network, dynamic=False, **options)
    # As it will be timed: in another grad mode the timed calls would compile once more, without `during`.
    with torch.inference_mode(), during:
        call(x)
    return call


ROUTES: tuple[ModelRoute, ...] = (
    EagerNchw(),
    EagerChannelsLast(),
    Fused(),
    FusedFrozen(),
    Compiled(INDUCTOR_FROZEN, "cpu", freezing=True),
    Compiled("torch.compile", "cuda"),
    CompiledFused(),
)
# Not "max-autotune" itself, which would launch in CUDA graphs of its own where eager launches are timed.
MAX_AUTOTUNE = Compiled("max-autotune", "cuda", mode="max-autotune-no-cudagraphs")


def routes_for(setting: Setting) -> tuple[ModelRoute, ...]:
    """The routes that a run takes on its device, those that compile last."""
    asked = (*ROUTES, MAX_AUTOTUNE) if setting.max_autotune else ROUTES
    return tuple(route for route in asked if setting.device.type in route.devices)
