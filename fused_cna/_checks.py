"""Arguments: the forms that the front takes made those of the operator, and what the operator refuses.

Sizes may be symbolic. Where torch's own conv2d refuses the same thing, the words are its own.
"""

from collections.abc import Sequence
from operator import index as to_int
from typing import Any

import torch
from torch import Tensor

from fused_cna.activation import ACTIVATIONS

RESIDUAL_ORDERS = ("add_act", "act_add")

# What the kernels' 32-bit coordinates can hold.
_MOST_PADDING = 2**31 - 1

# How torch's messages name a dtype.
_CPP_NAMES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "c10::Half",
    torch.bfloat16: "c10::BFloat16",
    torch.complex64: "c10::complex<float>",
    torch.complex128: "c10::complex<double>",
}


def _cpp_name(tensor: Tensor) -> str:
    return _CPP_NAMES.get(tensor.dtype, str(tensor.dtype))


def check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    act_params: Sequence[float],
    residual: Tensor | None,
    residual_order: str,
) -> tuple[int, int, int, int]:
    """Refuse what the operator does not take.

    Returns:
        The shape [N, K, P, Q] of the output.

    Raises:
        RuntimeError: naming what was given and what is allowed.
    """
    shape = check_convolution(x, weight, bias, stride, padding, dilation, groups)
    _check_norm(x, shape[1], norm_weight, norm_bias, running_mean, running_var)
    _check_activation(act, act_params)
    check_residual_order(residual_order)
    if residual is not None:
        check_residual(residual, shape, x)
    return shape


def check_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    check_dimensions(x, weight)
    _check_types(x, weight, bias)
    _check_geometry(stride, padding, dilation, groups)
    _check_channels(x, weight, bias, groups)
    top, bottom, left, right = (
        padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
    )
    height, width = x.shape[2] + top + bottom, x.shape[3] + left + right
    filter_height, filter_width = (dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in range(2))
    if height < filter_height or width < filter_width:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({height} x {width}). "
            f"Kernel size: ({filter_height} x {filter_width}). "
            "Kernel size can't be greater than actual input size"
        )
    if x.shape[0] != 0 and x.shape[1] != 0 and (x.shape[2] == 0 or x.shape[3] == 0):
        raise RuntimeError(
            f"Only zero batch or zero channel inputs are supported, but got input shape: {list(x.shape)}"
        )
    # torch gives an input without channels an output without channels.
    channels = 0 if weight.shape[1] == 0 else weight.shape[0]
    return (x.shape[0], channels, *output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation))


def output_size(
    size: Sequence[int],
    filter_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """The (height, width) of a convolution's result; below 1 where the filter is larger than the image.

    ``padding`` is (height, width) or (top, bottom, left, right).
    """
    height, width = size
    if len(padding) == 4:
        height, width = height + padding[0] + padding[1], width + padding[2] + padding[3]
    else:
        height, width = height + 2 * padding[0], width + 2 * padding[1]
    return (
        (height - dilation[0] * (filter_size[0] - 1) - 1) // stride[0] + 1,
        (width - dilation[1] * (filter_size[1] - 1) - 1) // stride[1] + 1,
    )


def output_shape(
    shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """The shape of a convolution's result, [N, K, P, Q] or [K, P, Q]; see :func:`output_size`."""
    size = output_size(shape[-2:], weight_shape[2:], stride, padding, dilation)
    return *shape[:-3], weight_shape[0], *size


def check_dimensions(x: Tensor, weight: Tensor) -> None:
    """Refuse an input or a weight that has not four dimensions."""
    if x.dim() != 4:
        raise RuntimeError(
            f"Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: {list(x.shape)}"
        )
    if weight.dim() < 3:
        raise RuntimeError(f"weight should have at least three dimensions, but got size {list(weight.shape)}")
    if weight.dim() != 4:
        raise RuntimeError(
            f"Expected {weight.dim()}-dimensional input for {weight.dim()}-dimensional weight "
            f"{list(weight.shape)}, but got 4-dimensional input of size {list(x.shape)} instead"
        )


def _wrong_length(name: str, values: Sequence[int]) -> str:
    hint = "; 4 values would be (top, bottom, left, right)" if name == "padding" else ""
    return (
        f"expected {name} to be a single integer value or a list of 2 values to match the convolution "
        f"dimensions, but got {name}={list(values)}{hint}"
    )


def _check_types(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("bias", bias), ("weight", weight)):
        if tensor is None:
            continue
        if tensor.device.type != x.device.type:
            raise RuntimeError(
                f"Input type ({x.type()}) and {name} type ({tensor.type()}) should be the same"
            )
        _check_device(tensor, name, x)
    if bias is not None and bias.dtype != x.dtype:
        raise RuntimeError(
            f"Input type ({_cpp_name(x)}) and bias type ({_cpp_name(bias)}) should be the same"
        )
    if weight.dtype != x.dtype:
        raise RuntimeError(f"Input type ({x.type()}) and weight type ({weight.type()}) should be the same")


def _check_device(tensor: Tensor, name: str, x: Tensor) -> None:
    if tensor.device != x.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but got {name} is on {tensor.device}, "
            f"different from other tensors on {x.device}"
        )


def _check_geometry(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> None:
    if groups <= 0:
        raise RuntimeError(f"non-positive groups is not supported, but got groups={groups}")
    for name, values in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        if len(values) != 2 and not (name == "padding" and len(values) == 4):
            raise RuntimeError(_wrong_length(name, values))
    if any(value < 0 for value in padding):
        raise RuntimeError(f"negative padding is not supported, but got padding={list(padding)}")
    if any(value > _MOST_PADDING for value in padding):
        raise RuntimeError(f"padding should be at most {_MOST_PADDING}, but got padding={list(padding)}")
    if any(value <= 0 for value in stride):
        raise RuntimeError(f"non-positive stride is not supported, but got stride={list(stride)}")
    if any(value <= 0 for value in dilation):
        raise RuntimeError(
            "dilation should be greater than zero (non-positive dilation is not supported), "
            f"but got dilation={list(dilation)}"
        )


def _check_channels(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    size = list(weight.shape)
    if weight.shape[2] == 0 or weight.shape[3] == 0:
        raise RuntimeError(
            f"the filter should have at least one row and column, but got weight of size {size}"
        )
    if weight.shape[0] < groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, "
            f"but got weight of size {size} instead"
        )
    if weight.shape[0] % groups != 0:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
            f"but got weight of size [{size}] instead"
        )
    if x.shape[1] != weight.shape[1] * groups:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {size}, expected input{list(x.shape)} to have "
            f"{weight.shape[1] * groups} channels, but got {x.shape[1]} channels instead"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise RuntimeError(
            f"Given weight of size {size}, expected bias to be 1-dimensional with {weight.shape[0]} "
            f"elements, but got bias of size {list(bias.shape)} instead"
        )


def _check_norm(
    x: Tensor,
    channels: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:
    given = {
        name: vector
        for name, vector in (
            ("norm_weight", norm_weight),
            ("norm_bias", norm_bias),
            ("running_mean", running_mean),
            ("running_var", running_var),
        )
        if vector is not None
    }
    if given and (running_mean is None or running_var is None):
        raise RuntimeError(
            "running_mean and running_var must both be given for a norm, and both be None without one, "
            f"but of the norm vectors only {', '.join(given)} were given"
        )
    for name, vector in given.items():
        _check_device(vector, name, x)
        if vector.dim() != 1 or vector.shape[0] != channels:
            raise RuntimeError(
                f"{name} should contain {channels} elements, one per output channel, "
                f"but got {name} of size {list(vector.shape)}"
            )
    dtypes = {vector.dtype for vector in given.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, x.dtype}:
        described = ", ".join(f"{name}: {vector.dtype}" for name, vector in given.items())
        raise RuntimeError(
            f"the norm vectors should all be torch.float32 or all have the input's {x.dtype}, "
            f"but got {described}"
        )


def _check_activation(act: str, act_params: Sequence[float]) -> None:
    row = ACTIVATIONS.get(act)
    if row is None:
        raise RuntimeError(f"unknown activation '{act}'; known are {', '.join(ACTIVATIONS)}")
    if len(act_params) != len(row.params):
        expected = (
            f"{len(row.params)} act_params ({', '.join(row.params)})" if row.params else "no act_params"
        )
        raise RuntimeError(f"activation '{act}' takes {expected}, but got {list(act_params)}")


def check_residual_order(residual_order: str) -> None:
    """Refuse an unknown ``residual_order``."""
    if residual_order not in RESIDUAL_ORDERS:
        raise RuntimeError(
            f"unknown residual_order '{residual_order}'; known are {', '.join(RESIDUAL_ORDERS)}"
        )


def check_residual(residual: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Refuse a residual that has not the output's shape and the dtype and device of ``like``."""
    if residual.shape != shape:
        raise RuntimeError(
            f"residual should have the output's size {list(shape)}, "
            f"but got residual of size {list(residual.shape)}"
        )
    if residual.dtype != like.dtype:
        raise RuntimeError(
            f"residual should have the output's dtype {like.dtype}, "
            f"but got residual of dtype {residual.dtype}"
        )
    _check_device(residual, "residual", like)


def check_out(out: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Refuse memory for the output that has not its shape and the dtype and device of ``like``."""
    if out.shape != shape:
        raise RuntimeError(
            f"out should have the output's size {list(shape)}, but got out of size {list(out.shape)}"
        )
    if out.dtype != like.dtype:
        raise RuntimeError(
            f"out should have the output's dtype {like.dtype}, which under autocast is that of autocast, "
            f"but got out of dtype {out.dtype}"
        )
    _check_device(out, "out", like)


def pair(value: Any, name: str) -> tuple[int, int]:
    """An int or a sequence of one or two ints, as (height, width).

    Raises:
        RuntimeError: another number of entries, in the words of torch's conv2d.
        TypeError: an entry is not an integer.
    """
    entries = _integers(value, name)
    if len(entries) == 1:
        return entries[0], entries[0]
    if len(entries) != 2:
        raise RuntimeError(_wrong_length(name, entries))
    return entries[0], entries[1]


def _integers(value: Any, name: str) -> tuple[int, ...]:
    entries = value if isinstance(value, (tuple, list)) else (value,)
    return tuple([_integer(entry, name, value) for entry in entries])


def _integer(entry: Any, name: str, value: Any) -> Any:
    if isinstance(entry, torch.SymInt) or type(entry) is int:
        return entry
    if isinstance(entry, bool) or not hasattr(entry, "__index__"):
        raise TypeError(f"{name} must be an int or a sequence of ints, but got {value!r}")
    return to_int(entry)


def explicit_padding(
    padding: Any, filter_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Any padding that the front takes, as (height, width) or (top, bottom, left, right).

    Raises:
        RuntimeError: an unknown word, or "same" with a stride, in the words of torch's conv2d.
        TypeError: an entry is not an integer.
    """
    if not isinstance(padding, str):
        entries = _integers(padding, "padding")
        return entries if len(entries) == 4 else pair(entries, "padding")
    if padding == "valid":
        return 0, 0
    if padding != "same":
        raise RuntimeError(f"Invalid padding string: '{padding}'; known are 'same' and 'valid'")
    if stride[0] != 1 or stride[1] != 1:
        raise RuntimeError(
            f"padding='same' is not supported for strided convolutions, but got stride={list(stride)}"
        )
    height, width = (dilation[i] * (filter_size[i] - 1) for i in range(2))
    return height // 2, height - height // 2, width // 2, width - width // 2


def unsqueeze(
    x: Tensor, residual: Tensor | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """An input without batch dimension, its residual and the memory for its output, as a batch of one.

    Raises:
        RuntimeError: the residual or the memory has not three dimensions as well.
    """
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None and tensor.dim() != 3:
            raise RuntimeError(
                f"{name} should have the output's size, which is [K, P, Q] for an input of size "
                f"{list(x.shape)}, but got {name} of size {list(tensor.shape)}"
            )
    return (
        x.unsqueeze(0),
        None if residual is None else residual.unsqueeze(0),
        None if out is None else out.unsqueeze(0),
    )
