"""The convolutions and batch norms that can be fused: which classes, and what a module holds as it is now.

Classes of torchvision and timm are told by module and name, so that neither has to be installed.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize

from fused_cna import _checks, activation

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)

_FROZEN = ("torchvision.ops.misc.FrozenBatchNorm2d", "timm.layers.norm_act.FrozenBatchNormAct2d")
_NAMED_NORMS = (*_FROZEN, "timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct")

_SAME_CONV = "timm.layers.conv2d_same.Conv2dSame"

NO_NORM = (None, None, None, None, 0.0)
"""The operator's norm arguments where there is no norm."""

NORM_TENSORS = {
    "norm_weight": "weight",
    "norm_bias": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
}
"""The operator's norm vectors, by the names that norms have for them."""

_IDENTITY = nn.Identity()


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The dicts of a module's hooks that run at a call; those of all modules are named ``_global`` and so."""


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more, or something else, than the ``forward`` of its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def hooks_of(module: nn.Module) -> str:
    """What :func:`has_hooks` found, by name."""
    found = []
    for kind in HOOKS:
        words = "the " + kind.strip("_").replace("_pre", " pre").removesuffix("s").replace("_", " ")
        found += [f"{words} {_name_of(hook)}" for hook in vars(module)[kind].values()]
    if "forward" in vars(module):
        found.append(f"a forward of its own, {_name_of(module.forward)}")
    return ", ".join(found)


def _name_of(function: Any) -> str:
    function = getattr(function, "func", function)  # of a functools.partial
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def has_global_hooks() -> bool:
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


def class_of(module: nn.Module) -> type:
    """The class whose ``forward`` runs: parametrizing a module gives it a class of its own."""
    kind = type(module)
    if kind is not nn.Conv2d and kind not in NORMS and parametrize.is_parametrized(module):
        return parametrize.type_before_parametrizations(module)
    return kind


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def is_conv(module: nn.Module) -> bool:
    """Whether the module is a convolution that is understood: nn.Conv2d, or one that only pads otherwise."""
    kind = class_of(module)
    return kind is nn.Conv2d or _name(kind) == _SAME_CONV


def pads_same(conv: nn.Module) -> bool:
    """Whether the padding depends on the size of the input, as in TensorFlow: see :func:`same_padding`."""
    return type(conv) is not nn.Conv2d and _name(class_of(conv)) == _SAME_CONV


def same_padding(
    size: Sequence[int], filter_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) that make an output of ``ceil(size / stride)``; an odd one goes last."""
    padding: list[int] = []
    for i in range(2):
        steps = (size[i] + stride[i] - 1) // stride[i] - 1
        total = max(steps * stride[i] + (filter_size[i] - 1) * dilation[i] + 1 - size[i], 0)
        padding += [total // 2, total - total // 2]
    return padding[0], padding[1], padding[2], padding[3]


def output_shape(conv: Any, shape: Sequence[int], zero_pad: Sequence[int]) -> tuple[int, ...]:
    """The shape of the convolution's result for an input of a shape, padded with zeros first."""
    top, bottom, left, right = zero_pad
    size = shape[-2] + top + bottom, shape[-1] + left + right
    filter_size, stride, dilation = conv.weight.shape[2:], conv.stride, conv.dilation
    padding = conv.padding
    if pads_same(conv):
        padding = same_padding(size, filter_size, stride, dilation)
    elif isinstance(padding, str):
        padding = _checks.explicit_padding(padding, filter_size, stride, dilation)
    return _checks.output_shape((*shape[:-2], *size), conv.weight.shape, stride, padding, dilation)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module is of a class that is understood; what it holds may still prevent fusing it."""
    kind = class_of(module)
    return kind in NORMS or _name(kind) in _NAMED_NORMS


def is_frozen(module: nn.Module) -> bool:
    """Whether the module normalises with its statistics in training mode too."""
    return _name(type(module)) in _FROZEN


def own_activation(norm: Any) -> nn.Module | None:
    """The activation inside a norm of timm's, which runs right after it; None where it has none."""
    parts = norm._modules
    return parts.get("act") if class_of(norm) not in NORMS else None


def _drops_nothing(norm: Any) -> bool:
    return type(norm._modules.get("drop", _IDENTITY)) is nn.Identity


def vectors(norm: Any) -> tuple[Any, ...] | None:
    """The operator's norm arguments: norm_weight to eps; None where the norm has to run itself.

    NO_NORM for ``nn.Identity``. What a norm of timm's does after normalising is :func:`own_activation`.
    """
    kind = class_of(norm)
    if kind is nn.Identity:
        return NO_NORM
    if kind not in NORMS and not (is_batch_norm(norm) and _drops_nothing(norm)):
        return None
    parameters, buffers = norm._parameters, norm._buffers
    if (
        "weight" in parameters
        and "bias" in parameters
        and "running_mean" in buffers
        and "running_var" in buffers
    ):
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var = buffers["running_mean"], buffers["running_var"]
    else:
        weight, bias, mean, var = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return None if mean is None or var is None else (weight, bias, mean, var, norm.eps)


def epilogue(
    norm: Any, act: Any, order: str
) -> tuple[tuple[Any, ...], tuple[str, tuple[float, ...]] | None, str] | None:
    """What can be computed with the convolution that ``norm`` and ``act`` follow.

    Returns:
        The norm arguments, the activation (None: it has to run itself), and where a residual comes in. None
        where the norm has to run itself.
    """
    held = vectors(norm)
    if held is None:
        return None
    own = own_activation(norm)
    described = activation.describe(act)
    if own is None or type(own) is nn.Identity:
        return held, described, order
    # The activation inside the norm comes before any residual, and there is one place for an activation.
    own_described = activation.describe(own)
    if own_described is None or described is None or described[0] != "identity":
        return None
    return held, own_described, "act_add"
