"""The convolution shapes that tests run, each with the reason it is there.

They are small enough for the simulator (well under a second each) and chosen around a tile of 64 output
pixels by 64 output channels, with reductions taken 32 products at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_cna.problem import four_pads

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvShape:
    """One convolution: x is (n, c, h, w), weight is (k, c / groups, r, s).

    `padding` is (height, width) or (top, bottom, left, right).
    """

    name: str
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    reason: str
    stride: Pair = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """(top, bottom, left, right)"""
        top, bottom, left, right = four_pads(self.padding)
        return (top, bottom, left, right)

    @property
    def p(self) -> int:
        top, bottom, _, _ = self.pads
        return (self.h + top + bottom - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def q(self) -> int:
        _, _, left, right = self.pads
        return (self.w + left + right - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1

    @property
    def x_size(self) -> tuple[int, int, int, int]:
        return (self.n, self.c, self.h, self.w)

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return (self.k, self.c // self.groups, self.r, self.s)

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        return (self.n, self.k, self.p, self.q)

    @property
    def reduction(self) -> int:
        """Products summed into one output element, padding included."""
        return self.r * self.s * self.c // self.groups

    @property
    def products(self) -> int:
        return self.n * self.p * self.q * self.k * self.reduction

    def options(self) -> dict[str, object]:
        """The keyword arguments of `fused_cna.conv_norm_act` that describe this convolution."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }


def table(text: str) -> tuple[ConvShape, ...]:
    """The shapes of a table with a line for each: its name, the convolution, and why it is there.

    A convolution is `NxCxHxW KxRxS` and what it has of `stride 2`, `pad 1x0`, `dilate 2x3` and `groups 4`;
    one number stands for both directions, and four pads are top, bottom, left and right.
    """
    lines = [line for line in text.strip().splitlines() if not line.startswith("#")]
    return tuple(_shape(*(part.strip() for part in line.split(" | "))) for line in lines)


def _shape(name: str, convolution: str, reason: str) -> ConvShape:
    x, weight, *words = convolution.replace(",", "").split()
    options = dict(zip(words[::2], (_numbers(word) for word in words[1::2]), strict=True))
    (groups,) = options.pop("groups", (1,))
    stride, padding, dilation = (
        given * 2 if len(given) == 1 else given
        for given in (options.pop("stride", (1,)), options.pop("pad", (0,)), options.pop("dilate", (1,)))
    )
    assert not options, f"{name}: {options}"
    sizes = (*_numbers(x), *_numbers(weight))
    return ConvShape(name, *sizes, reason, stride, padding, dilation, groups)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


SHAPES = table("""
# the common layers of real networks, scaled down
3x3                    | 1x8x8x8 8x3x3 pad 1    | the commonest dense layer
1x1                    | 2x16x6x5 24x1x1        | half of all convolutions: a plain matrix product
3x3_stride2            | 2x8x9x8 16x3x3 stride 2, pad 1 | downsampling, odd height and even width
1x1_stride2            | 1x16x7x8 16x1x1 stride 2 | a ResNet shortcut: most pixels are skipped
stem_7x7               | 1x3x19x19 16x7x7 stride 2, pad 3 | ResNet's first layer: C = 3
stem_3x3               | 2x3x12x10 8x3x3 stride 2, pad 1 | a mobile network's first layer: C = 3
depthwise_3x3          | 1x16x9x9 16x3x3 pad 1, groups 16 | depthwise
depthwise_5x5_stride2  | 1x12x11x9 12x5x5 stride 2, pad 2, groups 12 | depthwise, odd channels per 16 bytes
depthwise_twice        | 2x6x7x7 12x3x3 pad 1, groups 6 | depthwise with multiplier 2
squeeze_excite         | 3x24x1x1 10x1x1        | 1x1 on a one-pixel image: M is the batch
# tiles: several blocks each way, exact fits and tails
one_exact_tile         | 1x32x8x8 64x1x1        | M, K and the reduction fill one tile and one chunk exactly
many_pixels            | 3x5x13x11 7x3x3 pad 1  | several blocks of pixels, the last one partly empty
many_filters           | 1x9x4x4 150x3x3 pad 1  | several blocks of output channels, the last one partly empty
many_blocks            | 2x6x9x9 70x3x3 pad 1   | several blocks in both directions, tails in both
many_chunks            | 1x72x5x5 20x3x3 pad 1  | a reduction of 648: over 20 chunks and a tail
long_reduction         | 1x256x3x3 8x3x3 pad 1  | a reduction of 2304: a single running sum would show
tile_plus_one          | 1x33x5x13 65x1x1       | one more than a tile of pixels, of channels and of products
tile_less_one          | 1x31x7x9 63x1x1        | one less than a tile of pixels, of channels and of products
batch_across_tile      | 5x4x5x5 8x3x3 pad 1    | a tile of pixels spans several images
# groups
groups_wide            | 1x32x6x6 64x3x3 pad 1, groups 2 | two groups of 16 to 32 channels
groups_narrow          | 2x24x6x5 24x3x3 pad 1, groups 6 | six groups of 4 channels (ResNeXt)
groups_odd             | 1x9x7x6 15x3x2 stride 2x1, pad 1x0, groups 3 | three groups of 3 to 5 channels
groups_over_tile       | 1x8x4x4 140x1x1 groups 2 | two groups, each with more filters than a tile
groups_stride_dilation | 2x8x12x11 12x3x3 stride 2x3, pad 2x1, dilate 2x1, groups 4 | all options at once
# strides, dilation, padding
stride3                | 1x4x13x14 6x3x3 stride 3, pad 1 | stride as wide as the filter
stride_over_filter     | 1x5x11x9 6x2x2 stride 3 | stride wider than the filter: pixels never read
stride_mixed           | 2x6x9x12 8x3x3 stride 1x3, pad 1 | another stride in each direction
dilation2              | 1x6x9x10 8x3x3 pad 2, dilate 2 | atrous, output as large as the input
dilation_mixed         | 1x4x12x10 7x3x2 stride 2x1, pad 2x3, dilate 3x2 | another dilation in each direction
dilation_over_image    | 1x4x5x6 4x3x3 pad 7x8, dilate 7x8 | every tap but the middle one is padding
padding_over_filter    | 1x4x4x5 6x2x3 pad 4x5  | padding wider than the filter: whole outputs see only zeros
padding_1x1            | 1x5x3x4 6x1x1 stride 2x1, pad 1x2 | a padded 1x1 filter: a border of act(norm(0))
padding_mixed          | 1x6x7x6 5x3x3 pad 0x2  | padding in one direction only
padding_asymmetric     | 2x6x8x7 8x3x3 stride 2x1, pad 0x1x2x3 | four different pads
padding_same_even      | 1x5x7x8 6x4x2 pad 1x2x0x1 | 'same' with an even filter: one pad more at the end
padding_one_side       | 1x3x6x6 4x3x3 stride 2, pad 0x1x0x1 | TensorFlow's stride 2 'same': pads at the end
# filters
filter_1x7             | 1x6x5x11 10x1x7 pad 0x3 | 1xN filter (Inception)
filter_7x1             | 1x6x11x5 10x7x1 pad 3x0 | Nx1 filter (Inception)
filter_even            | 1x6x8x9 8x2x4          | even filter without padding
filter_image           | 2x8x5x4 12x5x4         | filter as large as the image: one output pixel
filter_over_image      | 1x4x3x3 5x5x5 pad 2x1  | filter larger than the image, saved by padding
filter_11x11           | 1x2x17x16 4x11x11 stride 4, pad 2 | AlexNet's first filter
# degenerate extents and odd channel counts
one_pixel              | 1x8x1x1 8x3x3 pad 1    | 3x3 on one pixel: only the middle tap counts
all_ones               | 1x1x1x1 1x1x1          | every extent is 1
one_channel            | 2x1x7x8 5x3x3 pad 1    | C = 1
one_filter             | 2x10x7x6 1x3x3 pad 1   | K = 1
one_row                | 2x6x1x19 8x1x3 pad 0x1 | H = 1: a one-dimensional convolution
one_column             | 2x6x19x1 8x3x1 stride 2x1, pad 1x0 | W = 1
odd_channels           | 1x13x6x7 17x3x3 pad 1  | no vector load fits
channels_mod_4         | 1x20x5x6 36x3x3 pad 1  | 8-byte but not 16-byte aligned pixels in 16-bit types
channels_mod_2         | 1x18x5x6 22x1x1        | 4-byte aligned pixels in 16-bit types
empty_batch            | 0x8x6x6 8x3x3 pad 1    | batch 0: an empty output and no launch
empty_batch_groups     | 0x8x6x5 16x3x3 stride 2, pad 1, groups 4 | batch 0 with groups and stride
""")

_BY_NAME = {shape.name: shape for shape in SHAPES}

TELLING_SHAPES: tuple[ConvShape, ...] = tuple(
    _BY_NAME[name]
    for name in ("3x3_stride2", "tile_plus_one", "groups_odd", "depthwise_3x3", "padding_asymmetric")
)
"""A few that reach borders, tails, groups and several blocks, for tests that vary something else."""


def shape_named(name: str) -> ConvShape:
    """The shape of that name; KeyError lists none, so a typo fails at once."""
    return _BY_NAME[name]
