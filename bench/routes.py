"""Every way to run a layer, a network or one call: ours, and each one that PyTorch and cuDNN have.

Rivals fold the batch norm ahead of time where they can, and add and activate in place: as fast as a user can
write them by hand. Everything that need not be done per call is done while a route prepares.
"""

import copy
import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_cna
from bench import cudnn_graph
from bench.cases import Layer, Precision
from bench.result import Entry
from fused_cna import ConvNormAct
from fused_cna.fusion.overlay import FusedNetwork
from fused_cna.fusion.records import records_of

BASELINE, FUSED, FROZEN = "three-step", "fused", "fused frozen"
EAGER = ("eager NCHW", "eager channels_last")
GRAPH, AUTOTUNED = "cuDNN graph", "max-autotune"
# Not "max-autotune" itself, which would launch in CUDA graphs of its own where eager launches are timed.
AUTOTUNE_MODE = "max-autotune-no-cudagraphs"
FORMATS = (torch.channels_last, torch.contiguous_format)
_IN_PLACE = ("ReLU", "ReLU6", "SiLU", "Hardswish", "Hardsigmoid", "LeakyReLU", "ELU", "Mish")

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Route:
    """One way to run something.

    `prepare` takes, of a layer, sets of a case and inputs, and makes a call for each; of a network, the
    network in the route's memory format, which it must not change, and an input, and makes one call.
    `why_not` gives the reason where the route does not apply to a layer.
    """

    name: str
    prepare: Callable[..., Any]
    ours: bool = False
    eager: bool = False
    compiles: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    formats: tuple[torch.memory_format, ...] = FORMATS
    why_not: Callable[[Layer], str | None] = lambda layer: None


@dataclass(frozen=True)
class LayerCase:
    """One layer with its modules, as a user holds them: eval mode, in the measured dtype, on the device."""

    layer: Layer
    conv: nn.Conv2d
    norm: Any
    act: nn.Module | None
    precision: Precision

    def laid_out(self, memory_format: torch.memory_format) -> "LayerCase":
        """The same with a convolution of its own, whose weight lies in `memory_format`."""
        return replace(self, conv=copy.deepcopy(self.conv).to(memory_format=memory_format))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift that norm and bias come to, per channel, in float64."""
        bias, norm = self.conv.bias, self.norm
        shift = self.conv.weight.new_zeros(self.layer.cout).double() if bias is None else bias.double()
        if norm is None:
            return torch.ones_like(shift), shift
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        return scale, norm.bias.double() + (shift - norm.running_mean.double()) * scale

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with the norm folded in, in float64 and rounded once; the weight as it lay."""
        scale, shift = self.affine()
        weight = self.conv.weight.double() * scale.view(-1, 1, 1, 1)
        return weight.to(self.precision.dtype), shift.to(self.precision.dtype)

    def finish(self, z: Tensor, residual: Tensor | None) -> Tensor:
        """Residual and activation after the norm, as separate passes, in place."""
        act: Callable[[Tensor], Tensor] = self.act if self.act is not None else lambda z: z
        if residual is None:
            return act(z)
        return act(z.add_(residual)) if self.layer.residual_order == "add_act" else act(z).add_(residual)


def make_case(layer: Layer, device: torch.device, precision: Precision, seed: int) -> LayerCase:
    """Random weights scaled so that outputs are of order one, and norm statistics as after training."""
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(layer.cin, layer.cout, (layer.kh, layer.kw), *layer.geometry, bias=layer.conv_bias)
    nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5, generator=generator)
    if conv.bias is not None:
        nn.init.normal_(conv.bias, std=0.5, generator=generator)
    norm: Any = nn.BatchNorm2d(layer.cout) if layer.has_norm else None
    if norm is not None:
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        nn.init.normal_(norm.bias, std=0.3, generator=generator)
        norm.running_mean.normal_(std=0.3, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
    for module in (conv, norm):
        if module is not None:
            module.eval().requires_grad_(False).to(device, precision.dtype)
    return LayerCase(layer, conv, norm, activation_module(layer.act), precision)


def activation_module(name: str) -> nn.Module | None:
    """The torch module of a csv activation, in place where torch has that; None for 'none'."""
    if name == "none":
        return None
    made: nn.Module = getattr(nn, name)(**({"inplace": True} if name in _IN_PLACE else {}))
    return made


def reference(case: LayerCase, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The layer in float64, image by image so that a large batch fits; contiguous."""
    scale, shift = (vector.view(1, -1, 1, 1) for vector in case.affine())
    weight, outputs = case.conv.weight.double(), []
    for index in range(x.shape[0]):
        one = slice(index, index + 1)
        z = F.conv2d(x[one].double(), weight, None, *case.layer.geometry) * scale + shift
        outputs.append(case.finish(z, None if residual is None else residual[one].double()))
    return torch.cat(outputs).contiguous()


Calls = list[Callable[[], Tensor]]
Sets = Sequence[tuple[LayerCase, tuple[Tensor, ...]]]


def _each(call_of: Callable[[LayerCase], Call]) -> Callable[[Sets], Calls]:
    return lambda sets: [partial(call_of(case), *inputs) for case, inputs in sets]


def _fused_layer(case: LayerCase) -> Call:
    order = case.layer.residual_order or "add_act"
    return ConvNormAct.from_modules(case.conv, case.norm, case.act, residual_order=order).eval()


def _three_step(case: LayerCase) -> Call:
    norm: Callable[[Tensor], Tensor] = case.norm or (lambda z: z)
    return lambda x, residual=None: case.finish(norm(case.conv(x)), residual)


def _folded_layer(case: LayerCase) -> Call:
    weight, bias = case.folded()
    geometry = case.layer.geometry
    return lambda x, residual=None: case.finish(F.conv2d(x, weight, bias, *geometry), residual)


def _cudnn(case: LayerCase) -> Call:
    weight, bias = case.folded()
    geometry = case.layer.geometry
    if case.layer.residual_order is None:
        return lambda x: torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return lambda x, z: torch.cudnn_convolution_add_relu(x, weight, z, 1.0, bias, *geometry)


def _why_not_cudnn(layer: Layer) -> str | None:
    if layer.act != "ReLU":
        return f"does only ReLU, the layer has {layer.act}"
    return "adds a residual only before the activation" if layer.residual_order == "act_add" else None


def _cudnn_graphs(sets: Sets) -> Calls:
    """The fastest engine of two graphs of cuDNN, with the norm's scale in the weight and behind it."""
    case, (x, *_) = sets[0]
    layer = case.layer
    y = x.new_empty(len(x), layer.out_h, layer.out_w, layer.cout).permute(0, 3, 1, 2)

    def tensors(case: LayerCase, inputs: tuple[Tensor, ...], scaled: bool) -> dict[str, Tensor]:
        weight, bias = case.folded()
        made = dict(zip(("x", "residual"), inputs, strict=False)) | {"weight": weight}
        made |= {"weight": case.conv.weight} if scaled else {}
        vectors = {"bias": bias, "scale": case.affine()[0].to(x.dtype)}
        return made | {name: vector.view(1, -1, 1, 1) for name, vector in vectors.items()}

    engine = cudnn_graph.prepare(layer, case.precision, tensors(*sets[0], False) | {"y": y})

    def run(known: dict[str, Tensor]) -> Tensor:
        output = torch.empty_like(y)
        engine.run(known | {"y": output})
        return output

    return [partial(run, tensors(case, inputs, engine.description.scaled)) for case, inputs in sets]


def _autotuned(sets: Sets) -> Calls:
    """torch.compile of the layer with its norm folded; compiled once, whatever the weight."""
    first = sets[0][0]

    def layer(weight: Tensor, bias: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return first.finish(F.conv2d(x, weight, bias, *first.layer.geometry), residual)

    torch._dynamo.reset()
    compiled = torch.compile(layer, mode=AUTOTUNE_MODE, dynamic=False)
    return [partial(compiled, *case.folded(), *inputs) for case, inputs in sets]


def _no_norm(layer: Layer) -> str | None:
    return None if layer.has_norm else "there is no norm to fold: the same as the eager three-step"


GPU = ("cuda",)
# On a CPU the fallback is compared with the eager three-step alone, whose operations it runs.
LAYER_ROUTES = (
    Route(FUSED, _each(_fused_layer), ours=True),
    Route(BASELINE, _each(_three_step), eager=True),
    Route("folded conv", _each(_folded_layer), devices=GPU, why_not=_no_norm),
    Route("cuDNN relu", _each(_cudnn), devices=GPU, why_not=_why_not_cudnn),
    Route(GRAPH, _cudnn_graphs, devices=GPU, formats=FORMATS[:1], why_not=cudnn_graph.why_not_here),
    Route(AUTOTUNED, _autotuned, devices=GPU, formats=FORMATS[:1], compiles=True),
)


def prepare_network(route: Route, entry: Entry, network: nn.Module, x: Tensor) -> Call:
    """What is timed; the entry learns what is fused in it."""
    call: Call = route.prepare(network, x)
    modules = list(call.modules()) if isinstance(call, nn.Module) else []
    if any(isinstance(module, FusedNetwork) for module in modules):
        layers, _ = records_of(call)  # type: ignore[arg-type]
        entry.fused_calls, entry.conv_calls = sum(layer.fused for layer in layers), len(layers)
    elif replaced := sum(isinstance(module, ConvNormAct) for module in modules):
        entry.fused_calls, entry.conv_calls = replaced, sum(isinstance(m, nn.Conv2d) for m in modules)
    return call


def _as_it_is(network: nn.Module, x: Tensor) -> Call:
    return network


def _folded(network: nn.Module, x: Tensor) -> Call:
    """Every norm that torch can fold into the convolution before it, folded ahead of time in float64."""
    optimization = importlib.import_module("torch.fx.experimental.optimization")
    exact = copy.deepcopy(network).double()
    # timm's norms that also activate become the two modules that they are: torch folds no others.
    for parent in list(exact.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and type(child) is not nn.BatchNorm2d:
                child.__class__ = nn.BatchNorm2d
                setattr(parent, name, nn.Sequential(child, child.act))
    folded: nn.Module = optimization.fuse(exact)
    return folded.to(x.dtype).to(memory_format=torch.channels_last)


def _fused(network: nn.Module, x: Tensor, **options: Any) -> Call:
    call = fused_cna.fuse(network, **options)
    if options:
        call(x)  # what is frozen is packed by the first call
    return call


def _modules(network: nn.Module, x: Tensor) -> Call:
    """A copy with a ConvNormAct in place of every Conv2dNormActivation, as one would swap them by hand."""
    blocks = importlib.import_module("torchvision.ops.misc").Conv2dNormActivation
    swapped = copy.deepcopy(network)
    for parent in list(swapped.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, blocks):
                conv, norm, act = (*child, None)[:3]
                setattr(parent, name, ConvNormAct.from_modules(conv, norm, act).eval())
    return swapped


def _compiled(
    network: nn.Module, x: Tensor, *, freezing: bool = False, ours: bool = False, **options: Any
) -> Call:
    """torch.compile; `freezing` lets inductor fold norms, and pack weights for a CPU."""
    import torch._inductor.config as inductor

    if ours:
        # By its function, as the backend's name is known only where fused_cna was installed.
        options["backend"] = importlib.import_module("fused_cna.fusion.compiler").compile_graph
    call: Call = torch.compile(network, dynamic=False, **options)
    # As it will be timed: in another grad mode the timed calls would compile once more, without freezing.
    with torch.inference_mode(), inductor.patch(freezing=True) if freezing else nullcontext():
        call(x)
    return call


LAST = FORMATS[:1]
MODULES = Route("ConvNormAct modules", _modules, ours=True, formats=LAST)
NETWORK_AUTOTUNED = Route(
    AUTOTUNED, partial(_compiled, mode=AUTOTUNE_MODE), compiles=True, devices=GPU, formats=LAST
)
NETWORK_ROUTES = (
    Route(EAGER[0], _as_it_is, eager=True, formats=FORMATS[1:]),
    Route(EAGER[1], _as_it_is, eager=True, formats=LAST),
    Route("eager folded", _folded, devices=GPU, formats=LAST),
    Route(FUSED, _fused, ours=True, formats=LAST),
    Route(FROZEN, partial(_fused, freeze=True), ours=True, devices=("cpu",), formats=LAST),
    MODULES,
    Route("inductor frozen", partial(_compiled, freezing=True), compiles=True, formats=LAST),
    Route("torch.compile", _compiled, compiles=True, devices=GPU, formats=LAST),
    Route("compile fused_cna", partial(_compiled, ours=True), ours=True, compiles=True, formats=LAST),
    NETWORK_AUTOTUNED,
)


class ThreeModules(nn.Module):
    """The module that people write by hand."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))  # type: ignore[no-any-return]


# Of a single call.
CALL_ROUTES = (
    Route(FUSED, _each(_fused_layer), ours=True),
    Route("three modules", _each(lambda case: lambda x: case.act(case.norm(case.conv(x)))), eager=True),  # type: ignore[misc]
    Route("hand-written module", _each(lambda case: ThreeModules(case.conv, case.norm, case.act).eval())),  # type: ignore[arg-type]
)
