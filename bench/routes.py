"""Every way to run one layer: ours, and each one that PyTorch and cuDNN have.

A route says whether it applies to a layer, and prepares a callable `(x)` or `(x, residual)` from the same
case. Rivals fold the batch norm ahead of time where they can, and add and activate in place: as fast as a
user can write them by hand.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.layer_list import Layer
from bench.layer_result import BASELINE
from bench.setting import Precision
from fused_cna import ConvNormAct

Call = Callable[..., Tensor]

_IN_PLACE = ("ReLU", "ReLU6", "SiLU", "Hardswish", "Hardsigmoid", "LeakyReLU")


def activation_module(name: str) -> nn.Module | None:
    """The torch module of a csv activation, in place where torch has that; None for 'none'."""
    if name == "none":
        return None
    return getattr(nn, name)(inplace=True) if name in _IN_PLACE else getattr(nn, name)()


@dataclass(frozen=True)
class Case:
    """One layer with its modules, as a user holds them: eval mode, in the measured dtype, on the device."""

    layer: Layer
    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None
    act: nn.Module | None
    device: torch.device
    dtype: torch.dtype

    def laid_out(self, memory_format: torch.memory_format) -> "Case":
        """The same with a convolution of its own, whose weight lies in `memory_format`."""
        return replace(self, conv=copy.deepcopy(self.conv).to(memory_format=memory_format))


def memory_formats(
    layer: Layer, precision: Precision, device: torch.device
) -> tuple[torch.memory_format, ...]:
    """channels_last, and NCHW too wherever that may be faster.

    Tensor cores want channels_last of a dense layer, and cuDNN only converts what lies otherwise. Strict
    float32, groups and odd channel counts have kernels of their own for NCHW.
    """
    for_tensor_cores = layer.groups == 1 and layer.cin % 8 == 0 and layer.cout % 8 == 0
    if device.type == "cuda" and for_tensor_cores and precision.float32_products != "ieee":
        return (torch.channels_last,)
    return torch.channels_last, torch.contiguous_format


def make_case(layer: Layer, device: torch.device, dtype: torch.dtype, seed: int) -> Case:
    """Random weights scaled so that outputs are of order one, and norm statistics as after training."""
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(
        layer.cin,
        layer.cout,
        (layer.kh, layer.kw),
        *layer.geometry,
        bias=layer.conv_bias,
    )
    fan_in = conv.weight[0].numel()
    nn.init.normal_(conv.weight, std=fan_in**-0.5, generator=generator)
    if conv.bias is not None:
        nn.init.normal_(conv.bias, std=0.5, generator=generator)
    norm = nn.BatchNorm2d(layer.cout) if layer.has_norm else None
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        nn.init.normal_(norm.bias, std=0.3, generator=generator)
        norm.running_mean.normal_(std=0.3, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
    modules = [module.eval().to(device, dtype) for module in (conv, norm) if module is not None]
    for module in modules:
        module.requires_grad_(False)
    return Case(layer, conv, norm, activation_module(layer.act), device, dtype)


def folded_weight_and_bias(case: Case) -> tuple[Tensor, Tensor]:
    """The convolution with its batch norm folded in, in float64 and rounded once; the weight as it lay."""
    weight = case.conv.weight.double()
    bias = weight.new_zeros(case.layer.cout) if case.conv.bias is None else case.conv.bias.double()
    norm = case.norm
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        weight = weight * scale.view(-1, 1, 1, 1)
        bias = norm.bias.double() + (bias - norm.running_mean.double()) * scale
    return weight.to(case.dtype), bias.to(case.dtype)


def finish(case: Case) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Residual and activation after the norm, as separate passes, in place."""
    act: Callable[[Tensor], Tensor] = case.act if case.act is not None else _unchanged
    if case.layer.residual_order is None:
        return lambda z, residual: act(z)
    if case.layer.residual_order == "add_act":
        return lambda z, residual: act(z.add_(_given(residual)))
    return lambda z, residual: act(z).add_(_given(residual))


def _given(residual: Tensor | None) -> Tensor:
    if residual is None:
        raise TypeError("this layer adds a residual, so it is called with (x, residual), got only x")
    return residual


def _unchanged(z: Tensor) -> Tensor:
    return z


def reference(case: Case, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The layer in float64, image by image so that a large batch fits; contiguous."""
    norm, conv = case.norm, case.conv
    geometry = case.layer.geometry
    weight = conv.weight.double()
    bias = None if conv.bias is None else conv.bias.double()
    done = finish(case)
    outputs = []
    for index in range(x.shape[0]):
        one = slice(index, index + 1)
        z = F.conv2d(x[one].double(), weight, bias, *geometry)
        if norm is not None:
            vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            mean, var, gamma, beta = (vector.double() for vector in vectors if vector is not None)
            z = F.batch_norm(z, mean, var, gamma, beta, eps=norm.eps)
        outputs.append(done(z, None if residual is None else residual[one].double()))
    return torch.cat(outputs).contiguous()


class Route(ABC):
    """One way to run a layer."""

    name: str
    ours = False

    def why_not(self, layer: Layer, device: torch.device) -> str | None:
        """None where the route applies, else the reason why it does not."""
        return None

    @abstractmethod
    def prepare(self, case: Case) -> Call:
        """A callable `(x)` or `(x, residual)`, which may hold the case's own modules.

        Everything that need not be done per call is done here.
        """


class Fused(Route):
    """fused_cna.ConvNormAct made from the case's own modules."""

    name = "fused"
    ours = True

    def prepare(self, case: Case) -> Call:
        order = case.layer.residual_order
        module = ConvNormAct.from_modules(case.conv, case.norm, case.act, residual_order=order or "add_act")
        return module.eval()


class ThreeStep(Route):
    """conv, norm and activation as three modules: what most code does."""

    name = BASELINE

    def prepare(self, case: Case) -> Call:
        conv = case.conv
        norm: Callable[[Tensor], Tensor] = case.norm if case.norm is not None else _unchanged
        done = finish(case)
        return lambda x, residual=None: done(norm(conv(x)), residual)


class Folded(Route):
    """The norm folded into the weights ahead of time; residual and activation as separate passes."""

    name = "folded conv"

    def why_not(self, layer: Layer, device: torch.device) -> str | None:
        if device.type != "cuda":
            return (
                "on a CPU the fallback is compared with the eager three-step alone, whose operations it runs"
            )
        return None if layer.has_norm else "there is no norm to fold: the same as the eager three-step"

    def prepare(self, case: Case) -> Call:
        weight, bias = folded_weight_and_bias(case)
        geometry, done = case.layer.geometry, finish(case)
        return lambda x, residual=None: done(F.conv2d(x, weight, bias, *geometry), residual)


class Cudnn(Route):
    """cuDNN's own fusion with bias, residual and ReLU; the norm is folded."""

    name = "cuDNN relu"

    def why_not(self, layer: Layer, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "needs a CUDA device"
        if layer.act != "ReLU":
            return f"does only ReLU, the layer has {layer.act}"
        return "adds a residual only before the activation" if layer.residual_order == "act_add" else None

    def prepare(self, case: Case) -> Call:
        weight, bias = folded_weight_and_bias(case)
        geometry = case.layer.geometry
        if case.layer.residual_order is None:
            return lambda x: torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return lambda x, z: torch.cudnn_convolution_add_relu(x, weight, z, 1.0, bias, *geometry)


ROUTES: tuple[Route, ...] = (Fused(), ThreeStep(), Folded(), Cudnn())
