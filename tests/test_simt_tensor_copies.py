"""The simulator's tensor maps and bulk tensor copies: documented behaviour, and faults that it must catch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from tests.simt import SimulatorError
from tests.simt.binding import (
    failing_encode,
    run_test_kernel,
    run_test_kernel_sanitized,
    without_tensor_maps,
)
from tests.simt_faults import assert_reported

SEEDS = range(8)
DTYPES = ("float32", "float16", "bfloat16")  # in the order of csrc/problem.h

# PTX ISA, "Swizzling Modes": a cell is 16 bytes, a row is 128 bytes of shared memory; what lies there.
ROWS = ["01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"]
PATTERNS = {64: ROWS[:4], 128: ROWS}


@dataclass(frozen=True)
class Case:
    """A map and one copy by it, for kernels/tensor_copies.cu. Dimensions begin with the dense one."""

    sizes: tuple[int, ...]
    box: tuple[int, ...] = ()  # none: an im2col map
    at: tuple[int, ...] = (0, 0, 0, 0)
    dtype: str = "float32"
    swizzle: int = 128
    place: int = 0
    strides: tuple[
        int, ...
    ] = ()  # in bytes; none: those of memory without gaps, but for what rounds a row up
    channels: int = 32
    pixels: int = 64
    lower: tuple[int, ...] = (0, 0)  # of w and h
    upper: tuple[int, ...] = (0, 0)
    step: tuple[int, ...] = (1, 1)
    offset: tuple[int, ...] = (0, 0)
    address: int = 0
    rank: int = 0  # none: that of the sizes

    @property
    def element(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def byte_strides(self) -> list[int]:
        rows = [-(-self.sizes[0] * self.element // 16) * 16, *self.sizes[1:-1]]
        return list(self.strides) or [self.element, *np.cumprod(rows).tolist()][: len(self.sizes)]

    def box_shape(self) -> tuple[int, ...]:
        """Dense dimension last, as in numpy."""
        return self.box[::-1] or (self.pixels, self.channels)

    def header(self) -> list[float]:
        fours = [[*values, 0, 0, 0, 0][:4] for values in (self.sizes, self.byte_strides(), self.box, self.at)]
        return [
            *(not self.box, DTYPES.index(self.dtype), self.rank or len(self.sizes)),
            *(*fours[0], *fours[1], *fours[2]),
            *(self.swizzle, self.channels, self.pixels, *self.lower, *self.upper, *self.step),
            *(self.address, *fours[3], *self.offset, self.place),
        ]


def make_tensor(case: Case, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The tensor's memory, in elements, and the tensor as a view of it, dense dimension last."""
    strides = [stride // case.element for stride in case.byte_strides()]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(case.sizes, strides, strict=True))
    # no value is zero, and all are exact in every dtype
    memory = generator.integers(1, 256, extent).astype(np.float32)
    view = np.lib.stride_tricks.as_strided(memory, case.sizes[::-1], [4 * stride for stride in strides[::-1]])
    return memory, view


def swizzled(box: np.ndarray, case: Case) -> np.ndarray:
    """A box as it lies in shared memory, by the manual's table."""
    pattern, values_per_line = PATTERNS[case.swizzle], 128 // case.element
    lines = np.pad(box.reshape(-1), (0, -box.size % values_per_line)).reshape(-1, 8, 16 // case.element)
    moved = [line[[int(cell) for cell in pattern[i % len(pattern)]]] for i, line in enumerate(lines)]
    return np.concatenate(moved).reshape(-1)[: box.size]


def load(case: Case, memory: np.ndarray, seed: int = 0) -> np.ndarray:
    given, elements = [*case.header(), *memory.tolist()], math.prod(case.box_shape())
    return np.array(run_test_kernel("tensor_load", given, elements, seed=seed), dtype=np.float32)


def inside(case: Case) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """What of a box lies in the tensor: where in the box, and where in the tensor."""
    for place in np.ndindex(*case.box_shape()):
        at = tuple(i + first for i, first in zip(place, case.at[::-1], strict=True))
        if all(0 <= i < size for i, size in zip(at, case.sizes[::-1], strict=True)):
            yield place, at


TILES = {
    "2 dimensions": Case((64, 40), (32, 8), (32, 16)),
    "2, 64 bytes": Case((64, 40), (16, 16), (16, 16), swizzle=64),
    "2, half": Case((128, 40), (64, 13), (64, 3), "float16", place=2048),
    "2, one row": Case((32, 40), (32, 1), (0, 39)),
    "2, 256 rows": Case((32, 300), (32, 256), (0, 20)),
    "3 dimensions": Case((32, 6, 5), (32, 4, 3), (0, 1, 2), strides=(4, 160, 1024)),
    "3, 64 bytes, bfloat16": Case((32, 6, 5), (32, 3, 5), (0, 2, 0), "bfloat16", 64, 512),
    "4 dimensions": Case((32, 5, 4, 3), (32, 3, 2, 2), (0, 1, 1, 1)),
    "4, 64 bytes, half": Case((48, 5, 4, 3), (32, 2, 3, 3), (16, 3, 0, 0), "float16", 64),
    "strides in no order": Case((32, 6, 5), (32, 4, 3), (0, 1, 1), strides=(4, 640, 128)),
    "before the first column": Case((64, 40), (32, 8), (-5, 0)),
    "behind the last column": Case((45, 40), (32, 8), (32, 0)),
    "a row of one element": Case((1, 40), (64, 8), (0, 3), "float16"),
    "columns from no multiple of 16 bytes": Case((70, 9), (64, 8), (3, 1), "float16"),
    "both sides": Case((21, 3), (32, 8), (-4, -2)),
    "before the first row": Case((32, 6, 5), (32, 4, 3), (0, -3, 1)),
    "behind the last row": Case((32, 6, 5), (32, 4, 3), (0, 4, 3)),
    "all sides of 4": Case((20, 3, 2, 2), (32, 5, 4, 4), (-6, -1, -1, -1)),
    "wholly outside": Case((32, 6, 5), (32, 4, 3), (0, 0, 5)),
    "far outside": Case((32, 6), (32, 4), (-(2**30), 2**30)),
}


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_tile_lands_swizzled_with_zeros_outside(name: str, seed: int) -> None:
    case = TILES[name]
    memory, tensor = make_tensor(case, np.random.default_rng(seed))
    box = np.zeros(case.box_shape(), np.float32)
    for place, at in inside(case):
        box[place] = tensor[at]
    assert np.array_equal(load(case, memory, seed), swizzled(box, case))


STORES = {
    "inside": Case((64, 6, 5), (32, 4, 3), (32, 1, 2)),
    "64 bytes, half": Case((32, 6, 5), (32, 4, 3), (0, 1, 2), "float16", 64, strides=(2, 80, 512)),
    "bfloat16": Case((64, 6, 5), (64, 3, 3), (0, 0, 0), "bfloat16"),
    "behind the last column": Case((45, 6, 5), (32, 4, 3), (32, 0, 0)),
    "a tail of half a chunk": Case((36, 6, 2), (64, 4, 2), (0, 0, 0), "float16"),
    "columns from no multiple of 16 bytes": Case((70, 6, 2), (64, 4, 2), (3, 0, 0), "float16"),
    "behind the last row": Case((32, 6, 5), (32, 4, 3), (0, 4, 3)),
    "wholly outside": Case((32, 6, 5), (32, 4, 3), (0, 6, 0)),
}


@pytest.mark.parametrize("name", STORES)
def test_a_store_writes_what_is_inside_and_nothing_else(name: str) -> None:
    case, generator = STORES[name], np.random.default_rng(0)
    memory, tensor = make_tensor(case, generator)
    memory[:] = -1
    box = generator.integers(1, 256, case.box_shape()).astype(np.float32)
    output = run_test_kernel("tensor_store", [*case.header(), *swizzled(box, case).tolist()], len(memory))
    for place, at in inside(case):
        tensor[at] = box[place]
    assert np.array_equal(output, memory)


@pytest.mark.parametrize("seed", range(300))
def test_im2col_brings_what_a_filter_tap_meets(seed: int) -> None:
    generator, outputs = np.random.default_rng(seed), np.zeros(2)
    while not (outputs > 0).all():
        # of w and h
        most = [[15, 6, 9, 5, 5, 4]] * 2
        size, taps, stride, before, behind, dilation = generator.integers([1, 1, 1, 0, 0, 1], most).T
        reach = (taps - 1) * dilation
        outputs = (size + before + behind - reach - 1) // stride + 1
    images, channels = generator.integers(1, [5, 100]).tolist()
    tap, count = generator.integers(0, taps) * dilation, images * outputs.prod()

    def base(number: int) -> list[int]:
        """Where the filter lies for a pixel of the output: w, h, n."""
        row, w = divmod(number, int(outputs[0]))
        n, h = divmod(row, int(outputs[1]))
        return [*([w, h] * stride - before).tolist(), n]

    first = int(generator.integers(0, count + 10))  # also behind the last image
    dtype, swizzle = DTYPES[seed % 3], int(generator.choice([64, 128]))
    case = Case(
        sizes=(channels, *size.tolist(), images),
        at=(int(generator.integers(0, channels)), *base(first)),
        dtype=dtype,
        swizzle=swizzle,
        channels=swizzle // (4 if dtype == "float32" else 2),
        pixels=int(generator.integers(1, 257)),
        lower=tuple((-before).tolist()),
        upper=tuple((behind - reach).tolist()),
        step=tuple(stride.tolist()),
        offset=tuple(tap.tolist()),
    )
    memory, tensor = make_tensor(case, generator)
    column = np.zeros(case.box_shape(), np.float32)
    for i in range(min(case.pixels, count - first)):
        w, h, n = base(first + i) + np.array([*tap, 0])
        if 0 <= w < size[0] and 0 <= h < size[1]:
            values = tensor[n, h, w, case.at[0] :][: case.channels]
            column[i, : len(values)] = values
    assert np.array_equal(load(case, memory, seed), swizzled(column, case))


# PTX ISA, "Im2col mode", its three examples: 64 images of 9 x 14 pixels or 8 x 14, of 64 channels. The first
# pixel is given as (7, 7, 4, 0). That is inside of the bounding box, as it must be, if it means image 7, row
# 7, column 4, channel 0. Rows fill the swizzle: as many channels as the manual has, and then those behind
# them. Expected: of an image, rows, each with the columns that are taken of it.
FIRST, ONE = Case((64, 9, 14, 64), at=(0, 4, 7, 7)), (-1, -1)
R = range
EXAMPLES = {
    "example 1": (
        replace(FIRST, lower=ONE, upper=ONE),
        8,
        [(7, [7], R(4, 8)), (7, R(8, 13), R(-1, 8)), (8, [-1], R(-1, 8)), (8, [0], R(-1, 5))],
    ),
    "example 2": (
        replace(FIRST, upper=(-2, -2), offset=(2, 2)),
        8,
        [(7, [9], R(6, 9)), (7, R(10, 14), R(2, 9)), (8, R(2, 6), R(2, 9)), (8, [6], R(2, 7))],
    ),
    "example 3": (
        Case((64, 8, 14, 64), at=(0, 5, 7, 7), pixels=32, lower=ONE, upper=ONE, step=(2, 2), offset=(1, 1)),
        16,
        [(7, [8], [6]), (7, [10, 12], R(0, 7, 2)), (8, R(0, 9, 2), R(0, 7, 2)), (8, [10], R(0, 5, 2))],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_manuals_examples_of_im2col(name: str) -> None:
    case, channels, taken = EXAMPLES[name]
    memory, tensor = make_tensor(case, np.random.default_rng(0))
    pixels = [(image, row, w) for image, rows, columns in taken for row in rows for w in columns]
    assert len(pixels) == case.pixels
    column = np.zeros(case.box_shape(), np.float32)
    for i, (image, row, w) in enumerate(pixels):
        if 0 <= row < case.sizes[2] and 0 <= w < case.sizes[1]:
            column[i] = tensor[image, row, w, : case.channels]
    assert np.array_equal(load(case, memory), swizzled(column, case))
    assert np.count_nonzero(column[:, :channels]) > 0


# Pads and steps that differ by direction: 3 and 2 columns, 1 and no rows, steps of 2 columns and 1 row.
UNEVEN = Case((64, 9, 7, 2), at=(0, -3, -1, 0), pixels=40, lower=(-3, -1), upper=(0, -2), step=(2, 1))


@pytest.mark.parametrize(
    "fault",
    [
        {"lower": UNEVEN.lower[::-1], "upper": UNEVEN.upper[::-1]},
        {"step": UNEVEN.step[::-1]},
        {"offset": (0, 1)},
        {"swizzle": 64, "channels": 16},
    ],
    ids=" ".join,
)
def test_a_wrong_order_or_swizzle_shows(fault: dict[str, Any]) -> None:
    """Corners, steps and offsets are of w, then of h. Another order is reported, or brings something else."""
    memory, _ = make_tensor(UNEVEN, np.random.default_rng(0))
    right = load(UNEVEN, memory)
    try:
        wrong = load(replace(UNEVEN, **fault), memory)
    except SimulatorError as error:
        wrong = str(error)
    shows = (
        "outside of the bounding box" in wrong if isinstance(wrong, str) else not np.array_equal(wrong, right)
    )
    assert shows


TILED = Case((64, 6, 5), (32, 4, 3), (0, 0, 0), strides=(4, 256, 1536))
IM2COL = Case((64, 9, 14, 3), strides=(4, 256, 2304, 32256), lower=(-1, -1), upper=(-1, -1))

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
    (replace(TILED, strides=(4, 256, 2**40)), r"strides\[2\] is 1099511627776: .* from 0 to 1099511627775"),
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
    return swizzled(VALUES[box], Case(()))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_every_order_of_threads_does(seed: int) -> None:
    passed = run("boxes_pass_through", seed)
    assert np.array_equal(passed[1:], VALUES.reshape(BOXES, BOX)[1:])
    assert (passed[0] == -1).all()
    # one phase may wait for several loads
    assert np.array_equal(run("two_loads_of_one_phase", seed)[:2], [in_shared_memory(3), in_shared_memory(4)])
    # a load reads its source when it lands; what is under way is poison
    assert (run("tensor_changed_under_way", seed)[0] == 2).all()
    assert np.isnan(run("read_at_once", seed)[0]).all()
    # a store that nobody waits for lands at the end
    assert (run("store_never_waited", seed)[0] == 1).all()
    # without a fence; behind that of thread 0, which wrote 16 of 1024 bytes, 4 of 256 values
    assert np.isnan(run("store_without_fence", seed)[0]).all()
    assert np.isnan(run("fence_of_one_thread", seed)[0]).sum() == BOX - 4


def test_a_missing_wait_shows() -> None:
    outputs = [run("read_before_the_wait", seed)[0] for seed in range(32)]
    assert sum(np.isnan(output).any() for output in outputs) > 24
    # it lands piece by piece
    assert any(np.isnan(output).any() and not np.isnan(output).all() for output in outputs)


def test_stores_land_at_the_wait_for_their_group() -> None:
    landed = run("store_groups")[3, :12].reshape(4, 3)
    # the empty group counted as one
    assert landed.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]


LOAD, STORE = r"load_tile \(tensor_copies\.cu:\d+\) ", r"store_tile \(tensor_copies\.cu:\d+\) "
WRITTEN = r"some were written while thread 0's "

REPORTED_FAULTS = {
    "more_bytes_expected": r"deadlock[\s\S]*pending are 0 of 1 arrivals and 16 bytes",
    "fewer_bytes_expected": r"deadlock[\s\S]*pending are 0 of 1 arrivals and -16 bytes",
    "destination_written": rf"destination_written, block 0 of 1, .*bytes 0 to 1023 .*: {WRITTEN}{LOAD}to",
    "destination_loaded_twice": rf"{WRITTEN}{LOAD}to them was under way",
    "load_to_128": rf"{LOAD}at byte 128 .* not a multiple of 1024 as the swizzle of 128 bytes wants it",
    "load_to_4": rf"{LOAD}at byte 4 of shared memory, which is not a multiple of 1024",
    "load_outside": rf"{LOAD}at byte 66560 .* the block has 66560: the box has 1024",
    "map_never_encoded": rf"{LOAD}by a tensor map that was never encoded",
    "wrong_dimensions": rf"{LOAD}with 2 coordinates by a map of 3 dimensions",
    "tiled_as_im2col": r"load_im2col \(.*\) by a map that was encoded as tiled",
    "store_never_committed": rf"thread 0's {STORE}was never committed",
    "source_overwritten": rf"{WRITTEN}{STORE}from them was under way",
    "source_overwritten_at_the_end": rf"{WRITTEN}{STORE}from them",
    "source_loaded_early": rf"{WRITTEN}{STORE}from them",
    "store_from_a_negative_row": rf"{STORE}from coordinate -1 on: it is negative",
    "store_from_64": rf"{STORE}at byte 64 of shared memory, which is not a multiple of 1024",
}


@pytest.mark.parametrize("name", REPORTED_FAULTS)
def test_fault_is_reported(name: str) -> None:
    assert_reported(lambda seed: run(name, seed), REPORTED_FAULTS[name], SEEDS)


FAULTY_CASES = [
    (replace(IM2COL, at=(0, -2, 0, 0)), r"from w -2 on, outside of the bounding box, .* from -1 to 7"),
    (replace(IM2COL, at=(0, 8, 0, 0)), r"from w 8 on, outside of the bounding box"),
    (replace(IM2COL, at=(0, 0, 13, 0)), r"from h 13 on, outside of the bounding box, .* from -1 to 12"),
    (replace(IM2COL, offset=(256, 0)), r"with offset_w 256: it must be from 0 to 255"),
    (replace(IM2COL, offset=(0, -1)), r"with offset_h 65535: it must be from 0 to 255"),
    (replace(IM2COL, channels=16), r"of rows of 64 bytes, which do not fill the 128 of the swizzle"),
    (replace(TILED, box=(16, 4, 3)), r"of rows of 64 bytes, which do not fill the 128 of the swizzle"),
    (replace(TILED, box=(16, 4, 3), swizzle=64, place=256), r"at byte 256 .* is not a multiple of 512"),
]


@pytest.mark.parametrize(("case", "report"), FAULTY_CASES)
def test_what_the_instruction_does_not_take_is_reported(case: Case, report: str) -> None:
    memory, _ = make_tensor(case, np.random.default_rng(0))
    with pytest.raises(SimulatorError, match=rf"load_\w+ \(tensor_copies\.cu:\d+\) {report}"):
        load(case, memory)


def test_a_map_larger_than_its_tensor_shows() -> None:
    inputs = BOX * BOXES
    values = np.arange(inputs, dtype=np.float32).reshape(BOXES, 8, 8, 4)
    last = swizzled(values[-1], Case(()))
    assert run_test_kernel_sanitized("read_the_last_box", inputs, BOX) == last.tolist()
    with pytest.raises(SimulatorError) as caught:
        run_test_kernel_sanitized("read_behind_the_last_box", inputs, BOX)
    report = str(caught.value)
    assert re.search(r"heap-buffer-overflow[\s\S]*READ[\s\S]*load_tile[\s\S]*read_behind_the_end", report), (
        report
    )
