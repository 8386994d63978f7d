"""The kernel families: one row each with its shapes, dtypes, plans and error bound, for one suite of tests.

A kernel that has a row here is held to everything in tests/test_conformance.py, in the simulator and on a
GPU, runs under `tests.coverage_report`, and is among the plans that `tests.gpu` tries.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fused_cna.plan import DEFAULT_DEVICE
from tests.family_shapes import AHEAD, DEPTHWISE, FEW_PIXELS, GEMM, GROUPED, HOPPER, ODD, STEMS, TOEPLITZ
from tests.layouts import Layout, channels_last, contiguous
from tests.plans import plan_names
from tests.reference import DTYPES, Problem, Wanted, error_bound, integer_problem
from tests.shapes import SHAPES, ConvShape

HALVES = (torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)

MANY_PLANS = 16
"""Where a problem has more, tests run some of them."""

TF32_ROUNDOFF = 2.0**-11

TF32_ERROR = 0.9
"""c of the error bound for tf32, in its u: both operands rounded to nearest, sums and epilogue in float32.

A correctly rounded tf32 product of the problems here has 0.55 to 0.8 u, a truncated one 1.2 u and more.
"""


def tf32_bound(dtype: torch.dtype) -> float:
    """The bound of the relative error, where products of float32 are rounded to tf32."""
    return TF32_ERROR * TF32_ROUNDOFF if dtype == torch.float32 else error_bound(dtype)


@dataclass(frozen=True)
class Family:
    """A kernel, and what the conformance suite has to know of it."""

    name: str
    shapes: tuple[ConvShape, ...]
    """Those that reach all of the kernel."""
    telling: tuple[str, ...]
    """Of them, for tests that vary something else; the first has many outputs of different kinds."""
    takes: Callable[[ConvShape, torch.dtype], bool]
    """Whether some plan takes a shape of tests/shapes.py."""
    instantiation: Callable[[str], str]
    """What was compiled, from the name of a plan; the rest of the name says how it is launched."""
    instantiations: Callable[[torch.dtype], set[str]]
    """All that are compiled for a dtype."""
    dtypes: tuple[torch.dtype, ...] = DTYPES
    error: Callable[[torch.dtype], float] = error_bound
    """The bound of the relative error on random inputs."""
    least_outputs: int = 1
    """The bound is for shapes with so many: all of a few may happen to come from unlucky roundings."""
    formats: tuple[Layout, ...] = (channels_last,)
    """Layouts of x and weight that the kernel reads without a copy."""
    allow_tf32: bool = False
    device: str = DEFAULT_DEVICE
    """Whose plans are simulated."""

    def __str__(self) -> str:
        return self.name

    def plans(self, problem: Problem, device: Any = None) -> list[str]:
        """All legal plans for tensors as they lie in memory, the fastest by estimate first."""
        if self.name == "chosen":
            return [""]
        return plan_names(problem, self.name, device=device, allow_tf32=self.allow_tf32)

    def one_of_each(self, plans: list[str], chance: random.Random) -> list[str]:
        """For each instantiation among the plans one of them."""
        return list({self.instantiation(plan): plan for plan in chance.sample(plans, len(plans))}.values())

    def some(self, plans: list[str], chance: random.Random) -> list[str]:
        """All where they are few, else one of each instantiation and a few more."""
        if len(plans) <= MANY_PLANS:
            return plans
        return list(dict.fromkeys((*self.one_of_each(plans, chance), *chance.sample(plans, 4))))

    def shared(self, dtype: torch.dtype) -> list[ConvShape]:
        """The shapes of all kernels that this one takes, and that leave something to compute."""
        return [s for s in SHAPES if s.n > 0 and s not in self.shapes and self.takes(s, dtype)]

    def told(self) -> list[ConvShape]:
        """The telling shapes."""
        return [next(shape for shape in self.shapes if shape.name == name) for name in self.telling]

    def nonempty(self) -> list[ConvShape]:
        """The shapes that leave something to compute."""
        return [shape for shape in self.shapes if shape.n > 0]

    def measured(self) -> list[ConvShape]:
        """The shapes whose error is held to the bound."""
        return [shape for shape in self.shapes if math.prod(shape.output_size) >= self.least_outputs]


def laid_out(problem: Problem, layout: Layout) -> Problem:
    """The problem with x and weight in that layout."""
    return problem.replace(x=layout(problem.x), weight=layout(problem.weight))


def words(first: int, last: int | None = None) -> Callable[[str], str]:
    """Some words of a plan's name, without what says that an operand is copied first."""
    return lambda plan: " ".join(plan.partition(" after ")[0].split()[first:last])


def without_launch(plan: str) -> str:
    """Of an implicit GEMM without its split: the tile, the rows and the access."""
    tile, _, _, *rest = words(1)(plan).split()
    return " ".join((tile, *rest))


def is_even(shape: ConvShape, dtype: torch.dtype) -> bool:
    """Whether channels of a group allow the 4 bytes that cp.async copies at least."""
    return shape.c // shape.groups * dtype.itemsize % 4 == 0


def of_gemm(wide: str, narrow: str) -> set[str]:
    """Wide tiles have accesses of 16 bytes, narrow ones of all widths, the last of them rows of any kind."""
    tiles = [*wide.split(), *narrow.split()]
    accesses = {f"{tile} masked {access}-byte" for tile in narrow.split() for access in (8, 4)}
    whole = {f"{tile} {rows} 16-byte" for tile in tiles for rows in ("masked", "pointwise")}
    return whole | accesses | {f"{tiles[-1]} plain 4-byte"}


def of_sm80(dtype: torch.dtype) -> set[str]:
    """Its tiles; those of float32 are half as deep, so that their bytes are the same."""
    if dtype == torch.float32:
        wide = "256x128x16 128x256x16 128x128x16 128x128x32 256x64x16 64x64x32"
        return of_gemm(wide, "128x64x16 128x32x16 64x64x16")
    wide = "256x128x32 128x256x32 128x128x32 128x128x64 256x64x32 64x64x64"
    return of_gemm(wide, "128x64x32 128x32x32 64x64x32")


def takes_hopper(shape: ConvShape, dtype: torch.dtype) -> bool:
    """Its groups are wide, or there is but one."""
    return is_even(shape, dtype) and (shape.groups == 1 or shape.c // shape.groups >= 64)


def of_hopper(dtype: torch.dtype) -> set[str]:
    """Its tiles with what may bring x; narrow accesses and filters of any size are gathered."""
    wide = "256x128 cooperative, 128x256 cooperative, 128x128 pingpong, 64x256 pingpong"
    tiles = "128x192 cooperative, 128x128 cooperative, 64x128 pingpong, 64x64 pingpong, 64x128 single"
    tiles += ", 64x32 single"
    narrow = "128x64 pingpong, 128x32 pingpong, 64x64 single"
    k = 128 // dtype.itemsize
    every = [
        tile.replace(" ", f"x{k} ")
        for tile in f"{tiles}, {narrow}, {wide if dtype.itemsize == 2 else ''}".split(", ")
        if tile
    ]
    fetches = {f"{tile} {fetch} 16-byte" for tile in every for fetch in ("tiled", "im2col", "gather")}
    gathers = {f"{tile.replace(' ', f'x{k} ')} gather" for tile in narrow.split(", ")}
    return (
        {each for each in fetches if not each.startswith("256x") or "gather" not in each}
        | {f"{tile} {access}-byte" for tile in gathers for access in (8, 4)}
        | {f"64x64x{k} single gather plain 4-byte"}
    )


def without_split(plan: str) -> str:
    """Of the Hopper kernel: the tile, the schedule, what brings x and the access."""
    before, _, after = words(1)(plan).partition(" split ")
    return f"{before} {after.split()[1]}"


def of_small_m(dtype: torch.dtype) -> set[str]:
    """Rows of a tile, whether they are consecutive pixels, and the access."""
    accesses = [access for access in (16, 8, 4, 2) if access >= dtype.itemsize]
    plain = {f"{rows} plain {access}-byte" for rows in (1, 4, 8) for access in accesses}
    return plain | {f"{rows} pointwise 16-byte" for rows in (1, 4, 8)}


def of_depthwise(dtype: torch.dtype) -> set[str]:
    """Filters with a version of their own, and the versions for any filter."""
    filters = [f"{size}x{size} stride {stride}" for size in (3, 5, 7) for stride in (1, 2)]
    accesses = {f"{kind} {access}-byte" for kind in (*filters, "any filter") for access in (16, 4)}
    return accesses | {"any filter by value"}


IMPLICIT_GEMM: dict[str, Any] = {"shapes": (*GEMM, *AHEAD), "instantiation": without_launch}

FAMILIES = (
    Family(
        "chosen",
        SHAPES,
        (
            "many_blocks",
            "padding_asymmetric",
            "groups_odd",
            "depthwise_3x3",
            "channels_mod_4",
            "tile_plus_one",
        ),
        takes=lambda shape, dtype: True,
        instantiation=str,
        instantiations=lambda dtype: {""},
        formats=(contiguous, channels_last),
    ),
    Family(
        "direct",
        tuple(shape for shape in SHAPES if shape.n > 0),
        ("many_blocks", "padding_asymmetric", "groups_odd", "depthwise_3x3", "tile_plus_one"),
        takes=lambda shape, dtype: True,
        instantiation=words(1),
        instantiations=lambda dtype: {"64x64x32", "128x8x32", "256x1x16"},
        formats=(contiguous, channels_last),
    ),
    Family(
        "implicit_gemm_sm80",
        telling=("long", "short", "layer_14x14", "accesses_of_4"),
        takes=is_even,
        instantiations=of_sm80,
        error=tf32_bound,
        least_outputs=1000,
        allow_tf32=True,
        **IMPLICIT_GEMM,
    ),
    Family(
        "implicit_gemm_sm90",
        (*HOPPER, *AHEAD, *(shape for shape in GEMM if shape.groups == 1)),
        telling=("rows_and_columns", "many_tiles", "long", "layer_14x14", "accesses_of_4", "wide_groups"),
        takes=takes_hopper,
        instantiation=without_split,
        instantiations=of_hopper,
        error=tf32_bound,
        least_outputs=1000,
        allow_tf32=True,
        device="H100/3",
    ),
    Family(
        "implicit_gemm_tf32x3",
        telling=("long", "layer_14x14", "accesses_of_4"),
        # shorter sums are no more accurate than those of CUDA cores
        takes=lambda shape, dtype: shape.reduction >= 64,
        instantiations=lambda dtype: of_gemm("192x64x16 96x64x16", "128x32x16 64x64x16"),
        dtypes=FLOAT32,
        **IMPLICIT_GEMM | {"shapes": (*GEMM, *ODD, *(s for s in AHEAD if s.reduction >= 64))},
    ),
    Family(
        "implicit_gemm_fp32",
        telling=("long", "short", "accesses_of_4"),
        takes=lambda shape, dtype: True,
        instantiations=lambda dtype: of_gemm("128x128x16 128x64x16", "128x32x16 64x64x16"),
        dtypes=FLOAT32,
        **IMPLICIT_GEMM | {"shapes": (*GEMM, *ODD, *AHEAD)},
    ),
    Family(
        "small_m",
        FEW_PIXELS,
        ("row_tiles", "excite", "pixels", "border", "odd_groups", "everything"),
        takes=lambda shape, dtype: shape.n * shape.p * shape.q <= 256,
        instantiation=lambda plan: " ".join((words(1)(plan).partition("x")[0], words(4)(plan))),
        instantiations=of_small_m,
        least_outputs=20,
        formats=(contiguous, channels_last),
    ),
    Family(
        "grouped",
        GROUPED,
        ("of_8", "of_4", "of_6_to_5", "of_24", "phases"),
        takes=lambda shape, dtype: shape.c > shape.groups and is_even(shape, dtype),
        instantiation=words(3),
        instantiations=lambda dtype: {
            *(f"chunks x{blocks} 16-byte" for blocks in (1, 2, 3, 4)),
            *(f"words x1 {access}-byte" for access in (16, 8, 4)),
        },
        error=tf32_bound,
        least_outputs=1000,
        allow_tf32=True,
    ),
    Family(
        "depthwise",
        DEPTHWISE,
        ("3x3", "5x5", "3x3_stride2_by_4", "mixed", "twice"),
        takes=lambda shape, dtype: shape.c == shape.groups,
        instantiation=words(2),
        instantiations=of_depthwise,
    ),
    Family(
        "depthwise_toeplitz",
        TOEPLITZ,
        ("convnext_7", "over_a_tile", "channels_mod_2", "filter_9x9", "efficientnet_7"),
        takes=lambda shape, dtype: (
            shape.c == shape.groups == shape.k
            and shape.c % 2 == 0
            and shape.stride == shape.dilation == (1, 1)
            and 2 <= shape.s <= 9
        ),
        instantiation=lambda plan: f"{int(words(1)(plan).split()[0].split('x')[2]) // 16} filter rows",
        instantiations=lambda dtype: {"5 filter rows", "7 filter rows"},
        dtypes=HALVES,
    ),
    Family(
        "stem",
        STEMS,
        ("vgg", "mobile", "four_channels", "odd_width"),
        takes=lambda shape, dtype: shape.groups == 1 and shape.c <= 4,
        instantiation=lambda plan: words(1)(plan).split()[0].rpartition("x")[0],
        instantiations=lambda dtype: {"256x64", "256x32", "128x64", "128x32", "64x64", "64x32"},
        error=tf32_bound,
        least_outputs=500,
        formats=(contiguous, channels_last),
        allow_tf32=True,
    ),
)

BY_NAME = {family.name: family for family in FAMILIES}


def family_shape(family: str, name: str) -> ConvShape:
    """The shape of that name that reaches something of the family."""
    return next(shape for shape in BY_NAME[family].shapes if shape.name == name)


def plans_of_every_kernel() -> Iterator[tuple[Problem, str]]:
    """Integer problems, each with a plan to run it by."""
    for family in FAMILIES:
        for dtype in family.dtypes:
            for shape in family.shapes:
                problem = integer_problem(shape, dtype, Wanted(act="relu", residual_order="add_act"))
                for layout in family.formats:
                    placed = laid_out(problem, layout)
                    for plan in family.some(family.plans(placed), random.Random(0)):
                        yield placed, plan
