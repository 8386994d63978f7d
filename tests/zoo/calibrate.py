"""Parameters and statistics under which a norm, an activation or an addition that is left out shows."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

_TINY = 1e-3

# What is normalised over the batch and then rectified at its mean amplifies rounding errors by a factor per
# layer, a thousandfold over a hundred layers; at one deviation below its mean it hardly does.
_NORM_BIAS = 1.0


def randomise(network: nn.Module, generator: torch.Generator) -> None:
    """Takes apart what initialisation made alike: affine parameters, biases, gains and layer scales.

    A norm of weight 1 and bias 0, or a branch with a gain of 0, could be lost without a trace.
    """
    with torch.no_grad():
        for module in network.modules():
            is_norm = "running_mean" in module._buffers
            tensors = {**module._parameters, **(module._buffers if is_norm else {})}
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point() or name.startswith("running"):
                    continue
                if (tensor == tensor.flatten()[0]).all():
                    tensor.copy_(_spread(tensor, name, is_norm, generator))


def _spread(tensor: Tensor, name: str, is_norm: bool, generator: torch.Generator) -> Tensor:
    """Values to take the place of a constant."""
    value = float(tensor.flatten()[0])
    normal = torch.randn(tensor.shape, generator=generator)
    uniform = torch.rand(tensor.shape, generator=generator)
    if abs(value) > _TINY:
        return value * (0.8 + 0.4 * uniform)
    if name == "bias":
        return _NORM_BIAS + 0.5 * normal if is_norm else 0.2 * normal
    if tensor.dim() >= 2 and tensor.numel() > max(tensor.shape):
        return 0.05 * normal
    return 0.4 + 0.4 * uniform


def calibrate(network: nn.Module, run: Callable[[], Any], generator: torch.Generator) -> None:
    """Sets every norm's running statistics to about those of what it gets while `run` runs the network.

    In eval mode and norm by norm, so that each sees what the ones before it make with their final statistics,
    and activations neither vanish nor explode however deep the network. A tenth to a third off, so that
    no norm is a mere standardisation. A norm that `run` calls twice keeps the statistics of the first call;
    one that it never calls keeps its own.
    """
    done: set[nn.Module] = set()

    def set_statistics(module: Any, arguments: tuple[Any, ...]) -> None:
        if module in done:
            return
        done.add(module)
        x: Tensor = arguments[0]
        var, mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)
        # Two images of one pixel make no variance to rely on.
        var = (0.5 * (var + var.mean())).clamp_min(1e-4)
        noise = torch.randn(mean.shape, generator=generator)
        module.running_mean.copy_(mean + 0.2 * var.sqrt() * noise)
        module.running_var.copy_(var * (0.7 + 0.7 * torch.rand(var.shape, generator=generator)))

    with ExitStack() as hooks, torch.no_grad():
        for module in network.modules():
            if module._buffers.get("running_mean") is not None:
                hooks.enter_context(module.register_forward_pre_hook(set_statistics))
        run()
