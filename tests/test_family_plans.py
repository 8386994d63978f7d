"""The plan of each kernel family: which layers it takes, why it refuses others, and how it cuts them."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

from fused_cna import ConvNormAct, ConvProblem, explain
from tests.families import BY_NAME, family_shape, laid_out
from tests.layouts import channels_last, taps_apart
from tests.reference import DTYPES, integer_problem
from tests.shapes import ConvShape, table
from tests.test_plan import DEVICES, real_layers

FLOAT32 = torch.float32


def layer(n: int, c: int, size: int, k: int, filter_size: int = 1, **options: Any) -> ConvProblem:
    """A convolution of square images, by a square filter."""
    return ConvProblem(n, c, size, size, k, filter_size, filter_size, **options)


MOBILE = layer(8, 96, 28, 96, 3, padding=1, groups=96)
CONVNEXT = layer(32, 384, 14, 384, 7, padding=3, groups=384)
RESNEXT = layer(8, 256, 28, 256, 3, padding=1, groups=32)
PATCHES = layer(8, 3, 224, 64, 7, stride=2, padding=3)
WIDE = layer(32, 256, 14, 256, 3, padding=1)


def having(problem: ConvProblem, **changes: Any) -> ConvProblem:
    return dataclasses.replace(problem, **changes)


def of_kernel(problem: ConvProblem, name: str, **options: Any) -> list[dict[str, Any]]:
    """The candidates whose name begins so."""
    found = [c for c in explain(problem, **options).candidates if c["name"].startswith(name)]
    assert found, f"there is no {name}"
    return found


def fastest(problem: ConvProblem, kernel: str, **options: Any) -> dict[str, Any]:
    """The kernel's fastest legal plan, by estimate."""
    return next(c for c in of_kernel(problem, kernel, **options) if not c["illegal"])


REFUSED = table("""
implicit_gemm_sm90 | 8x128x28x28 64x3x3 groups 4                  | groups have 32 channels
implicit_gemm_sm90 | 8x27x28x28 64x3x3                            | allow loads of 2 bytes
implicit_gemm_sm90 | 67108864x64x32x1 64x1x1                      | rows or blocks
depthwise          | 8x96x28x28 96x3x3 pad 1, groups 48           | one input channel a group, there are 2
depthwise          | 8x96x28x2147481648 96x3x3 stride 300, pad 1, groups 96 | ends at row or column 21474
depthwise          | 67108864x8x28x28 8x3x3 pad 1, groups 8       | strips or blocks
depthwise_toeplitz float32 | 32x384x14x14 384x7x7 pad 3, groups 384       | not float32
depthwise_toeplitz | 32x384x14x14 768x7x7 pad 3, groups 384       | 384 to 768 channels in 384 groups
depthwise_toeplitz | 32x384x14x14 384x7x7 pad 3, groups 192       | in 192 groups
depthwise_toeplitz | 32x384x14x14 384x7x7 stride 2, pad 3, groups 384 | strides and dilations must be 1
depthwise_toeplitz | 32x384x14x14 384x7x7 pad 3x6, dilate 1x2, groups 384 | strides and dilations must be 1
depthwise_toeplitz | 32x384x14x14 384x7x11 pad 3x5, groups 384    | 11 wide, it takes widths from 2 to 9
depthwise_toeplitz | 32x384x14x14 384x7x1 pad 3x0, groups 384     | 1 wide
depthwise_toeplitz | 32x27x14x14 27x7x7 pad 3, groups 27          | 27 channels allow loads of 2 bytes
depthwise_toeplitz | 32x384x400x14 384x399x7 pad 198x3, groups 384 | 399 rows, at most 128 rows
depthwise_toeplitz | 32x384x400x14 384x120x7 pad 60x3, groups 384 | bytes of shared memory, at most 232448
depthwise_toeplitz | 2147483648x16x1x1 16x7x7 pad 3, groups 16    | 2147483648 images
grouped            | 8x64x28x28 64x3x3 pad 1, groups 64           | one channel
grouped            | 8x48x28x28 64x3x3 pad 1, groups 16           | 3 channels
grouped            | 1x64x4x4 64x3x3 pad 536870912, dilate 536870912, groups 8 | it counts to
grouped            | 8x512x28x28 512x31x31 pad 15, groups 2       | shared memory
small_m            | 257x64x1x1 64x1x1                            | output pixels number 257, at most 256
implicit_gemm_fp32 | 32x256x14x14 256x3x3 pad 1                   | float16
implicit_gemm_tf32x3 | 32x256x14x14 256x3x3 pad 1                   | float16
implicit_gemm_tf32x3 float32 | 32x32x56x56 64x1x1                           | 32 products
implicit_gemm_sm80 | 8x27x28x28 64x3x3                            | 27 channels
stem               | 8x4x28x28 8x3x3 groups 2                     | 2 groups, at most 1 groups
stem               | 8x5x28x28 8x3x3                              | 5 channels, at most 4 channels
stem               | 1x3x8x3000 8x1x2500                          | shared memory
stem               | 1x3x1073741824x4 8x3x3 pad 1                 | rows or columns
stem               | 1024x3x2048x2048 8x1x1                       | tiles
""")
"""A kernel, a problem that none of its plans takes, and what one of the reasons says."""

PARTLY_REFUSED = table("""
depthwise          | 8x96x28x28 96x3x3 pad 1, groups 96       | takes 7x7 filters with stride 2 and dilation 1
depthwise | 8x96x28x28 96x3x3 pad 1, dilate 2, groups 96 | takes 3x3 filters with stride 1 and dilation 1
depthwise          | 8x96x28x28 192x3x3 pad 1, groups 96   | one output channel per input channel, there are 2
depthwise          | 8x27x28x28 27x3x3 pad 1, groups 27     | 27 channels allow loads of 2 bytes, this version
depthwise_toeplitz | 1073741824x256x1x1 256x7x7 pad 3, groups 256 | 2147483648 blocks, at most 2147483647
grouped            | 8x48x28x28 64x3x3 pad 1, groups 4            | 12 channels
grouped            | 8x64x28x28 64x3x3 pad 1, groups 8            | 8 output channels
implicit_gemm_sm80 | 1x64x40x40 64x33x3                           | 32x32
implicit_gemm_sm90 | 1x64x40x40 64x33x3                           | 32x32
implicit_gemm_sm90 | 1x64x40x40 64x33x1                           | which only a gather takes
implicit_gemm_sm90 | 8x20x28x28 64x3x3                            | a tensor map takes 16
implicit_gemm_sm90 | 8x64x28x28 64x3x3                            | too few registers for a gather
implicit_gemm_sm90 | 8x64x90x90 64x1x1 stride 9x1 | a stride is 9, a tensor map takes 1 to 8
implicit_gemm_sm90 | 8x64x28x28 64x1x1 pad 129x0 | a corner is -129, a tensor map takes -128 to 127
implicit_gemm_sm90 | 1x64x300x300 64x3x3 pad 0x128, dilate 1x128 | a tap's offset is 256, a tensor map
implicit_gemm_sm90 | 1x64x300x300 64x3x3 dilate 1x100 | a corner is -200
implicit_gemm_sm90 | 8x144x28x28 64x3x3 groups 2 | a group's 72 channels are no multiple of 64
implicit_gemm_sm90 float32 | 8x64x28x28 64x3x3                    | fewer than 3 stages fit
implicit_gemm_sm80 | 8x20x28x28 64x3x3                            | takes 16
""")
"""The same of problems that others of its plans take."""


def problem_of(shape: ConvShape) -> ConvProblem:
    """The problem of a shape whose name may say of what dtype it is, and that it is nchw."""
    words = shape.name.split()
    (dtype,) = [word for word in words if word in ("float32", "bfloat16")] or ["float16"]
    sizes = (*shape.x_size, shape.k, shape.r, shape.s)
    options = {"dtype": getattr(torch, dtype), "channels_last": "nchw" not in words}
    return ConvProblem(*sizes, **shape.options(), **options)


@pytest.mark.parametrize("shape", [*REFUSED, *PARTLY_REFUSED], ids=lambda shape: f"{shape}: {shape.reason}")
def test_why_it_is_out(shape: ConvShape) -> None:
    reasons = [c["illegal"] for c in of_kernel(problem_of(shape), shape.name.split()[0] + " ")]
    assert any(shape.reason in reason for reason in reasons), reasons[0]
    assert all(reasons) == (shape in REFUSED)


CHOSEN = table("""
head over an image | 1x128x7x7 512x7x7                  | kernel small_m, rows plain, access_bytes 16
deep reduction     | 1x3072x1x1 8x1x1                   | kernel small_m, lanes 128
short reduction    | 1x8x1x1 32x1x1                     | kernel small_m, lanes 1
nchw as it lies    | 1x64x4x4 128x1x1 | kernel small_m, access_bytes 2, convert_x False, convert_weight False
wide layer         | 64x1024x1x1 1024x1x1               | kernel implicit_gemm_sm90
wide head          | 64x2048x1x1 1000x1x1               | kernel implicit_gemm_sm90
wide layer of 128  | 128x512x1x1 2048x1x1               | kernel implicit_gemm_sm90
wide head of 32    | 32x2048x1x1 1000x1x1               | kernel implicit_gemm_sm90
last block         | 1x512x7x7 512x3x3 pad 1            | kernel implicit_gemm_sm90
nchw is copied | 8x96x28x28 96x3x3 pad 1, groups 96 | kernel depthwise, convert_x True, convert_weight False
wide float16       | 8x256x28x28 64x3x3 pad 1           | kernel implicit_gemm_sm90, access_bytes 16
20 of float16      | 8x20x28x28 64x3x3 pad 1            | kernel implicit_gemm_sm80, access_bytes 8
22 of bfloat16     | 8x22x28x28 64x3x3 pad 1            | kernel implicit_gemm_sm80, access_bytes 4
wide float32       | 8x256x28x28 64x3x3 pad 1           | kernel implicit_gemm_sm80, access_bytes 16
22 of float32      | 8x22x28x28 64x3x3 pad 1            | access_bytes 8
odd channels       | 8x27x28x28 64x3x3                  | kernel direct
many filter rows   | 1x64x40x40 64x33x3                 | kernel implicit_gemm_sm90, rows gather
21 of float32      | 8x21x28x28 64x3x3 pad 1            | access_bytes 4
96 float16         | 8x96x28x28 96x3x3 pad 1, groups 96 | name depthwise 147x48x9 3x3 stride 1 16-byte
72 float16         | 8x72x28x28 72x3x3 pad 1, groups 72 | name depthwise 175x40x9 3x3 stride 1 16-byte
24 bfloat16        | 8x24x28x28 24x3x3 pad 1, groups 24 | name depthwise 294x24x9 3x3 stride 1 16-byte
20 bfloat16        | 8x20x28x28 20x3x3 pad 1, groups 20 | name depthwise 294x24x9 3x3 stride 1 4-byte
22 float32         | 8x22x28x28 22x3x3 pad 1, groups 22 | name depthwise 147x24x9 3x3 stride 1 4-byte
27 float32         | 8x27x28x28 27x3x3 pad 1, groups 27 | name depthwise 126x28x9 3x3 stride 1 4-byte
27 float16         | 8x27x28x28 27x3x3 pad 1, groups 27 | name depthwise 224x32x9 any filter by value
""")
"""Layers, and what holds of the plan that is chosen for them."""


@pytest.mark.parametrize("shape", CHOSEN, ids=str)
def test_the_choice(shape: ConvShape) -> None:
    chosen = explain(problem_of(shape)).candidates[0]
    for held in shape.reason.split(", "):
        key, _, value = held.partition(" ")
        assert str(chosen[key]) == value, key


@pytest.mark.parametrize(
    ("problem", "kernel", "without"),
    [
        (layer(8, 64, 28, 64, 3, padding=1, groups=8, dtype=FLOAT32), "grouped", "implicit_gemm_tf32x3"),
        (having(PATCHES, dtype=FLOAT32), "stem", "implicit_gemm_tf32x3"),
        (having(WIDE, dtype=FLOAT32), "implicit_gemm_sm80", "implicit_gemm_tf32x3"),
        (layer(32, 32, 56, 64, dtype=FLOAT32), "implicit_gemm_sm90", "implicit_gemm_fp32"),
        (layer(8, 960, 1, 40, dtype=FLOAT32), "small_m", "small_m"),
    ],
)
def test_float32_that_is_to_be_exact_is_not_rounded(problem: ConvProblem, kernel: str, without: str) -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        assert explain(problem).kernel == kernel
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = explain(problem)
        assert exact.kernel == without
        if kernel != without:
            assert all("tf32" in c["illegal"] for c in exact.candidates if c["kernel"] == kernel)
        # whose tensor cores are no faster
        assert explain(having(WIDE, dtype=FLOAT32), device="L4").kernel == "implicit_gemm_fp32"


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_takes_the_kernels_of_their_layers(device: str) -> None:
    assert explain(RESNEXT, device=device).kernel == "grouped"
    for size in (7, 14, 28, 56) if device in ("A100", "H100", "B200") else ():
        chosen = explain(having(CONVNEXT, h=size, w=size), device=device).candidates[0]
        assert (chosen["kernel"], chosen["access_bytes"]) == ("depthwise_toeplitz", 16)
        assert not chosen["convert_x"]


SQUEEZE_EXCITE = "64-1024 1024-64 40-960 960-40 96-2304 2304-96 20-480 240-10 8-32"
"""Channels in and out of real squeeze-excite layers, most used ones first."""


@pytest.mark.parametrize("device", ["A100", "L4", "H100", "B200"])
@pytest.mark.parametrize("n", [1, 8])
def test_squeeze_excite_layers_of_small_batches_run_on_small_m(n: int, device: str) -> None:
    for pair in SQUEEZE_EXCITE.split():
        c, k = map(int, pair.split("-"))
        chosen = explain(layer(n, c, 1, k), device=device).candidates[0]
        assert chosen["kernel"] == "small_m", (c, k, chosen["name"])
        assert "copy" not in chosen["name"]
        assert chosen["workspace_bytes"] == 0


def test_the_head_over_an_image_is_bound_by_the_read_of_the_weight() -> None:
    chosen = explain(layer(1, 512, 7, 4096, 7)).candidates[0]
    assert chosen["bytes_us"] > chosen["latency_us"]
    copied = fastest(layer(1, 512, 7, 4096, 7, channels_last=False), "small_m")
    assert copied["convert_weight"], "a sector for each value would cost more than the copy"


def test_few_channels_share_a_warp() -> None:
    chosen = explain(layer(1, 64, 1, 1024)).candidates[0]
    assert chosen["kernel"] == "small_m"
    assert chosen["lanes"] <= 8, "64 channels are 8 chunks"
    assert chosen["tile"][1] >= 128 // chosen["lanes"] * 2


@pytest.mark.parametrize("channels_last", [True, False])
def test_small_m_never_needs_memory_of_its_own_unless_a_copy_is_faster(channels_last: bool) -> None:
    own = of_kernel(layer(1, 40, 4, 24, 3, padding=1, channels_last=channels_last), "small_m")
    assert any(not (c["convert_x"] or c["convert_weight"]) for c in own)
    assert all(c["workspace_bytes"] == 0 for c in own)


@pytest.mark.parametrize("dtype", [torch.float16, FLOAT32], ids=str)
def test_depthwise_layers_of_real_networks(dtype: torch.dtype) -> None:
    layers = [p for _, p in real_layers() if p.groups == p.c > 1]
    assert len(layers) > 700
    for problem in layers:
        candidates = explain(having(problem, dtype=dtype)).candidates
        # where products are the bound tensor cores are faster, and few pixels have a kernel of their own
        chosen = next(c for c in candidates if c["kernel"] == "depthwise" and not c["illegal"])
        is_special = candidates[0]["kernel"] in ("depthwise", "depthwise_toeplitz", "small_m")
        assert is_special or chosen["estimate_us"] < 1.01 * candidates[0]["estimate_us"], problem
        own = problem.r == problem.s and problem.r in (3, 5, 7) and problem.dilation == (1, 1)
        own = own and problem.k == problem.c and problem.stride in ((1, 1), (2, 2))
        assert ("any filter" not in chosen["name"]) == own, problem
        assert ("by value" in chosen["name"]) == (problem.k != problem.c), problem


def test_depthwise_is_bound_by_instructions_in_16_bits_and_from_5x5_on() -> None:
    large = having(MOBILE, n=32, h=112, w=112)
    for filter, padding, dtype in ((3, 1, torch.float16), (5, 2, FLOAT32), (7, 3, torch.float16)):
        chosen = explain(having(large, r=filter, s=filter, padding=padding, dtype=dtype)).candidates[0]
        assert chosen["products_us"] > 1.2 * chosen["bytes_us"]
    in_float32 = explain(having(large, dtype=FLOAT32)).candidates[0]
    assert in_float32["products_us"] < in_float32["bytes_us"]


def test_a_slice_of_channels_is_read_as_wide_as_it_is_aligned() -> None:
    module = ConvNormAct(96, 96, 3, padding=1, groups=96).half().eval()
    aligned_to_8 = torch.randn(8, 28, 28, 100).half().permute(0, 3, 1, 2)[:, 4:]
    assert explain(module, aligned_to_8).candidates[0]["access_bytes"] == 4


def test_toeplitz_passes_leave_few_rows_of_zeros() -> None:
    rows_of_pass = {1: 5, 3: 5, 5: 5, 6: 7, 7: 7, 9: 5, 10: 5, 13: 7, 14: 7, 15: 5}
    for r, rows in rows_of_pass.items():
        plans = of_kernel(having(CONVNEXT, h=40, w=40, r=r), "depthwise_toeplitz")
        assert {c["tile"][2] for c in plans} == {rows * 16}


def test_toeplitz_takes_smaller_tiles_for_small_batches_and_copies_what_it_cannot_read() -> None:
    one, many = (fastest(having(CONVNEXT, n=n), "depthwise_toeplitz") for n in (1, 128))
    assert one["tile"][0] < many["tile"][0]
    assert one["blocks"] >= 48
    nchw = fastest(having(CONVNEXT, channels_last=False), "depthwise_toeplitz")
    assert nchw["name"].endswith("16-byte after a copy of x")
    assert (nchw["convert_x"], nchw["convert_weight"]) == (True, False)


@cache
def grouped_layers() -> list[ConvProblem]:
    return [p for _, p in real_layers() if 1 < p.groups < p.c]


def test_no_grouped_layer_of_real_networks_is_left_to_direct() -> None:
    assert len(grouped_layers()) > 150
    kernels = {p: explain(p).kernel for p in grouped_layers()}
    assert "direct" not in kernels.values()
    narrow = [p for p in kernels if p.c // p.groups < 16 and p.r > 1]
    assert len(narrow) > 30
    assert {kernels[p] for p in narrow} == {"grouped"}


def test_grouped_reads_taps_that_lie_apart_without_a_copy() -> None:
    problem = laid_out(integer_problem(family_shape("grouped", "of_8"), torch.float16), channels_last)
    plans = BY_NAME["grouped"].plans(problem.replace(weight=taps_apart(problem.weight)))
    assert plans
    assert not any("copy" in plan for plan in plans)


def test_the_rectangle_suits_the_image() -> None:
    chosen = explain(layer(32, 512, 7, 512, 3, padding=1, groups=32)).candidates[0]["name"].split()
    assert (chosen[0], chosen[1].startswith("64x"), chosen[2]) == ("grouped", True, "7x7")
    for problem in grouped_layers():
        for c in of_kernel(problem, "grouped"):
            if not c["illegal"]:
                p, q = map(int, c["name"].split()[2].split("x"))
                assert p * -(-q // 8) * 8 <= c["tile"][0], c["name"]


def stems(n: int, dtype: torch.dtype) -> list[ConvProblem]:
    """The layers of real networks with few input channels."""
    found = [having(p, n=n, dtype=dtype) for _, p in real_layers() if p.c <= 4 and p.groups == 1]
    assert len(found) > 80
    return found


@pytest.mark.parametrize("batch", [1, 8, 128])
def test_no_real_layer_of_few_channels_runs_on_cuda_cores(batch: int) -> None:
    for problem in stems(batch, torch.float16):
        kernel = explain(problem).kernel
        assert kernel == "stem" if problem.c == 3 else kernel != "direct", problem


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_device_has_memory_for_every_real_stem(device: str, dtype: torch.dtype) -> None:
    for problem in stems(8, dtype):
        assert fastest(problem, "stem", device=device)


def test_plain_images_are_not_copied_for_a_channels_last_network() -> None:
    x = torch.zeros(8, 3, 224, 224).half()
    module = ConvNormAct(3, 64, 7, 2, 3).half().eval().to(memory_format=torch.channels_last)
    explanation = explain(module, x)
    assert explanation.kernel == "stem"
    assert not explanation.candidates[0]["convert_x"]
    assert not explanation.notes


def test_the_name_of_a_stem_says_how_the_problem_is_cut() -> None:
    kernel, tile, _, pixels, _, filter_rows = explain(PATCHES).candidates[0]["name"].split()
    m, n, k = map(int, tile.split("x"))
    p, q = map(int, pixels.split("x"))
    assert (kernel, n, k, filter_rows) == ("stem", 64, 16, "7")
    assert m // 2 < p * q <= m
