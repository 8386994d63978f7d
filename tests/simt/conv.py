"""The operator with its kernels simulated: below the Python checks it runs the very code of the GPU path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_cna import ops
from fused_cna._checks import check_arguments, check_out, explicit_padding, pair, unsqueeze
from fused_cna._memory import check_out_memory
from fused_cna.problem import four_pads
from tests.simt import binding

DTYPES = {torch.float32: b"float32", torch.float16: b"float16", torch.bfloat16: b"bfloat16"}

# A signalling NaN: no arithmetic and no conversion returns one, so what has these bits was never written.
_UNWRITTEN = {
    torch.float32: (torch.int32, 0x7FA5A5A5),
    torch.float16: (torch.int16, 0x7DA5),
    torch.bfloat16: (torch.int16, 0x7FA5),
}

# Elements before and behind the output that no kernel may touch; a multiple of 16 bytes.
_MARGIN = 64


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "identity",
    act_params: Sequence[float] = (),
    residual: Tensor | None = None,
    residual_order: str = "add_act",
    out: Tensor | None = None,
    plan: str = "",
    device: str = "H100",
    allow_tf32: bool = False,
    seed: int = 0,
    starts_early: bool = False,
    sanitized: bool = False,
) -> Tensor:
    """`fused_cna.conv_norm_act` with the CUDA kernel simulated; no gradient flows through it.

    Args:
        x, weight, ..., out: as `fused_cna.conv_norm_act` takes them, on the CPU. The kernel writes to memory
            laid out and aligned like `out`, which is copied there once nothing else was touched.
        plan: what to run instead of the plan that is estimated to be the fastest, by the name that
            `fused_cna._C.plan` prints or its beginning, as long as it is clear: "direct",
            "implicit_gemm_sm80 64x64x32", "implicit_gemm_sm80 64x64x32 split 2 masked".
        device: whose plan: a name of csrc/plan/device.h.
        allow_tf32: whether float32 products may be rounded to tf32, for which PyTorch has a global switch.
        seed: chooses the order of threads and blocks, and what shared memory holds before it is written: NaN
            where it is even, large numbers where it is odd. A right kernel gives the same bits for all.
        starts_early: every launch begins before the kernel ahead of it has ended; until a kernel has waited
            for that, all tensors and the workspace hold NaN, and nothing may be written.
        sanitized: run in a process built with AddressSanitizer and UndefinedBehaviorSanitizer, every tensor
            in a heap block of exactly its size, so that an access one element outside is reported. Slower.

    Returns:
        `out`, or [N, K, P, Q], or [K, P, Q] for an input [C, H, W], with the strides that the operator gives.

    Raises:
        RuntimeError: bad arguments, as from the operator; a device other than the CPU; a dtype that has no
            kernels; a plan that does not exist.
        SimulatorError: the kernel broke a rule, wrote around or between its output's elements, or left some
            unwritten.
    """
    batch_out, unbatched = out, x.dim() == 3
    if unbatched:
        x, residual, batch_out = unsqueeze(x, residual, out)
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    padding = explicit_padding(padding, weight.shape[2:], stride, dilation)
    vectors = (bias, norm_weight, norm_bias, running_mean, running_var)
    shape = check_arguments(
        x, weight, *vectors, eps, stride, padding, dilation, groups, act, act_params, residual, residual_order
    )
    _check_simulable(x)
    if batch_out is None:
        result = ops._empty_output(x, weight, shape)
    else:
        result = batch_out
        check_out(result, shape, x)
        named = dict(zip(("x", "weight", *binding.VECTORS), (x, weight, *vectors), strict=True))
        check_out_memory(result, {**named, "residual": residual})

    output = _Output(result)
    if residual is not None and residual.data_ptr() == result.data_ptr():
        residual = output.y.copy_(residual)
    if output.y.numel() > 0:
        call = binding.ConvCall(
            residual=_view(residual),
            y=_view(output.y),
            eps=eps,
            act_param=act_params[0] if act_params else 0.0,
            seed=seed,
            starts_early=starts_early,
            norm_is_float32=running_mean is not None and running_mean.dtype == torch.float32,
            act=act.encode(),
            residual_order=residual_order.encode(),
            plan=plan.encode(),
            **_geometry(x, weight, stride, padding, dilation, groups, device, allow_tf32),
        )
        dense = [None if vector is None else vector.contiguous() for vector in vectors]
        call.vectors = tuple(0 if vector is None else vector.data_ptr() for vector in dense)
        chosen = binding.plan_conv(call)
        dense_x = _dense_channels_last(x) if chosen.convert_x else None
        dense_weight = _dense_channels_last(weight) if chosen.convert_weight else None
        call.dense_x, call.dense_weight = _view(dense_x), _view(dense_weight)
        if sanitized:
            given = (x, weight, dense_x, dense_weight, residual, *dense, output.y)
            memory = [_memory(tensor) for tensor in given if tensor is not None]
            output.load(binding.run_conv_sanitized(call, memory))
        else:
            binding.run_conv(call)
    output.check()
    result.copy_(output.y)
    if out is not None:
        return out
    return result.squeeze(0) if unbatched else result


def list_plans(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    device: str = "H100",
    allow_tf32: bool = False,
) -> list[str]:
    """Every name that `conv_norm_act` takes as `plan` for these tensors, the fastest by estimate first."""
    call = binding.ConvCall(
        act=b"identity",
        residual_order=b"add_act",
        **_geometry(x, weight, stride, padding, dilation, groups, device, allow_tf32),
    )
    return binding.list_plans(call)


def _geometry(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    device: str,
    allow_tf32: bool,
) -> dict[str, Any]:
    """The fields of ConvCall that a plan depends on."""
    return {
        "x": _view(x),
        "weight": _view(weight),
        "stride": tuple(stride),
        "padding": four_pads(padding),
        "dilation": tuple(dilation),
        "groups": groups,
        "dtype": DTYPES[x.dtype],
        "device": device.encode(),
        "allow_tf32": allow_tf32,
    }


class _Output:
    """Memory for a kernel's output, laid out and aligned like `model`: poisoned, with poisoned margins."""

    def __init__(self, model: Tensor) -> None:
        self.bits, self.poison = _UNWRITTEN[model.dtype]
        self.start = _MARGIN + model.data_ptr() % 16 // model.element_size()
        extent = _extent(model)
        length = self.start + extent + _MARGIN
        self.whole = torch.full((length,), self.poison, dtype=self.bits).view(model.dtype)
        self.inner = self.whole[self.start : self.start + extent]
        self.y = self.inner.as_strided(model.shape, model.stride())

    def load(self, result: bytes) -> None:
        self.inner.copy_(torch.frombuffer(bytearray(result), dtype=self.inner.dtype))

    def check(self) -> None:
        """Refuses an output that is not whole, and writes around or between its elements."""
        outside = torch.ones(self.whole.shape, dtype=torch.bool)
        outside.as_strided(self.y.shape, self.y.stride(), self.start).fill_(False)
        touched = ((self.whole.view(self.bits) != self.poison) & outside).nonzero().flatten().tolist()
        if touched:
            raise binding.SimulatorError(
                f"the kernel wrote {len(touched)} elements outside its output of {self.inner.numel()}: "
                f"the first at {self._place(touched[0])}"
            )
        unwritten = (self.y.view(self.bits) == self.poison).nonzero().tolist()
        if unwritten:
            raise binding.SimulatorError(
                f"the kernel left {len(unwritten)} of {self.y.numel()} output elements unwritten, "
                f"the first at [n, k, p, q] = {unwritten[0]}"
            )

    def _place(self, position: int) -> str:
        position -= self.start
        behind = position - self.inner.numel()
        if behind >= 0:
            return f"{behind} from its end"
        return f"{position} from its start" + (", between its elements" if position >= 0 else "")


def _check_simulable(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise RuntimeError(
            f"the simulator runs on the CPU's memory, but x is on {x.device}; move it with .cpu()"
        )
    if x.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise RuntimeError(f"the simulated kernels have {known}, but x is {x.dtype}; convert it")


def _view(tensor: Tensor | None) -> binding.TensorView:
    if tensor is None:
        return binding.TensorView()
    return binding.TensorView(tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))


def _dense_channels_last(tensor: Tensor) -> Tensor:
    """A copy whose strides are those of channels_last also where torch would leave them to chance."""
    _, c, h, w = tensor.shape
    return torch.empty_strided(tensor.shape, (h * w * c, 1, w * c, c), dtype=tensor.dtype).copy_(tensor)


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last, whatever lies between."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _memory(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), _extent(tensor) * tensor.element_size()
