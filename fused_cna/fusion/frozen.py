"""``FrozenConv``: a snapshot of a ``ConvNormAct`` with the batch norm folded into its weight."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_cna import activation, eager, layers, modules, ops
from fused_cna._checks import explicit_padding, pair, unsqueeze
from fused_cna.fusion.folding import fold
from fused_cna.modules import ConvNormAct

# The attribute, scalars and algorithm by which oneDNN's operators know an activation. The others of
# activation.ACTIVATIONS run after the convolution, in its memory.
_ONEDNN_ACTIVATIONS: dict[str, tuple[str, tuple[float, ...], str]] = {
    "identity": ("none", (), ""),
    "relu": ("relu", (), ""),
    "relu6": ("hardtanh", (0.0, 6.0), ""),
    "leaky_relu": ("leaky_relu", (), ""),
    "silu": ("swish", (), ""),
    "gelu": ("gelu", (), "none"),
    "gelu_tanh": ("gelu", (), "tanh"),
    "hardswish": ("hardswish", (), ""),
    "hardsigmoid": ("hardsigmoid", (), ""),
    "sigmoid": ("sigmoid", (), ""),
    "tanh": ("tanh", (), ""),
}

# The activations that oneDNN's convolution can apply after adding a residual.
_ONEDNN_ADD_ACTIVATIONS = {"identity": None, "relu": "relu"}

_ONEDNN_OPERATORS = (
    "_convolution_pointwise",
    "_convolution_pointwise_",
    "_reorder_convolution_weight",
    "_get_mkldnn_serialized_md",
)


# A weight packed for another shape of input is right, but repacked inside every call, which costs more than
# the convolution. Shapes that want the same layout share one packed weight.
_MOST_SHAPES = 16


class _Packed(NamedTuple):
    """A weight in the layouts that oneDNN wants for the shapes of input seen last."""

    source: Tensor
    """The dense weight they were made of: moving a module or casting it puts another in its place."""
    by_shape: dict[torch.Size, Tensor]


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in _ONEDNN_OPERATORS
    )


def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that oneDNN convolves on this machine."""
    if not _has_onednn():
        return ()
    dtypes = [torch.float32]
    for dtype, name in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    ):
        if hasattr(torch.ops.mkldnn, name) and getattr(torch.ops.mkldnn, name)():
            dtypes.append(dtype)
    return tuple(dtypes)


_ONEDNN_DTYPES = _onednn_dtypes()
if _ONEDNN_DTYPES:
    _convolution = torch.ops.mkldnn._convolution_pointwise.default
    _convolution_add = torch.ops.mkldnn._convolution_pointwise.binary
    _convolution_add_ = torch.ops.mkldnn._convolution_pointwise_.binary
    _reorder = torch.ops.mkldnn._reorder_convolution_weight.default
    _layout = torch.ops.mkldnn._get_mkldnn_serialized_md.default


def is_plain(tensor: Any, dtype: torch.dtype) -> bool:
    """Whether an operator without derivative, batching rule or fake kernel may see the tensor.

    Subclasses, among them the fake tensors of a compiler, are not plain.
    """
    return (
        (type(tensor) is Tensor or type(tensor) is nn.Parameter)
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def runs_onednn() -> bool:
    """Whether a call may go to oneDNN's own operators, which know no autocast."""
    return eager.is_plain_call() and torch._C._get_mkldnn_enabled() and not torch.is_autocast_enabled("cpu")


def _obstacle(block: ConvNormAct, parts: Sequence[nn.Module]) -> str:
    """Why a block cannot be folded; empty if it can."""
    conv, norm, _ = parts
    if block.training or norm.training:
        return "it is in training mode; call eval() first"
    for name, part in zip(("conv", "norm", "act"), parts, strict=True):
        if any(map(layers.has_hooks, part.modules())):
            return f"its {name} has hooks, which a snapshot would not run; remove them first"
    if not layers.is_conv(conv):
        return f"conv is a {type(conv).__name__}, which may compute something else than nn.Conv2d"
    if layers.epilogue(norm, parts[2], block.residual_order) is None:
        return f"norm, a {type(norm).__name__}, is no batch norm with running statistics"
    return ""


def _convolve(convolution: tuple[Any, ...], act: str, act_params: Sequence[float]) -> Tensor:
    known = _ONEDNN_ACTIVATIONS.get(act)
    if known is None:
        return activation.apply(_convolution(*convolution, "none", (), ""), act, act_params, inplace=True)
    name, scalars, algorithm = known
    return _convolution(*convolution, name, scalars or act_params, algorithm)


class FrozenConv(nn.Module):
    """What a ``ConvNormAct`` computes in eval mode, with its parameters as they were: a snapshot.

    Equivalent to::

        weight, bias = fold(block.conv, block.norm)
        y = block.act(F.conv2d(x, weight, bias, ...))

    with the residual as the block adds it. On a CPU it is one oneDNN call with a weight that is packed at the
    first one, and the result is in channels_last. Where oneDNN has no such call, the gradient of ``x`` is
    wanted, autocast is on, or a compiler or another transform looks on, it is eager PyTorch on the folded
    weight. CUDA tensors go to the operator of :func:`fused_cna.conv_norm_act`.

    oneDNN's ReLU, ReLU6 and Hardsigmoid turn NaN into numbers, where PyTorch's keep it.

    ``weight`` and ``bias`` are buffers that ``state_dict`` does not have. They move and cast with the module
    and are copied and pickled; the packed weight is not, and made anew.

    Shape:
        x: [N, C, H, W] or [C, H, W]. residual and result: [N, K, P, Q] or [K, P, Q].
    """

    is_snapshot = True
    """Its tensors are its own, so they have to be moved with the network."""

    weight: Tensor
    bias: Tensor
    overwrites_residual: bool
    """Whether the sum may be computed in the memory of the residual, which saves the memory for another."""
    _packed: _Packed | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        stride: tuple[int, int],
        padding: tuple[int, ...],
        dilation: tuple[int, int],
        groups: int,
        border: tuple[Sequence[int], str] | None,
        zero_pad: tuple[int, int, int, int],
        pads_same: bool,
        act: nn.Module | tuple[str, tuple[float, ...]],
        residual_order: str,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.border, self.zero_pad, self.pads_same = border, zero_pad, pads_same
        self.residual_order = residual_order
        self.act_name, self.act_params = act if isinstance(act, tuple) else ("identity", ())
        self.act = None if isinstance(act, tuple) else act
        self.overwrites_residual = False
        self._packed = None
        self.eval()

    @classmethod
    def from_block(cls, block: ConvNormAct) -> "FrozenConv":
        """The snapshot of a block, which shares no tensor with it.

        Raises:
            TypeError: ``block`` is no ``ConvNormAct``.
            ValueError: it cannot be folded: it is in training mode, has hooks, or its convolution or norm is
                of a class that is not understood.
        """
        if not isinstance(block, ConvNormAct):
            raise TypeError(f"block must be a ConvNormAct, but got {type(block).__name__}")
        parts: list[Any] = [block._modules[name] or modules._NOTHING for name in ("conv", "norm", "act")]
        obstacle = _obstacle(block, parts)
        if obstacle:
            raise ValueError(f"cannot freeze this ConvNormAct: {obstacle}")
        conv, norm, act = parts
        # An inference tensor could not be saved for the gradient of x later.
        with torch.inference_mode(False):
            vectors, described, order = layers.epilogue(norm, act, block.residual_order)  # type: ignore[misc]
            weight, bias = fold(conv.weight, conv.bias, *vectors)
            act = copy.deepcopy(act) if described is None else described
        stride, dilation = pair(conv.stride, "stride"), pair(conv.dilation, "dilation")
        padding, border = explicit_padding(conv.padding, weight.shape[2:], stride, dilation), None
        if conv.padding_mode != "zeros":
            padding, border = (0, 0), (tuple(conv._reversed_padding_repeated_twice), conv.padding_mode)
        return cls(
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=conv.groups,
            border=border,
            zero_pad=block.zero_pad,
            pads_same=layers.pads_same(conv),
            act=act,
            residual_order=order,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenConv":
        self._packed = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        out_channels, channels, *filter_size = self.weight.shape
        return (
            f"{channels * self.groups}, {out_channels}, kernel_size={tuple(filter_size)}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"act={self.act_name!r}, residual_order={self.residual_order!r}"
        )

    def forward(self, x: Tensor, residual: Any = None) -> Tensor:
        """The block's result for its parameters as they were; a residual of another shape broadcasts.

        Raises:
            RuntimeError: whatever ``F.conv2d`` refuses.
        """
        if any(self.zero_pad):
            top, bottom, left, right = self.zero_pad
            x = F.pad(x, (left, right, top, bottom))
        if self.pads_same:
            x = self._pad_same(x)
        if residual is None or (self.act is None and self._fits(x, residual)):
            y = self._run(x, residual)
            return y if self.act is None else self.act(y)
        z = self._run(x, None, identity=self.residual_order == "add_act")
        if self.residual_order == "act_add":
            return (z if self.act is None else self.act(z)) + residual
        z = z + residual
        return activation.apply(z, self.act_name, self.act_params) if self.act is None else self.act(z)

    def _pad_same(self, x: Tensor) -> Tensor:
        top, bottom, left, right = layers.same_padding(
            x.shape[-2:], self.weight.shape[2:], self.stride, self.dilation
        )
        return F.pad(x, (left, right, top, bottom)) if top + bottom + left + right else x

    def _fits(self, x: Tensor, residual: Any) -> bool:
        """Whether the residual has the shape, dtype and device of the result."""
        return (
            isinstance(residual, Tensor)
            and residual.dtype == x.dtype
            and not eager.is_autocast_enabled(x.device.type)
            and residual.device == x.device
            and residual.shape == (*x.shape[:-3], *self._output_shape(x, self._around()))
        )

    def _run(self, x: Tensor, residual: Tensor | None, identity: bool = False) -> Tensor:
        """Everything but an activation that is a module of its own; ``identity`` leaves out the other too."""
        act = ("identity", ()) if identity else (self.act_name, self.act_params)
        if self.border is not None:
            x = F.pad(x, *self.border)
        weight: Any = self._buffers["weight"]
        if (
            is_plain(x, weight.dtype)
            and x.dim() == 4
            and (residual is None or is_plain(residual, weight.dtype))
            and runs_onednn()
        ):
            packed_weight = self._packed_weight(weight, x)
            if packed_weight is not None:
                return self._run_onednn(x, packed_weight, residual, *act)
        return self._run_operator(x, weight, residual, *act)

    def _packed_weight(self, weight: Tensor, x: Tensor) -> Tensor | None:
        """The weight packed for the shape of ``x``; None where oneDNN does not take the two.

        Threads may pack the same at once: what they share is replaced whole, never written to.
        """
        packed = self._packed
        by_shape = packed.by_shape if packed is not None and packed.source is weight else {}
        if x.shape in by_shape:
            return by_shape[x.shape]
        padded, padding = eager._pad(x, self.padding) if len(self.padding) == 4 else (x, self.padding)
        if (
            not is_plain(weight, x.dtype)
            or x.dtype not in _ONEDNN_DTYPES
            or x.shape[1] != weight.shape[1] * self.groups
            or min(x.shape) == 0
            or min(self._output_shape(padded, padding)) <= 0
        ):
            return None
        fresh = _reorder(weight, padding, self.stride, self.dilation, self.groups, padded.shape)
        layout = _layout(fresh)
        for other in by_shape.values():
            if torch.equal(_layout(other), layout):
                fresh = other
                break
        kept = list(by_shape.items())[-(_MOST_SHAPES - 1) :]
        self._packed = _Packed(weight, {**dict(kept), x.shape: fresh})
        return fresh

    def _run_onednn(
        self, x: Tensor, weight: Tensor, residual: Tensor | None, act: str, act_params: Sequence[float]
    ) -> Tensor:
        padding = self.padding
        if len(padding) == 4:
            x, padding = eager._pad(x, padding)
        bias = self._buffers["bias"]
        convolution = (x, weight, bias, padding, self.stride, self.dilation, self.groups)
        if residual is None:
            return _convolve(convolution, act, act_params)
        if self.residual_order == "act_add":
            y = _convolve(convolution, act, act_params)
            return y.add_(residual)
        if act in _ONEDNN_ADD_ACTIVATIONS and self.groups == 1:
            post = ("add", 1.0, _ONEDNN_ADD_ACTIVATIONS[act], (), "")
            if self.overwrites_residual and residual.is_contiguous(memory_format=torch.channels_last):
                return _convolution_add_(residual, *convolution, *post)
            return _convolution_add(x, residual, *convolution[1:], *post)
        z = _convolve(convolution, "identity", ())
        return activation.apply(z.add_(residual), act, act_params, inplace=True)

    def _around(self) -> Sequence[int]:
        """What is around the image: (height, width) on both sides, or (top, bottom, left, right)."""
        if self.border is None:
            return self.padding
        left, right, top, bottom = self.border[0]
        return top, bottom, left, right

    def _output_shape(self, x: Tensor, padding: Sequence[int]) -> tuple[int, int, int]:
        """[K, P, Q] of the result."""
        weight = self.weight
        around = (
            (padding[0] + padding[1], padding[2] + padding[3])
            if len(padding) == 4
            else (2 * padding[0], 2 * padding[1])
        )
        sizes = [
            (x.shape[i - 2] + around[i] - self.dilation[i] * (weight.shape[2 + i] - 1) - 1) // self.stride[i]
            + 1
            for i in range(2)
        ]
        return weight.shape[0], sizes[0], sizes[1]

    def _run_operator(
        self, x: Tensor, weight: Tensor, residual: Tensor | None, act: str, act_params: Sequence[float]
    ) -> Tensor:
        run: Any = eager.conv_norm_act
        unbatched = False
        if isinstance(x, Tensor) and (x.is_cuda or ops.operator_everywhere) and ops.takes_kernel(x):
            run, unbatched = ops.operator, x.dim() == 3
            if unbatched:
                x, residual, _ = unsqueeze(x, residual)
        y = run(
            x,
            weight,
            self._buffers["bias"],
            *(None, None, None, None, 0.0),
            *(self.stride, self.padding, self.dilation, self.groups),
            *(act, act_params),
            *(residual, self.residual_order),
        )
        return y.squeeze(0) if unbatched else y
