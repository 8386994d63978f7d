"""``ConvNormAct``: the drop-in module."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_cna import _arrangement, eager, layers, ops
from fused_cna._checks import RESIDUAL_ORDERS, check_residual_order, explicit_padding, pair, unsqueeze

# What a norm or activation set to None after construction stands for.
_NOTHING = nn.Identity().eval()

_NO_PAD = (0, 0, 0, 0)

_suggested_inference_mode = False


def _conv_tensors(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias; where possible past ``nn.Module.__getattr__``, which costs half a microsecond each."""
    parameters: dict[str, Any] = conv._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return conv.weight, conv.bias


def fused_epilogue(module: "ConvNormAct", with_residual: bool) -> tuple[bool, str, str | None]:
    """What is fused with the convolution: whether a norm, which activation, and in which order a residual."""
    fusible = layers.epilogue(module.norm, module.act, module.residual_order)
    if fusible is None:
        return False, "identity", None
    vectors, act, order = fusible
    fuses_residual = with_residual and (act is not None or order == "add_act")
    return (
        vectors is not layers.NO_NORM,
        "identity" if act is None else act[0],
        order if fuses_residual else None,
    )


def _as_pair(value: Any, name: str) -> Any:
    """A size as the operator takes it; a pair, which is what nn.Conv2d holds, costs nothing."""
    return value if type(value) is tuple and len(value) == 2 else pair(value, name)


def _check_groups(in_channels: int, out_channels: int, groups: int) -> None:
    if groups <= 0:
        raise ValueError(f"groups must be a positive integer, but got {groups}")
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups != 0:
            raise ValueError(
                f"{name} must be divisible by groups, but got {name}={channels} and groups={groups}"
            )


def _make(factory: Callable[..., Any] | None, name: str, *args: int) -> nn.Module:
    if factory is None:
        return nn.Identity()
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"{name} must be a class, a factory or None, but got {factory!r}; "
            "ConvNormAct.from_modules takes modules that exist already"
        )
    made = factory(*args)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{name} must make an nn.Module, but {factory!r} made {made!r}")
    return made


class ConvNormAct(nn.Module):
    """``act(norm(conv(x)))``, as one CUDA kernel where it can be.

    Equivalent to::

        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.norm = norm(out_channels)
        self.act = act()
        y = self.act(self.norm(self.conv(x)))

    with the same ``state_dict``, the same initialisation, and the same results in training and in eval mode.
    ``nn.BatchNorm2d`` and ``nn.SyncBatchNorm`` with running statistics and the activations of
    :func:`fused_cna.conv_norm_act` are fused with the convolution. Any other norm or activation runs as it
    is after the fused rest. Nothing derived from a parameter is kept: whatever changes one is seen by the
    next call.

    It runs eagerly, one PyTorch operation after another, in training mode, where a gradient is wanted, with
    hooks on a submodule, with a ``conv`` of a subclass of ``nn.Conv2d`` (parametrizations are understood),
    and on every device but CUDA ones; :func:`fused_cna.conv_norm_act` says what on CUDA tensors cannot be
    fused. In eval mode on a GPU, with grad mode on and only parameters that require a gradient, it says once
    that ``torch.inference_mode()`` makes it fast.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, padding_mode, device, dtype:
            as for ``nn.Conv2d``.
        padding: as for ``nn.Conv2d``; None for ``dilation * (kernel_size - 1) // 2``, which keeps the size of
            the image where the filter is odd and the stride is 1.
        norm: called as ``norm(out_channels)``; None for no norm.
        act: called as ``act()``; None for no activation.
        residual_order: "add_act" for ``act(norm(conv(x)) + residual)``, "act_add" for
            ``act(norm(conv(x))) + residual``.

    Shape:
        x: [N, C, H, W] or [C, H, W]. residual and result: [N, K, P, Q] or [K, P, Q].

    Raises:
        ValueError: channels that ``groups`` does not divide, an unknown ``residual_order``, and what
            ``nn.Conv2d`` refuses.
        TypeError: ``norm`` or ``act`` is a module rather than something that makes one.
    """

    conv: nn.Conv2d
    norm: nn.Module
    act: nn.Module
    residual_order: str
    zero_pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Zeros around x besides those of ``conv``: (top, bottom, left, right); negative ones crop."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        norm: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        act: Callable[..., nn.Module] | None = nn.ReLU,
        *,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        residual_order: str = "add_act",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_groups(in_channels, out_channels, groups)
        if residual_order not in RESIDUAL_ORDERS:
            raise ValueError(f"residual_order must be one of {RESIDUAL_ORDERS}, but got {residual_order!r}")
        if padding is None:
            filter_size, spacing = pair(kernel_size, "kernel_size"), pair(dilation, "dilation")
            padding = (spacing[0] * (filter_size[0] - 1) // 2, spacing[1] * (filter_size[1] - 1) // 2)
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.norm = _make(norm, "norm", out_channels)
        self.act = _make(act, "act")
        # Moving tensors to where they are is refused under FakeTensorMode.
        if device is not None or dtype is not None:
            self.norm.to(device=device, dtype=dtype)
            self.act.to(device=device, dtype=dtype)
        self.residual_order = residual_order

    @classmethod
    def from_modules(
        cls,
        conv: nn.Conv2d,
        norm: nn.Module | None = None,
        act: nn.Module | None = None,
        *,
        residual_order: str = "add_act",
    ) -> "ConvNormAct":
        """A fused module of modules that exist already, which it shares: their parameters are its own.

        It is in training mode if ``conv`` is. None stands for ``nn.Identity()``.

        Raises:
            TypeError: ``conv`` is no ``nn.Conv2d``, or ``norm`` or ``act`` is no module.
            ValueError: an unknown ``residual_order``.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, but got {type(conv).__name__}")
        for name, part in (("norm", norm), ("act", act)):
            if part is not None and not isinstance(part, nn.Module):
                raise TypeError(f"{name} must be an nn.Module or None, but got {part!r}")
        if residual_order not in RESIDUAL_ORDERS:
            raise ValueError(f"residual_order must be one of {RESIDUAL_ORDERS}, but got {residual_order!r}")
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        fused.conv = conv
        fused.norm = nn.Identity().train(conv.training) if norm is None else norm
        fused.act = nn.Identity().train(conv.training) if act is None else act
        fused.residual_order = residual_order
        fused.training = conv.training
        return fused

    def extra_repr(self) -> str:
        return "" if self.residual_order == "add_act" else f"residual_order={self.residual_order!r}"

    def forward(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """``act(norm(conv(x)))``, with ``residual`` added where ``residual_order`` says.

        ``out`` is where to write the result, and then what is returned: :func:`fused_cna.conv_norm_act` says
        which memory it takes. What cannot be fused whole is copied there.

        Raises:
            RuntimeError: whatever ``nn.Conv2d`` refuses; a residual or an ``out`` that has not the shape,
                dtype and device of the output; ``out`` where a gradient is wanted, or with elements of an
                input in it; with ``fused_cna.config.strict`` any call on CUDA tensors that cannot be fused.
        """
        if out is None:
            call = None if torch.compiler.is_compiling() else _arrangement.calls.get(id(self))
            if call is not None:
                y = call(self, x, residual)
                if y is not NotImplemented:
                    return y  # type: ignore[no-any-return]
            return self._compute(x, residual, None)
        if not isinstance(out, Tensor):
            raise TypeError(f"out must be a Tensor or None, but got {type(out).__name__}")
        y = self._compute(x, residual, out)
        return out if y is out else ops.copy_into(out, y, x, residual)

    def _compute(self, x: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        """The result; it is ``out`` only where that is what a fused call has written."""
        parts = self._modules
        conv: Any = parts["conv"]
        norm: Any = _NOTHING if parts["norm"] is None else parts["norm"]
        act: Any = _NOTHING if parts["act"] is None else parts["act"]
        if not isinstance(x, Tensor):
            return self._compute_by_submodules(x, residual, conv, norm, act)
        if x.dim() == 3:
            x, residual, batch_out = unsqueeze(x, residual, out)
            y = self._compute(x, residual, batch_out)
            return out if out is not None and y is batch_out else y.squeeze(0)
        if (
            self.training
            or norm.training
            or layers.has_hooks(conv)
            or layers.has_hooks(norm)
            or layers.has_hooks(act)
            or layers.has_global_hooks()
            or (type(conv) is not nn.Conv2d and not layers.is_conv(conv))
            or (norm._modules and any(map(layers.has_hooks, norm._modules.values())))
        ):
            return self._compute_by_submodules(x, residual, conv, norm, act)
        return self._compute_fused(x, residual, conv, norm, act, out)

    def _pad(self, x: Tensor) -> Tensor:
        if not any(self.zero_pad):
            return x
        top, bottom, left, right = self.zero_pad
        return F.pad(x, (left, right, top, bottom))

    def _compute_by_submodules(
        self, x: Tensor, residual: Tensor | None, conv: Any, norm: Any, act: Any
    ) -> Tensor:
        x = self._pad(x)
        return self._finish(norm(conv(x)), residual, act)

    def _finish(self, z: Tensor, residual: Tensor | None, act: Any) -> Tensor:
        if residual is None:
            return act(z)
        check_residual_order(self.residual_order)
        if self.residual_order == "add_act":
            return act(eager.add_residual(z, residual))
        return eager.add_residual(act(z), residual)

    def _compute_fused(
        self, x: Tensor, residual: Tensor | None, conv: Any, norm: Any, act: Any, out: Tensor | None
    ) -> Tensor:
        """One call for the convolution and all behind it that can be fused with it, then the rest."""
        compute: Callable[..., Tensor] = eager.conv_norm_act
        kernel, given = (x.is_cuda or ops.operator_everywhere) and ops.takes_kernel(x), x
        if kernel:
            compute = ops.operator
            if torch.is_grad_enabled():
                self._suggest_inference_mode(x, residual)
        weight, bias = _conv_tensors(conv)
        x, convolution = self.pad_and_sizes(x, conv, weight)

        fusible = layers.epilogue(norm, act, self.residual_order)
        if fusible is None:
            z = compute(x, weight, bias, *layers.NO_NORM, *convolution, "identity", (), None, "add_act")
            return self._finish(norm(z), residual, act)
        vectors, described, order = fusible
        if described is not None:
            arguments = (x, weight, bias, *vectors, *convolution, *described, residual, order)
            if out is not None:
                return ops.write_into(out, arguments, kernel=kernel)
            if kernel and x is given and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                _arrangement.keep(self, arguments)
            return compute(*arguments)
        if order == "add_act":
            return act(compute(x, weight, bias, *vectors, *convolution, "identity", (), residual, order))
        z = compute(x, weight, bias, *vectors, *convolution, "identity", (), None, order)
        return self._finish(z, residual, act)

    def pad_and_sizes(self, x: Tensor, conv: Any, weight: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """``x`` with the padding that no kernel does; the operator's stride, padding, dilation and groups."""
        stride, dilation = _as_pair(conv.stride, "stride"), _as_pair(conv.dilation, "dilation")
        padding = conv.padding
        if self.zero_pad != _NO_PAD:
            x, padding = self._pad_before(x, padding, conv)
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode)
            padding = (0, 0)
        elif type(conv) is not nn.Conv2d and layers.pads_same(conv):
            padding = layers.same_padding(x.shape[2:], weight.shape[2:], stride, dilation)
        elif type(padding) is not tuple or len(padding) not in (2, 4):
            padding = explicit_padding(padding, weight.shape[2:], stride, dilation)
        return x, (stride, padding, dilation, conv.groups)

    def _pad_before(self, x: Tensor, padding: Any, conv: Any) -> tuple[Tensor, Any]:
        """``zero_pad`` as more padding of the convolution where that is of zeros too, else around ``x``."""
        if (
            min(self.zero_pad) < 0
            or conv.padding_mode != "zeros"
            or isinstance(padding, str)
            or layers.pads_same(conv)
        ):
            return self._pad(x), padding
        top, bottom, left, right = self.zero_pad
        height, width = _as_pair(padding, "padding")
        return x, (top + height, bottom + height, left + width, right + width)

    def _suggest_inference_mode(self, x: Tensor, residual: Tensor | None) -> None:
        global _suggested_inference_mode
        if _suggested_inference_mode or torch.compiler.is_compiling():
            return
        if x.requires_grad or (residual is not None and residual.requires_grad):
            return
        if any(parameter.requires_grad for parameter in self.parameters()):
            _suggested_inference_mode = True
            warnings.warn(
                "ConvNormAct runs in eval mode but eagerly, because its parameters require gradients; inside "
                "torch.inference_mode() (or torch.no_grad()) it runs as one fused kernel",
                stacklevel=7,
            )
