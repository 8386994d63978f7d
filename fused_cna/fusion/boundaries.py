"""Where the fused blocks of a network begin and end, and what the plain network computes between."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_cna import _accuracy, activation, layers
from fused_cna.fusion.comparing import ROUNDOFF
from fused_cna.fusion.frozen import FrozenConv
from fused_cna.fusion.overlay import NAME as OVERLAY
from fused_cna.modules import ConvNormAct
from fused_cna.plan import allows_tf32

# A snapshot rounds its weights once more than the three steps do.
_OF_SNAPSHOTS = 3.0

_FLOAT64_CONSTANT = 64.0


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a module's call."""
    return args[0] if args else next(iter(kwargs.values()), None)


class Block:
    """A fused block, and the modules of the plain network whose place it takes."""

    def __init__(self, name: str, module: nn.Module, parts: tuple[nn.Module, nn.Module, nn.Module]) -> None:
        self.name = name
        """The name of its convolution in the plain network."""
        self.module = module
        self.is_snapshot = isinstance(module, FrozenConv)
        live = live_block(module)
        self._zero_pad = live.zero_pad
        self._order = live.residual_order
        self._parts = parts
        self._in_float64 = tuple(copy.deepcopy(part).double() for part in parts)

    def padded(self, x: Any) -> Any:
        """What the convolution of the plain network gets where the block gets ``x``."""
        if not isinstance(x, Tensor) or not any(self._zero_pad):
            return x
        top, bottom, left, right = self._zero_pad
        return nn.functional.pad(x, (left, right, top, bottom))

    def exactly(self, x: Tensor, residual: Any) -> Tensor:
        """What the plain network's modules compute of a block's arguments, in float64."""
        if isinstance(residual, Tensor):
            residual = residual.double()
        return self._formula(self._in_float64, x.double(), residual)

    def eagerly(self, x: Tensor, residual: Any) -> Tensor:
        """The same in the network's dtype, one operation after another."""
        return self._formula(self._parts, x, residual)

    def _formula(self, parts: tuple[nn.Module, ...], x: Tensor, residual: Any) -> Tensor:
        conv, norm, act = parts
        z = norm(conv(self.padded(x)))
        if residual is None:
            return act(z)
        return act(z + residual) if self._order == "add_act" else act(z) + residual

    def bound(self, y: Tensor, eager_error: float) -> float:
        """The relative error that the result may have."""
        if y.dtype == torch.float64:
            bound = max(1.05 * eager_error, _FLOAT64_CONSTANT * ROUNDOFF[y.dtype])
        else:
            bound = _accuracy.error_bound(y.dtype, y.is_cuda and allows_tf32(), eager_error)
        return _OF_SNAPSHOTS * bound if self.is_snapshot else bound

    def computes(self, residual: Any) -> str:
        """What a call computes, with or without a residual, in the words of a record; "" where they lack."""
        live = live_block(self.module)
        described, own = activation.describe(live.act), layers.own_activation(live.norm)
        own_described = None if own is None else activation.describe(own)
        if described is None or (own is not None and own_described is None):
            return ""
        words = ["pad", "conv"] if any(live.zero_pad) else ["conv"]
        if type(live.norm) is not nn.Identity:
            words.append("norm")
        words += [own_described[0]] if own_described is not None and own_described[0] != "identity" else []
        tail = [described[0]] if described[0] != "identity" else []
        if residual is not None:
            tail = ["add", *tail] if live.residual_order == "add_act" else [*tail, "add"]
        return " + ".join([*words, *tail])


def live_block(module: nn.Module) -> Any:
    """The block that shares its modules with the network: itself, or what a snapshot was taken of."""
    return module.__dict__["live"] if isinstance(module, FrozenConv) else module


def find_blocks(fused: nn.Module, plain: nn.Module) -> list[Block]:
    """The blocks of a fused network, whose formulas are those of ``plain``, of the same dtype."""
    homes = _Homes(fused, plain)
    return [
        Block(homes.name_of(path, module), module, homes.parts_of(path, module))
        for path, module in fused.named_modules()
        if isinstance(module, (ConvNormAct, FrozenConv))
    ]


def convs_outside(fused: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of a fused network that are in no block, by name."""
    blocks = [live_block(m) for m in fused.modules() if isinstance(m, (ConvNormAct, FrozenConv))]
    inside = {id(block.conv) for block in blocks}
    return {
        name: module
        for name, module in fused.named_modules()
        if isinstance(module, nn.Conv2d) and id(module) not in inside and OVERLAY not in name.split(".")
    }


class _Homes:
    """Which modules of the plain network the parts of blocks are, or are copies of."""

    def __init__(self, fused: nn.Module, plain: nn.Module) -> None:
        self._plain = dict(plain.named_modules(remove_duplicate=False))
        self._paths = {
            id(module): path for path, module in fused.named_modules() if OVERLAY not in path.split(".")
        }
        # The names of parameters outlast modules that were exchanged.
        self._owners = {
            tensor.data_ptr(): key.rpartition(".")[0]
            for key, tensor in fused.state_dict().items()
            if key.endswith(".running_mean")
        }

    def name_of(self, path: str, module: nn.Module) -> str:
        name = getattr(module, "group_name", path)
        inner = f"{name}.conv".strip(".")
        return inner if isinstance(self._plain.get(inner), nn.Conv2d) else name

    def parts_of(self, path: str, module: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
        live = live_block(module)
        conv = self._plain.get(self.name_of(path, module))
        return (
            conv if isinstance(conv, nn.Conv2d) else live.conv,
            self._home(live.norm, getattr(live.norm, "running_mean", None)),
            self._home(live.act, None),
        )

    def _home(self, part: nn.Module, tensor: Tensor | None) -> nn.Module:
        path = self._paths.get(id(part)) if tensor is None else self._owners.get(tensor.data_ptr())
        found = self._plain.get(path) if path is not None else None
        return found if found is not None and type(found) is type(part) else part


def watch_convs(
    network: nn.Module, note: Callable[[str, Any], None], convs: Mapping[str, nn.Module] | None = None
) -> None:
    """Have ``note`` called with the name and the input of each convolution that runs."""
    if convs is None:
        convs = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    for name, conv in convs.items():

        def hook(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            note(name, input_of(args, kwargs))

        conv.register_forward_pre_hook(hook, with_kwargs=True)
