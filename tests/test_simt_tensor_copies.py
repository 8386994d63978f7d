"""The simulator's tensor maps and bulk tensor copies: documented behaviour, and faults that it must catch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.simt import SimulatorError
from tests.simt.binding import (
    failing_encode,
    run_test_kernel,
    run_test_kernel_sanitized,
    without_tensor_maps,
)

SEEDS = range(8)
DTYPES = ("float32", "float16", "bfloat16")  # in the order of csrc/problem.h
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# PTX ISA, "Swizzling Modes": a cell is 16 bytes, a row is 128 bytes of shared memory; what lies there.
PATTERNS = {
    64: (
        (0, 1, 2, 3, 4, 5, 6, 7),
        (1, 0, 3, 2, 5, 4, 7, 6),
        (2, 3, 0, 1, 6, 7, 4, 5),
        (3, 2, 1, 0, 7, 6, 5, 4),
    ),
    128: (
        (0, 1, 2, 3, 4, 5, 6, 7),
        (1, 0, 3, 2, 5, 4, 7, 6),
        (2, 3, 0, 1, 6, 7, 4, 5),
        (3, 2, 1, 0, 7, 6, 5, 4),
        (4, 5, 6, 7, 0, 1, 2, 3),
        (5, 4, 7, 6, 1, 0, 3, 2),
        (6, 7, 4, 5, 2, 3, 0, 1),
        (7, 6, 5, 4, 3, 2, 1, 0),
    ),
}


@dataclass(frozen=True)
class Case:
    """A map and one copy by it, for kernels/tensor_copies.cu. Dimensions begin with the dense one."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    at: tuple[int, ...]
    box: tuple[int, ...] = ()
    dtype: str = "float32"
    swizzle: int = 128
    is_im2col: bool = False
    channels: int = 0
    pixels: int = 0
    lower: tuple[int, int] = (0, 0)  # of w and h
    upper: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)
    offset: tuple[int, int] = (0, 0)
    address: int = 0
    place: int = 0
    rank: int = 0  # 0: that of the sizes

    @property
    def element(self) -> int:
        return BYTES[self.dtype]

    @property
    def box_elements(self) -> int:
        return self.channels * self.pixels if self.is_im2col else math.prod(self.box)

    def header(self) -> list[float]:
        def four(values: Sequence[int]) -> list[int]:
            return [*values, 0, 0, 0, 0][:4]

        return [
            self.is_im2col,
            DTYPES.index(self.dtype),
            self.rank or len(self.sizes),
            *four(self.sizes),
            *four(self.strides),
            *four(self.box),
            *(self.swizzle, self.channels, self.pixels),
            *(*self.lower, *self.upper, *self.step),
            self.address,
            *four(self.at),
            *self.offset,
            self.place,
        ]


def dense(sizes: Sequence[int], element: int) -> tuple[int, ...]:
    """The strides of memory without gaps, but for what rounds a row up to 16 bytes."""
    strides = [element, -(-sizes[0] * element // 16) * 16]
    for size in sizes[1:-1]:
        strides.append(strides[-1] * size)
    return tuple(strides[: len(sizes)])


def make_tensor(case: Case, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The tensor's memory, in elements, and the tensor as a view of it, dense dimension last."""
    extent = 1 + sum(
        (size - 1) * stride // case.element for size, stride in zip(case.sizes, case.strides, strict=True)
    )
    # no value is zero, and all are exact in every dtype
    memory = generator.integers(1, 256, extent).astype(np.float32)
    strides = [stride // case.element * memory.itemsize for stride in case.strides]
    return memory, np.lib.stride_tricks.as_strided(memory, case.sizes[::-1], strides[::-1])


def swizzled(box: np.ndarray, case: Case) -> np.ndarray:
    """A box as it lies in shared memory, by the manual's table."""
    pattern, values_per_line = PATTERNS[case.swizzle], 128 // case.element
    lines = np.pad(box.reshape(-1), (0, -box.size % values_per_line)).reshape(-1, 8, 16 // case.element)
    moved = [line[list(pattern[i % len(pattern)])] for i, line in enumerate(lines)]
    return np.concatenate(moved).reshape(-1)[: box.size]


def load(case: Case, memory: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.array(
        run_test_kernel("tensor_load", [*case.header(), *memory.tolist()], case.box_elements, seed=seed),
        dtype=np.float32,
    )


def clipped(tensor: np.ndarray, case: Case) -> np.ndarray:
    """The box of a tiled copy, with zeros outside of the tensor."""
    box = np.zeros(case.box[::-1], np.float32)
    for place in np.ndindex(*box.shape):
        at = tuple(i + first for i, first in zip(place, case.at[::-1], strict=True))
        if all(0 <= i < size for i, size in zip(at, tensor.shape, strict=True)):
            box[place] = tensor[at]
    return box


TILES = {
    "2 dimensions": Case(sizes=(64, 40), strides=(4, 256), box=(32, 8), at=(32, 16)),
    "2, 64 bytes": Case(sizes=(64, 40), strides=(4, 256), box=(16, 16), at=(16, 16), swizzle=64),
    "2, half": Case(sizes=(128, 40), strides=(2, 256), box=(64, 13), at=(64, 3), dtype="float16", place=2048),
    "2, one row": Case(sizes=(32, 40), strides=(4, 128), box=(32, 1), at=(0, 39)),
    "2, 256 rows": Case(sizes=(32, 300), strides=(4, 128), box=(32, 256), at=(0, 20)),
    "3 dimensions": Case(sizes=(32, 6, 5), strides=(4, 160, 1024), box=(32, 4, 3), at=(0, 1, 2)),
    "3, 64 bytes, bfloat16": Case(
        sizes=(32, 6, 5),
        strides=(2, 64, 384),
        box=(32, 3, 5),
        at=(0, 2, 0),
        dtype="bfloat16",
        swizzle=64,
        place=512,
    ),
    "4 dimensions": Case(
        sizes=(32, 5, 4, 3), strides=dense((32, 5, 4, 3), 4), box=(32, 3, 2, 2), at=(0, 1, 1, 1)
    ),
    "4, 64 bytes, half": Case(
        sizes=(48, 5, 4, 3),
        strides=dense((48, 5, 4, 3), 2),
        box=(32, 2, 3, 3),
        at=(16, 3, 0, 0),
        dtype="float16",
        swizzle=64,
    ),
    "strides in no order": Case(sizes=(32, 6, 5), strides=(4, 640, 128), box=(32, 4, 3), at=(0, 1, 1)),
    "before the first column": Case(sizes=(64, 40), strides=(4, 256), box=(32, 8), at=(-5, 0)),
    "behind the last column": Case(sizes=(45, 40), strides=(4, 192), box=(32, 8), at=(32, 0)),
    "a row of one element": Case(sizes=(1, 40), strides=(2, 16), box=(64, 8), at=(0, 3), dtype="float16"),
    "columns from no multiple of 16 bytes": Case(
        sizes=(70, 9), strides=dense((70, 9), 2), box=(64, 8), at=(3, 1), dtype="float16"
    ),
    "both sides": Case(sizes=(21, 3), strides=dense((21, 3), 4), box=(32, 8), at=(-4, -2)),
    "before the first row": Case(
        sizes=(32, 6, 5), strides=dense((32, 6, 5), 4), box=(32, 4, 3), at=(0, -3, 1)
    ),
    "behind the last row": Case(sizes=(32, 6, 5), strides=dense((32, 6, 5), 4), box=(32, 4, 3), at=(0, 4, 3)),
    "all sides of 4": Case(
        sizes=(20, 3, 2, 2), strides=dense((20, 3, 2, 2), 4), box=(32, 5, 4, 4), at=(-6, -1, -1, -1)
    ),
    "wholly outside": Case(sizes=(32, 6, 5), strides=dense((32, 6, 5), 4), box=(32, 4, 3), at=(0, 0, 5)),
    "far outside": Case(sizes=(32, 6), strides=dense((32, 6), 4), box=(32, 4), at=(-(2**30), 2**30)),
}


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_tile_lands_swizzled_with_zeros_outside(name: str, seed: int) -> None:
    case = TILES[name]
    memory, tensor = make_tensor(case, np.random.default_rng(seed))
    assert np.array_equal(load(case, memory, seed), swizzled(clipped(tensor, case), case))


STORES = {
    "inside": Case(sizes=(64, 6, 5), strides=(4, 256, 1536), box=(32, 4, 3), at=(32, 1, 2)),
    "64 bytes, half": Case(
        sizes=(32, 6, 5), strides=(2, 80, 512), box=(32, 4, 3), at=(0, 1, 2), dtype="float16", swizzle=64
    ),
    "bfloat16": Case(
        sizes=(64, 6, 5), strides=dense((64, 6, 5), 2), box=(64, 3, 3), at=(0, 0, 0), dtype="bfloat16"
    ),
    "behind the last column": Case(
        sizes=(45, 6, 5), strides=dense((45, 6, 5), 4), box=(32, 4, 3), at=(32, 0, 0)
    ),
    "a tail of half a chunk": Case(
        sizes=(36, 6, 2), strides=dense((36, 6, 2), 2), box=(64, 4, 2), at=(0, 0, 0), dtype="float16"
    ),
    "columns from no multiple of 16 bytes": Case(
        sizes=(70, 6, 2), strides=dense((70, 6, 2), 2), box=(64, 4, 2), at=(3, 0, 0), dtype="float16"
    ),
    "behind the last row": Case(sizes=(32, 6, 5), strides=dense((32, 6, 5), 4), box=(32, 4, 3), at=(0, 4, 3)),
    "wholly outside": Case(sizes=(32, 6, 5), strides=dense((32, 6, 5), 4), box=(32, 4, 3), at=(0, 6, 0)),
}


@pytest.mark.parametrize("name", STORES)
def test_a_store_writes_what_is_inside_and_nothing_else(name: str) -> None:
    case = STORES[name]
    generator = np.random.default_rng(0)
    memory, _ = make_tensor(case, generator)
    memory[:] = -1
    expected = memory.copy()
    box = generator.integers(1, 256, case.box[::-1]).astype(np.float32)
    for place in np.ndindex(*box.shape):
        at = [i + first for i, first in zip(place, case.at[::-1], strict=True)]
        if all(i < size for i, size in zip(at, case.sizes[::-1], strict=True)):
            expected[np.dot(at, case.strides[::-1]) // case.element] = box[place]
    output = run_test_kernel("tensor_store", [*case.header(), *swizzled(box, case).tolist()], len(memory))
    assert np.array_equal(output, expected)


@dataclass(frozen=True)
class Convolution:
    """What an im2col copy is for, in its own words: the filter's size, strides and so on, of w and h."""

    images: int
    channels: int
    size: tuple[int, int]
    filter: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]  # padding
    behind: tuple[int, int]
    dilation: tuple[int, int]

    def outputs(self, side: int) -> int:
        reach = (self.filter[side] - 1) * self.dilation[side]
        return (self.size[side] + self.before[side] + self.behind[side] - reach - 1) // self.stride[side] + 1

    def pixel(self, number: int) -> tuple[int, int, int]:
        """Of the output, (w, h, n)."""
        row, w = divmod(number, self.outputs(0))
        n, h = divmod(row, self.outputs(1))
        return w, h, n

    def base(self, number: int) -> tuple[int, int, int]:
        """Where the filter lies for a pixel of the output."""
        w, h, n = self.pixel(number)
        return w * self.stride[0] - self.before[0], h * self.stride[1] - self.before[1], n


def draw_convolution(generator: np.random.Generator) -> Convolution:
    def pair(low: int, high: int) -> tuple[int, int]:
        return int(generator.integers(low, high)), int(generator.integers(low, high))

    while True:
        drawn = Convolution(
            images=int(generator.integers(1, 5)),
            channels=int(generator.integers(1, 100)),
            size=pair(1, 15),
            filter=pair(1, 6),
            stride=pair(1, 9),
            before=pair(0, 5),
            behind=pair(0, 5),
            dilation=pair(1, 4),
        )
        if drawn.outputs(0) > 0 and drawn.outputs(1) > 0:
            return drawn


def filter_tap(
    convolution: Convolution, case: Case, tensor: np.ndarray, first: int, tap: Sequence[int]
) -> np.ndarray:
    """The input values that one filter tap meets at the pixels of the output from `first` on."""
    column = np.zeros((case.pixels, case.channels), np.float32)
    count = convolution.outputs(0) * convolution.outputs(1) * convolution.images
    for i in range(min(case.pixels, count - first)):
        w, h, n = convolution.base(first + i)
        w, h = w + tap[0] * convolution.dilation[0], h + tap[1] * convolution.dilation[1]
        if 0 <= w < convolution.size[0] and 0 <= h < convolution.size[1]:
            values = tensor[n, h, w, case.at[0] : case.at[0] + case.channels]
            column[i, : len(values)] = values
    return column


@pytest.mark.parametrize("seed", range(300))
def test_im2col_brings_what_a_filter_tap_meets(seed: int) -> None:
    generator = np.random.default_rng(seed)
    convolution = draw_convolution(generator)
    dtype = DTYPES[seed % 3]
    swizzle = int(generator.choice([64, 128]))
    channels = swizzle // BYTES[dtype]
    count = convolution.outputs(0) * convolution.outputs(1) * convolution.images
    first = int(generator.integers(0, count + 10))  # also behind the last image
    tap = tuple(int(generator.integers(0, size)) for size in convolution.filter)
    reach = [
        (size - 1) * dilation for size, dilation in zip(convolution.filter, convolution.dilation, strict=True)
    ]
    sizes = (convolution.channels, *convolution.size, convolution.images)
    case = Case(
        sizes=sizes,
        strides=dense(sizes, BYTES[dtype]),
        dtype=dtype,
        swizzle=swizzle,
        is_im2col=True,
        channels=channels,
        pixels=int(generator.integers(1, 257)),
        lower=(-convolution.before[0], -convolution.before[1]),
        upper=(convolution.behind[0] - reach[0], convolution.behind[1] - reach[1]),
        step=convolution.stride,
        at=(int(generator.integers(0, convolution.channels)), *convolution.base(first)),
        offset=(tap[0] * convolution.dilation[0], tap[1] * convolution.dilation[1]),
    )
    memory, tensor = make_tensor(case, generator)
    expected = filter_tap(convolution, case, tensor, first, tap)
    assert np.array_equal(load(case, memory, seed), swizzled(expected, case))


# PTX ISA, "Im2col mode", its three examples: 64 images of 9 x 14 pixels or 8 x 14, of 64 channels. The first
# pixel is given as (7, 7, 4, 0). That is inside of the bounding box, as it must be, if it means image 7, row
# 7, column 4, channel 0. Expected: the rows of an image, each with the columns that are taken of it.
def across(image: int, rows: Sequence[int], columns: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(image, row, column) for row in rows for column in columns]


EXAMPLES = {
    "example 1": (
        Case(sizes=(64, 9, 14, 64), strides=(), at=(0, 4, 7, 7), lower=(-1, -1), upper=(-1, -1), pixels=64),
        8,
        [
            *across(7, [7], range(4, 8)),
            *across(7, range(8, 13), range(-1, 8)),
            *across(8, [-1], range(-1, 8)),
            *across(8, [0], range(-1, 5)),
        ],
    ),
    "example 2": (
        Case(sizes=(64, 9, 14, 64), strides=(), at=(0, 4, 7, 7), upper=(-2, -2), pixels=64, offset=(2, 2)),
        8,
        [
            *across(7, [9], range(6, 9)),
            *across(7, range(10, 14), range(2, 9)),
            *across(8, range(2, 6), range(2, 9)),
            *across(8, [6], range(2, 7)),
        ],
    ),
    "example 3": (
        Case(
            sizes=(64, 8, 14, 64),
            strides=(),
            at=(0, 5, 7, 7),
            lower=(-1, -1),
            upper=(-1, -1),
            step=(2, 2),
            pixels=32,
            offset=(1, 1),
        ),
        16,
        [
            *across(7, [8], [6]),
            *across(7, [10, 12], [0, 2, 4, 6]),
            *across(8, [0, 2, 4, 6, 8], [0, 2, 4, 6]),
            *across(8, [10], [0, 2, 4]),
        ],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_manuals_examples_of_im2col(name: str) -> None:
    example, channels, pixels = EXAMPLES[name]
    # rows fill the swizzle: as many channels as the manual has, and then those behind them
    case = replace(example, strides=dense(example.sizes, 4), is_im2col=True, channels=32)
    memory, tensor = make_tensor(case, np.random.default_rng(0))
    column = np.zeros((case.pixels, case.channels), np.float32)
    assert len(pixels) == case.pixels
    for i, (image, row, w) in enumerate(pixels):
        if 0 <= row < case.sizes[2] and 0 <= w < case.sizes[1]:
            column[i] = tensor[image, row, w, : case.channels]
    output = load(case, memory)
    assert np.array_equal(output, swizzled(column, case))
    assert np.count_nonzero(column[:, :channels]) > 0


TILED = Case(sizes=(64, 6, 5), strides=(4, 256, 1536), box=(32, 4, 3), at=(0, 0, 0))
IM2COL = Case(
    sizes=(64, 9, 14, 3),
    strides=dense((64, 9, 14, 3), 4),
    at=(0, 0, 0, 0),
    is_im2col=True,
    channels=32,
    pixels=64,
    lower=(-1, -1),
    upper=(-1, -1),
)

REFUSALS = [
    (replace(TILED, rank=5), r"the rank is 5: it must be from 1 to 4"),
    (replace(TILED, rank=-1), r"the rank is -1: it must be from 1 to 4"),
    (replace(TILED, address=4), r"the address of the tensor is 4 behind a multiple of 16"),
    (replace(TILED, address=-1), r"the address of the tensor is null"),
    (replace(TILED, sizes=(0, 6, 5)), r"sizes\[0\] is 0: it must be from 1 to 4294967296"),
    (replace(TILED, sizes=(64, 6, -1)), r"sizes\[2\] is -1: it must be"),
    (replace(TILED, sizes=(64, 2**33, 5)), r"sizes\[1\] is 8589934592: it must be"),
    (replace(TILED, strides=(4, 264, 1536)), r"strides\[1\] is 264: it must be a multiple of 16"),
    (replace(TILED, strides=(4, 256, 1544)), r"strides\[2\] is 1544: it must be a multiple of 16"),
    (
        replace(TILED, strides=(4, 256, 2**40)),
        r"strides\[2\] is 1099511627776: it must be from 0 to 1099511627775",
    ),
    (replace(TILED, strides=(4, -256, 1536)), r"strides\[1\] is -256: it must be"),
    (replace(TILED, box=(32, 0, 3)), r"box\[1\] is 0: it must be from 1 to 256"),
    (replace(TILED, box=(32, 4, 257)), r"box\[2\] is 257: it must be from 1 to 256"),
    (replace(TILED, box=(31, 4, 3)), r"the row of the box \(box\[0\]\) in bytes is 124: .* a multiple of 16"),
    (replace(TILED, box=(36, 4, 3)), r"in bytes is 144: it must be at most the 128 of the swizzle"),
    (replace(TILED, swizzle=64), r"in bytes is 128: it must be at most the 64 of the swizzle"),
    (replace(TILED, swizzle=0), r"the swizzle is of 0 bytes: it must be of 64 or 128"),
    (replace(IM2COL, rank=3), r"the rank of an im2col map is 3"),
    (replace(IM2COL, address=8), r"the address of the tensor is 8 behind"),
    (replace(IM2COL, sizes=(64, 9, 14, 0)), r"sizes\[3\] is 0"),
    (replace(IM2COL, strides=(4, 256, 2304, 8)), r"strides\[3\] is 8: it must be a multiple of 16"),
    (replace(IM2COL, channels=0), r"channels is 0: it must be from 1 to 256"),
    (replace(IM2COL, channels=257), r"channels is 257: it must be from 1 to 256"),
    (replace(IM2COL, channels=64), r"the row of the box \(channels\) in bytes is 256: .* at most the 128"),
    (replace(IM2COL, channels=30), r"in bytes is 120: it must be a multiple of 16"),
    (replace(IM2COL, pixels=0), r"pixels is 0: it must be from 1 to 1024"),
    (replace(IM2COL, pixels=1025), r"pixels is 1025: it must be from 1 to 1024"),
    (replace(IM2COL, lower=(-129, 0)), r"the lower corner in w is -129: it must be from -128 to 127"),
    (replace(IM2COL, lower=(0, 128)), r"the lower corner in h is 128: it must be"),
    (replace(IM2COL, upper=(128, 0)), r"the upper corner in w is 128: it must be"),
    (replace(IM2COL, upper=(0, -129)), r"the upper corner in h is -129: it must be"),
    (replace(IM2COL, step=(0, 1)), r"the step in w is 0: it must be from 1 to 8"),
    (replace(IM2COL, step=(1, 9)), r"the step in h is 9: it must be from 1 to 8"),
    (replace(IM2COL, upper=(-10, 0)), r"the bounding box is empty in w: it goes from -1 to -2"),
    (replace(IM2COL, lower=(0, 14)), r"the bounding box is empty in h: it goes from 14 to 12"),
]


@pytest.mark.parametrize(("case", "reason"), REFUSALS)
def test_a_map_is_refused_with_the_broken_requirement(case: Case, reason: str) -> None:
    with pytest.raises(RuntimeError, match=f"^the driver refused to encode a tensor map: .*{reason}"):
        run_test_kernel("tensor_encode", case.header(), 1)


LIMITS = [
    replace(TILED, sizes=(2**32, 1, 5), strides=(4, 2**40 - 2**16, 0)),
    replace(TILED, box=(4, 256, 256)),
    replace(IM2COL, lower=(-128, -128), upper=(127, 127), step=(8, 8), pixels=1024),
    replace(IM2COL, lower=(0, 0), upper=(-8, -13)),  # a box of one pixel
]


@pytest.mark.parametrize("case", LIMITS)
def test_a_map_at_the_limits_is_encoded(case: Case) -> None:
    assert run_test_kernel("tensor_encode", case.header(), 1) == [1.0]


def test_a_driver_may_have_no_maps_or_refuse_them() -> None:
    with without_tensor_maps("kernels"), pytest.raises(RuntimeError, match="the driver has no tensor maps"):
        run_test_kernel("tensor_encode", TILED.header(), 1)
    with failing_encode("kernels"), pytest.raises(RuntimeError, match="the driver refused to encode"):
        run_test_kernel("tensor_encode", TILED.header(), 1)
    assert run_test_kernel("tensor_encode", TILED.header(), 1) == [1.0]


BOX, BOXES = 256, 8
VALUES = np.arange(1, 1 + BOX * BOXES, dtype=np.float32).reshape(BOXES, 8, 8, 4)


def run(name: str, seed: int = 0) -> np.ndarray:
    output = run_test_kernel(name, VALUES.reshape(-1).tolist(), BOX * BOXES, seed=seed)
    return np.array(output, np.float32).reshape(BOXES, BOX)


def in_shared_memory(box: int) -> np.ndarray:
    return swizzled(VALUES[box], Case(sizes=(), strides=(), at=()))


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_pass_through_two_buffers(seed: int) -> None:
    output = run("boxes_pass_through", seed)
    assert np.array_equal(output[1:], VALUES.reshape(BOXES, BOX)[1:])
    assert (output[0] == -1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_phase_may_wait_for_several_loads(seed: int) -> None:
    output = run("two_loads_of_one_phase", seed)
    assert np.array_equal(output[:2], [in_shared_memory(3), in_shared_memory(4)])


def test_a_load_reads_its_source_when_it_lands() -> None:
    assert (run("tensor_changed_under_way")[0] == 2).all()


def test_what_is_under_way_reads_as_poison() -> None:
    for seed in SEEDS:
        assert np.isnan(run("read_at_once", seed)[0]).all()


def test_a_missing_wait_shows() -> None:
    outputs = [run("read_before_the_wait", seed)[0] for seed in range(32)]
    assert sum(np.isnan(output).any() for output in outputs) > 24
    # it lands piece by piece
    assert any(np.isnan(output).any() and not np.isnan(output).all() for output in outputs)


def test_stores_land_at_the_wait_for_their_group() -> None:
    landed = run("store_groups")[3, :12].reshape(4, 3)
    assert landed.tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 1, 1],
        [1, 1, 1],  # the empty group counted as one
    ]


def test_a_store_that_nobody_waits_for_lands_at_the_end() -> None:
    for seed in SEEDS:
        assert (run("store_never_waited", seed)[0] == 1).all()


def test_a_missing_fence_shows() -> None:
    for seed in SEEDS:
        assert np.isnan(run("store_without_fence", seed)[0]).all()
        # thread 0 wrote 16 of 1024 bytes, 4 of 256 values
        assert np.isnan(run("fence_of_one_thread", seed)[0]).sum() == BOX - 4


REPORTED_FAULTS = {
    "more_bytes_expected": r"deadlock[\s\S]*pending are 0 of 1 arrivals and 16 bytes",
    "fewer_bytes_expected": r"deadlock[\s\S]*pending are 0 of 1 arrivals and -16 bytes",
    "destination_written": (
        r"destination_written, block 0 of 1, .*bytes 0 to 1023 of shared memory: some were written while "
        r"thread 0's load_tile \(tensor_copies\.cu:\d+\) to them was under way"
    ),
    "destination_loaded_twice": r"some were written while thread 0's load_tile \(.*\) to them was under way",
    "load_to_128": (
        r"load_tile \(.*\) at byte 128 of shared memory, which is not a multiple of 1024 as the swizzle of "
        r"128 bytes wants it"
    ),
    "load_to_4": r"load_tile \(.*\) at byte 4 of shared memory, which is not a multiple of 1024",
    "load_outside": r"load_tile \(.*\) at byte 66560 .* the block has 66560: the box has 1024",
    "map_never_encoded": r"load_tile \(.*\) by a tensor map that was never encoded",
    "wrong_dimensions": r"load_tile \(.*\) with 2 coordinates by a map of 3 dimensions",
    "tiled_as_im2col": r"load_im2col \(.*\) by a map that was encoded as tiled",
    "store_never_committed": r"thread 0's store_tile \(tensor_copies\.cu:\d+\) was never committed",
    "source_overwritten": r"some were written while thread 0's store_tile \(.*\) from them was under way",
    "source_overwritten_at_the_end": r"some were written while thread 0's store_tile \(.*\) from them",
    "source_loaded_early": r"some were written while thread 0's store_tile \(.*\) from them",
    "store_from_a_negative_row": r"store_tile \(.*\) from coordinate -1 on: it is negative",
    "store_from_64": r"store_tile \(.*\) at byte 64 of shared memory, which is not a multiple of 1024",
}


@pytest.mark.parametrize("name", REPORTED_FAULTS)
def test_fault_is_reported(name: str) -> None:
    for seed in SEEDS:
        with pytest.raises(SimulatorError) as caught:
            run(name, seed)
        assert re.search(REPORTED_FAULTS[name], str(caught.value)), str(caught.value)


FAULTY_CASES = [
    (replace(IM2COL, at=(0, -2, 0, 0)), r"from w -2 on, outside of the bounding box, .* from -1 to 7"),
    (replace(IM2COL, at=(0, 8, 0, 0)), r"from w 8 on, outside of the bounding box"),
    (replace(IM2COL, at=(0, 0, 13, 0)), r"from h 13 on, outside of the bounding box, .* from -1 to 12"),
    (replace(IM2COL, offset=(256, 0)), r"with offset_w 256: it must be from 0 to 255"),
    (replace(IM2COL, offset=(0, -1)), r"with offset_h 65535: it must be from 0 to 255"),
    (replace(IM2COL, channels=16), r"of rows of 64 bytes, which do not fill the 128 of the swizzle"),
    (replace(TILED, box=(16, 4, 3)), r"of rows of 64 bytes, which do not fill the 128 of the swizzle"),
    (
        replace(TILED, box=(16, 4, 3), swizzle=64, place=256),
        r"at byte 256 of shared memory, which is not a multiple of 512",
    ),
]


@pytest.mark.parametrize(("case", "report"), FAULTY_CASES)
def test_what_the_instruction_does_not_take_is_reported(case: Case, report: str) -> None:
    memory, _ = make_tensor(case, np.random.default_rng(0))
    with pytest.raises(SimulatorError, match=rf"load_\w+ \(tensor_copies\.cu:\d+\) {report}"):
        load(case, memory)


def test_a_map_larger_than_its_tensor_shows() -> None:
    inputs = BOX * BOXES
    values = np.arange(inputs, dtype=np.float32).reshape(BOXES, 8, 8, 4)
    last = swizzled(values[-1], Case(sizes=(), strides=(), at=()))
    assert run_test_kernel_sanitized("read_the_last_box", inputs, BOX) == last.tolist()
    with pytest.raises(SimulatorError) as caught:
        run_test_kernel_sanitized("read_behind_the_last_box", inputs, BOX)
    report = str(caught.value)
    assert re.search(r"heap-buffer-overflow[\s\S]*READ[\s\S]*load_tile[\s\S]*read_behind_the_end", report), (
        report
    )
