"""A batch norm folded into the convolution before it."""

import torch
from torch import Tensor


def fold(
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The weight and bias of the one convolution that equals a convolution and the batch norm behind it.

    Computed in float64 and rounded once, to the dtype of ``weight``. The weight is in channels_last.

    Args:
        weight: [K, C / groups, R, S].
        bias, norm_weight, norm_bias, running_mean, running_var: [K] or None, as for
            :func:`fused_cna.conv_norm_act`.
        eps: added to the variance.

    Returns:
        Copies that share no memory with the arguments: [K, C / groups, R, S] and [K].
    """
    with torch.no_grad():
        folded = weight.double()
        shift = folded.new_zeros(weight.shape[0]) if bias is None else bias.double()
        if running_mean is not None and running_var is not None:
            scale = (running_var.double() + eps).rsqrt()
            if norm_weight is not None:
                scale = scale * norm_weight.double()
            folded = folded * scale[:, None, None, None]
            shift = (shift - running_mean.double()) * scale
            if norm_bias is not None:
                shift = shift + norm_bias.double()
        # A 1x1 weight counts as channels_last already and would keep its strides, which decide the layout
        # of the output.
        dense = torch.empty(
            weight.shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last
        )
        return dense.copy_(folded), shift.to(weight.dtype, copy=True)
