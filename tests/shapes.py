"""The convolution shapes that tests run, each with the reason it is there.

They are small enough for the simulator (well under a second each) and chosen around a tile of 64 output
pixels by 64 output channels, with reductions taken 32 products at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        if len(self.padding) == 2:
            pad_h, pad_w = self.padding
            return (pad_h, pad_h, pad_w, pad_w)
        top, bottom, left, right = self.padding
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


SHAPES: tuple[ConvShape, ...] = (
    # the common layers of real networks, scaled down
    ConvShape("3x3", 1, 8, 8, 8, 8, 3, 3, "the commonest dense layer", padding=(1, 1)),
    ConvShape("1x1", 2, 16, 6, 5, 24, 1, 1, "half of all convolutions: a plain matrix product"),
    ConvShape("3x3_stride2", 2, 8, 9, 8, 16, 3, 3, "downsampling, odd height and even width", (2, 2), (1, 1)),
    ConvShape("1x1_stride2", 1, 16, 7, 8, 16, 1, 1, "a ResNet shortcut: most pixels are skipped", (2, 2)),
    ConvShape("stem_7x7", 1, 3, 19, 19, 16, 7, 7, "ResNet's first layer: C = 3", (2, 2), (3, 3)),
    ConvShape("stem_3x3", 2, 3, 12, 10, 8, 3, 3, "a mobile network's first layer: C = 3", (2, 2), (1, 1)),
    ConvShape("depthwise_3x3", 1, 16, 9, 9, 16, 3, 3, "depthwise", padding=(1, 1), groups=16),
    ConvShape(
        "depthwise_5x5_stride2",
        1,
        12,
        11,
        9,
        12,
        5,
        5,
        "depthwise, odd channels per 16 bytes",
        (2, 2),
        (2, 2),
        (1, 1),
        12,
    ),
    ConvShape(
        "depthwise_twice", 2, 6, 7, 7, 12, 3, 3, "depthwise with multiplier 2", padding=(1, 1), groups=6
    ),
    ConvShape("squeeze_excite", 3, 24, 1, 1, 10, 1, 1, "1x1 on a one-pixel image: M is the batch"),
    # tiles: several blocks each way, exact fits and tails
    ConvShape(
        "one_exact_tile", 1, 32, 8, 8, 64, 1, 1, "M, K and the reduction fill one tile and one chunk exactly"
    ),
    ConvShape(
        "many_pixels",
        3,
        5,
        13,
        11,
        7,
        3,
        3,
        "several blocks of pixels, the last one partly empty",
        padding=(1, 1),
    ),
    ConvShape(
        "many_filters",
        1,
        9,
        4,
        4,
        150,
        3,
        3,
        "several blocks of output channels, the last one partly empty",
        padding=(1, 1),
    ),
    ConvShape(
        "many_blocks",
        2,
        6,
        9,
        9,
        70,
        3,
        3,
        "several blocks in both directions, tails in both",
        padding=(1, 1),
    ),
    ConvShape(
        "many_chunks", 1, 72, 5, 5, 20, 3, 3, "a reduction of 648: over 20 chunks and a tail", padding=(1, 1)
    ),
    ConvShape(
        "long_reduction",
        1,
        256,
        3,
        3,
        8,
        3,
        3,
        "a reduction of 2304: a single running sum would show",
        padding=(1, 1),
    ),
    ConvShape(
        "tile_plus_one", 1, 33, 5, 13, 65, 1, 1, "one more than a tile of pixels, of channels and of products"
    ),
    ConvShape(
        "tile_less_one", 1, 31, 7, 9, 63, 1, 1, "one less than a tile of pixels, of channels and of products"
    ),
    ConvShape(
        "batch_across_tile", 5, 4, 5, 5, 8, 3, 3, "a tile of pixels spans several images", padding=(1, 1)
    ),
    # groups
    ConvShape(
        "groups_wide", 1, 32, 6, 6, 64, 3, 3, "two groups of 16 to 32 channels", padding=(1, 1), groups=2
    ),
    ConvShape(
        "groups_narrow", 2, 24, 6, 5, 24, 3, 3, "six groups of 4 channels (ResNeXt)", padding=(1, 1), groups=6
    ),
    ConvShape(
        "groups_odd", 1, 9, 7, 6, 15, 3, 2, "three groups of 3 to 5 channels", (2, 1), (1, 0), (1, 1), 3
    ),
    ConvShape(
        "groups_over_tile", 1, 8, 4, 4, 140, 1, 1, "two groups, each with more filters than a tile", groups=2
    ),
    ConvShape(
        "groups_stride_dilation",
        2,
        8,
        12,
        11,
        12,
        3,
        3,
        "groups, stride and dilation at once",
        (2, 3),
        (2, 1),
        (2, 1),
        4,
    ),
    # strides, dilation, padding
    ConvShape("stride3", 1, 4, 13, 14, 6, 3, 3, "stride as wide as the filter", (3, 3), (1, 1)),
    ConvShape(
        "stride_over_filter", 1, 5, 11, 9, 6, 2, 2, "stride wider than the filter: pixels never read", (3, 3)
    ),
    ConvShape("stride_mixed", 2, 6, 9, 12, 8, 3, 3, "another stride in each direction", (1, 3), (1, 1)),
    ConvShape(
        "dilation2",
        1,
        6,
        9,
        10,
        8,
        3,
        3,
        "atrous, output as large as the input",
        padding=(2, 2),
        dilation=(2, 2),
    ),
    ConvShape(
        "dilation_mixed", 1, 4, 12, 10, 7, 3, 2, "another dilation in each direction", (2, 1), (2, 3), (3, 2)
    ),
    ConvShape(
        "dilation_over_image",
        1,
        4,
        5,
        6,
        4,
        3,
        3,
        "every tap but the middle one is padding",
        padding=(7, 8),
        dilation=(7, 8),
    ),
    ConvShape(
        "padding_over_filter",
        1,
        4,
        4,
        5,
        6,
        2,
        3,
        "padding wider than the filter: whole outputs see only zeros",
        padding=(4, 5),
    ),
    ConvShape(
        "padding_1x1", 1, 5, 3, 4, 6, 1, 1, "a padded 1x1 filter: a border of act(norm(0))", (2, 1), (1, 2)
    ),
    ConvShape("padding_mixed", 1, 6, 7, 6, 5, 3, 3, "padding in one direction only", padding=(0, 2)),
    ConvShape("padding_asymmetric", 2, 6, 8, 7, 8, 3, 3, "four different pads", (2, 1), (0, 1, 2, 3)),
    ConvShape(
        "padding_same_even",
        1,
        5,
        7,
        8,
        6,
        4,
        2,
        "'same' with an even filter: one pad more at the end",
        padding=(1, 2, 0, 1),
    ),
    ConvShape(
        "padding_one_side",
        1,
        3,
        6,
        6,
        4,
        3,
        3,
        "TensorFlow's stride 2 'same': pads at the end only",
        (2, 2),
        (0, 1, 0, 1),
    ),
    # filters
    ConvShape("filter_1x7", 1, 6, 5, 11, 10, 1, 7, "1xN filter (Inception)", padding=(0, 3)),
    ConvShape("filter_7x1", 1, 6, 11, 5, 10, 7, 1, "Nx1 filter (Inception)", padding=(3, 0)),
    ConvShape("filter_even", 1, 6, 8, 9, 8, 2, 4, "even filter without padding"),
    ConvShape("filter_image", 2, 8, 5, 4, 12, 5, 4, "filter as large as the image: one output pixel"),
    ConvShape(
        "filter_over_image",
        1,
        4,
        3,
        3,
        5,
        5,
        5,
        "filter larger than the image, saved by padding",
        padding=(2, 1),
    ),
    ConvShape("filter_11x11", 1, 2, 17, 16, 4, 11, 11, "AlexNet's first filter", (4, 4), (2, 2)),
    # degenerate extents and odd channel counts
    ConvShape(
        "one_pixel", 1, 8, 1, 1, 8, 3, 3, "3x3 on one pixel: only the middle tap counts", padding=(1, 1)
    ),
    ConvShape("all_ones", 1, 1, 1, 1, 1, 1, 1, "every extent is 1"),
    ConvShape("one_channel", 2, 1, 7, 8, 5, 3, 3, "C = 1", padding=(1, 1)),
    ConvShape("one_filter", 2, 10, 7, 6, 1, 3, 3, "K = 1", padding=(1, 1)),
    ConvShape("one_row", 2, 6, 1, 19, 8, 1, 3, "H = 1: a one-dimensional convolution", padding=(0, 1)),
    ConvShape("one_column", 2, 6, 19, 1, 8, 3, 1, "W = 1", (2, 1), (1, 0)),
    ConvShape("odd_channels", 1, 13, 6, 7, 17, 3, 3, "no vector load fits", padding=(1, 1)),
    ConvShape(
        "channels_mod_4",
        1,
        20,
        5,
        6,
        36,
        3,
        3,
        "8-byte but not 16-byte aligned pixels in 16-bit types",
        padding=(1, 1),
    ),
    ConvShape("channels_mod_2", 1, 18, 5, 6, 22, 1, 1, "4-byte aligned pixels in 16-bit types"),
    ConvShape("empty_batch", 0, 8, 6, 6, 8, 3, 3, "batch 0: an empty output and no launch", padding=(1, 1)),
    ConvShape(
        "empty_batch_groups",
        0,
        8,
        6,
        5,
        16,
        3,
        3,
        "batch 0 with groups and stride",
        (2, 2),
        (1, 1),
        (1, 1),
        4,
    ),
)

_BY_NAME = {shape.name: shape for shape in SHAPES}

TELLING_SHAPES: tuple[ConvShape, ...] = tuple(
    _BY_NAME[name]
    for name in ("3x3_stride2", "tile_plus_one", "groups_odd", "depthwise_3x3", "padding_asymmetric")
)
"""A few that reach borders, tails, groups and several blocks, for tests that vary something else."""


def shape_named(name: str) -> ConvShape:
    """The shape of that name; KeyError lists none, so a typo fails at once."""
    return _BY_NAME[name]
