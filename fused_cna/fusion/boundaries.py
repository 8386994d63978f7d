"""Where the fused blocks of a network begin and end, and what the plain network computes between."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fused_cna import _accuracy, activation, layers
from fused_cna.fusion import handover
from fused_cna.fusion.comparing import ROUNDOFF
from fused_cna.fusion.frozen import FrozenConv
from fused_cna.fusion.handover import FusedConv
from fused_cna.fusion.overlay import NAME as OVERLAY
from fused_cna.fusion.overlay import FusedNetwork, Overlay
from fused_cna.modules import ConvNormAct
from fused_cna.ops import conv_norm_act
from fused_cna.plan import allows_tf32

# Kernels keep to a bound of their own. On a CPU PyTorch and oneDNN sum in an order that depends on the
# layout, and approximate some activations; a snapshot has weights that were rounded once more.
_ELSEWHERE = 3.0
_OF_LONG_SUMS = 64.0


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a module's call."""
    return args[0] if args else next(iter(kwargs.values()), None)


def bound(y: Tensor, eager_error: float, *, is_snapshot: bool) -> float:
    """The relative error that a fused result keeps to, given that of one operation after another."""
    if y.dtype == torch.float64:
        kept = max(1.05 * eager_error, _OF_LONG_SUMS * ROUNDOFF[y.dtype])
    else:
        kept = _accuracy.error_bound(y.dtype, y.is_cuda and allows_tf32(), eager_error)
    if y.is_cuda and not is_snapshot:
        return kept
    least = _OF_LONG_SUMS * ROUNDOFF[y.dtype] if y.dtype == torch.float32 else 0.0
    return max(_ELSEWHERE * kept, least)


class Block:
    """A fused block, and the modules of the plain network whose place it takes."""

    def __init__(self, name: str, module: nn.Module, parts: tuple[nn.Module, nn.Module, nn.Module]) -> None:
        self.name = name
        """The name of its convolution in the plain network."""
        self.module = module
        self.is_snapshot = isinstance(module, FrozenConv)
        self.live = live_block(module)
        self._parts = parts
        self._in_float64 = tuple(copy.deepcopy(part).double() for part in parts)

    def padded(self, x: Any) -> Any:
        """What the convolution of the plain network gets where the block gets ``x``."""
        if not isinstance(x, Tensor) or not any(self.live.zero_pad):
            return x
        top, bottom, left, right = self.live.zero_pad
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
        return act(z + residual) if self.live.residual_order == "add_act" else act(z) + residual

    def bound(self, y: Tensor, eager_error: float) -> float:
        """The relative error that the result may have."""
        return bound(y, eager_error, is_snapshot=self.is_snapshot)


def computed_by(block: Any, residual: Any) -> str:
    """What a block computes with or without a residual, in the words of a record; "" where they lack."""
    described, own = activation.describe(block.act), layers.own_activation(block.norm)
    own_described = None if own is None else activation.describe(own)
    if described is None or (own is not None and own_described is None):
        return ""
    words = ["pad", "conv"] if any(block.zero_pad) else ["conv"]
    if type(block.norm) is not nn.Identity:
        words.append("norm")
    words += [own_described[0]] if own_described is not None and own_described[0] != "identity" else []
    tail = [described[0]] if described[0] != "identity" else []
    if residual is not None:
        tail = ["add", *tail] if block.residual_order == "add_act" else [*tail, "add"]
    return " + ".join([*words, *tail])


def live_block(module: nn.Module) -> Any:
    """The block that shares its modules with the network: itself, or what a snapshot was taken of."""
    return module.__dict__["live"] if isinstance(module, FrozenConv) else module


def overlays_of(network: nn.Module) -> Iterator[tuple[str, Overlay]]:
    """The overlays of a network, by the paths of the modules that they lie over."""
    for path, module in network.named_modules():
        if isinstance(module, FusedNetwork) and OVERLAY in module.__dict__:
            yield path, module.__dict__[OVERLAY]


def modules_of_blocks(fused: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The fused blocks of a network, and the names of their convolutions as far as the blocks know."""
    for path, module in fused.named_modules():
        if isinstance(module, ConvNormAct):
            yield path, module
        elif isinstance(module, FusedConv) and handover.STEPS in module.__dict__:
            yield path, handover.block_of(module, module.__dict__[handover.STEPS])
    for _, overlay in overlays_of(fused):
        for _, block in overlay.blocks():
            yield str(block.group_name), block


def find_blocks(fused: nn.Module, plain: nn.Module) -> list[Block]:
    """The blocks of a fused network, whose formulas are those of ``plain``, of the same dtype."""
    homes = _Homes(fused, plain)
    return [
        Block(name := homes.name_of(path), module, homes.parts_of(name, module))
        for path, module in modules_of_blocks(fused)
    ]


def convs_outside(fused: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of a fused network that are in no block, by name."""
    inside = {id(live_block(module).conv) for _, module in modules_of_blocks(fused)}
    return {
        name: module
        for name, module in fused.named_modules()
        if isinstance(module, nn.Conv2d) and id(module) not in inside and handover.STEPS not in vars(module)
    }


class _Homes:
    """Which modules of the plain network the parts of blocks are, or are copies of."""

    def __init__(self, fused: nn.Module, plain: nn.Module) -> None:
        self._plain = dict(plain.named_modules(remove_duplicate=False))
        self._paths = {id(module): path for path, module in fused.named_modules()}
        # The names of parameters outlast modules that were exchanged.
        self._owners = {
            tensor.data_ptr(): key.rpartition(".")[0]
            for key, tensor in fused.state_dict().items()
            if key.endswith(".running_mean")
        }

    def name_of(self, path: str) -> str:
        inner = f"{path}.conv".strip(".")
        return inner if isinstance(self._plain.get(inner), nn.Conv2d) else path

    def parts_of(self, name: str, module: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
        live = live_block(module)
        conv = self._plain.get(name)
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


def watch_calls(fused: nn.Module, note: Callable[[str, Tensor, Tensor, Tensor], None]) -> None:
    """Have ``note`` called for each fused call that is no block.

    With the name of its weight, its result, that of one operation after another, and that in float64.
    """
    for path, overlay in overlays_of(fused):
        graph: Any = overlay.graph
        values = [node for node in graph.graph.nodes if node.op == "placeholder"][len(overlay.inputs) :]
        names = dict(zip(values, overlay.values, strict=True))
        for node in graph.graph.nodes:
            if node.target is conv_norm_act:
                weight = names.get(node.args[1], node.name)
                node.target = _watched(f"{path}.{weight}".strip("."), note)
        graph.recompile()


def _watched(name: str, note: Callable[[str, Tensor, Tensor, Tensor], None]) -> Callable[..., Tensor]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = conv_norm_act(x, *args, **kwargs)
        # Where a gradient is wanted, one operation runs after another.
        with torch.enable_grad():
            eager = conv_norm_act(x.detach().requires_grad_(), *args, **kwargs).detach()
        wide_args, wide_kwargs = tree_map(
            lambda leaf: leaf.double() if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        note(name, y, eager, conv_norm_act(x.double(), *wide_args, **wide_kwargs))
        return y

    return call
