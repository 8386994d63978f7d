"""What a layer must compute and move, and how fast this device can do either."""

import math
from dataclasses import asdict, dataclass

import torch

from bench.layer_list import Layer
from bench.setting import Precision
from bench.timing import Work, interleaved, stopwatch_for

NORM_VECTORS = 4
CEILING_LIMIT_SECONDS = 2.0


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run: bytes read plus written per second, floating-point operations per second."""

    bytes_per_second: float
    flops_per_second: float
    copied_bytes: int
    matrix_size: int
    matrix_precision: str

    def as_json(self) -> dict[str, float | int | str]:
        return asdict(self)


@dataclass(frozen=True)
class Floor:
    """The least time a layer can take under the ceilings, and which of the two sets it."""

    seconds: float
    bound: str


def flops(layer: Layer, batch: int) -> int:
    """Two per multiply-add of the convolution; norm, residual and activation are not counted."""
    outputs = batch * layer.cout * layer.out_h * layer.out_w
    return 2 * outputs * (layer.cin // layer.groups) * layer.kh * layer.kw


def least_bytes(layer: Layer, batch: int, itemsize: int) -> int:
    """Bytes a layer cannot avoid: input, weight, vectors and residual read once, the output written once.

    Input rows and columns that no filter tap meets (a strided 1x1) are not counted.
    """
    rows = _touched(layer.h, layer.out_h, layer.stride_h, layer.pad_h, layer.dil_h, layer.kh)
    columns = _touched(layer.w, layer.out_w, layer.stride_w, layer.pad_w, layer.dil_w, layer.kw)
    read = batch * layer.cin * rows * columns
    weight = layer.cout * (layer.cin // layer.groups) * layer.kh * layer.kw
    output = batch * layer.cout * layer.out_h * layer.out_w
    residual = output if layer.residual_order else 0
    vectors = layer.cout * (NORM_VECTORS * layer.has_norm + layer.conv_bias)
    return itemsize * (read + weight + output + residual + vectors)


def _touched(size: int, outputs: int, stride: int, pad: int, dilation: int, taps: int) -> int:
    positions = {out * stride - pad + tap * dilation for out in range(outputs) for tap in range(taps)}
    return sum(0 <= position < size for position in positions)


def floor(layer: Layer, batch: int, itemsize: int, ceilings: Ceilings) -> Floor:
    """max(FLOPs / peak, bytes / bandwidth)."""
    matrix = flops(layer, batch) / ceilings.flops_per_second
    memory = least_bytes(layer, batch, itemsize) / ceilings.bytes_per_second
    return Floor(matrix, "matrix") if matrix > memory else Floor(memory, "memory")


def measure_ceilings(
    device: torch.device, precision: Precision, *, seed: int, small: bool = False
) -> Ceilings:
    """A large copy (bytes read plus written) and a large square matrix product, on random data.

    The fastest sample of each counts: a ceiling is what the device can do, not what other work left of it.
    `small` is for tests of the arithmetic: sizes that measure nothing.
    """
    copied, size = (
        ((1 << 16), 64) if small else ((1 << 30), 8192) if device.type == "cuda" else ((1 << 27), 1536)
    )
    dtype = precision.dtype
    generator = torch.Generator(device).manual_seed(seed)
    source = torch.randn(copied // dtype.itemsize, device=device, dtype=dtype, generator=generator)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    product = torch.empty_like(left)
    with precision.applied():
        samples = interleaved(
            {
                "copy": Work(lambda: target.copy_(source)),
                "matrix": Work(lambda: torch.mm(left, right, out=product)),
            },
            stopwatch_for(device),
            rounds=20,
            sample_seconds=0.0 if small else 0.02,
            limit_seconds=CEILING_LIMIT_SECONDS,
        )
    return Ceilings(
        bytes_per_second=2 * source.nbytes / min(samples["copy"]),
        flops_per_second=2 * size**3 / min(samples["matrix"]),
        copied_bytes=source.nbytes,
        matrix_size=size,
        matrix_precision=(device.type == "cuda" and precision.float32_products) or str(dtype)[6:],
    )


def share(floor_seconds: float, seconds: float) -> float:
    """Which part of the roofline a time reaches: 1.0 is the floor itself."""
    return floor_seconds / seconds if seconds > 0 else math.nan
