"""Every way to run a whole network: as it is, fused by us, and compiled by PyTorch with and without us."""

import copy
import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.fx.experimental.optimization
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


class EagerFolded(ModelRoute):
    """Every norm that torch can fold into the convolution before it, folded ahead of time."""

    name = "eager folded"
    devices = ("cuda",)

    def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
        # In float64, so that folding rounds once.
        exact = model.answers(_with_plain_norms(copy.deepcopy(network).double()))
        folded: nn.Module = torch.fx.experimental.optimization.fuse(exact)
        return folded.to(x.dtype).to(memory_format=self.memory_format)


def _with_plain_norms(network: nn.Module) -> nn.Module:
    """timm's norms that also activate become the two modules that they are: torch folds no others."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and type(child) is not nn.BatchNorm2d:
                child.__class__ = nn.BatchNorm2d
                setattr(parent, name, nn.Sequential(child, child.act))
    return network


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
    """torch.compile with inductor. With its weights frozen it folds norms, and packs weights for a CPU."""

    compiles = True

    def __init__(self, name: str, *devices: str, freezing: bool = False, **options: Any) -> None:
        self.name = name
        self.devices = devices
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
    EagerFolded(),
    Fused(),
    FusedFrozen(),
    Compiled(INDUCTOR_FROZEN, "cpu", "cuda", freezing=True),
    Compiled("torch.compile", "cuda"),
    CompiledFused(),
)
# Not "max-autotune" itself, which would launch in CUDA graphs of its own where eager launches are timed.
MAX_AUTOTUNE = Compiled("max-autotune", "cuda", mode="max-autotune-no-cudagraphs")


def routes_for(setting: Setting) -> tuple[ModelRoute, ...]:
    """The routes that a run takes on its device, those that compile last."""
    asked = (*ROUTES, MAX_AUTOTUNE) if setting.max_autotune else ROUTES
    return tuple(
        route
        for route in asked
        if setting.device.type in route.devices and (setting.compiled or not route.compiles)
    )
