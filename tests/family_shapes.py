"""The shapes of each kernel family, beside those of tests/shapes.py that every kernel runs."""

from __future__ import annotations

from tests.shapes import table

# Larger than one tile of the implicit GEMM in every direction, each for one more property of the main loop.
GEMM = table("""
layer_14x14      | 1x64x14x14 64x3x3 pad 1        | a middle layer of ResNet
strided          | 1x160x9x9 136x3x3 stride 2, pad 1 | K over two tiles, C with a tail
pointwise        | 3x96x11x9 264x1x1              | a plain matrix product over several images
two_groups       | 2x64x9x9 160x3x3 pad 1, groups 2 | groups of 32 to 80 channels
deep_pointwise   | 2x320x4x4 80x1x1               | few pixels and many channels: splits
filter_of_mask   | 1x8x33x9 16x32x2 pad 1x0       | as many rows of taps as a mask takes
filter_over_mask | 1x8x34x9 16x33x2 pad 2x1       | more rows of taps than a mask takes
accesses_of_8    | 1x36x14x13 68x3x3 stride 1x2, pad 4x3, dilate 3x2 | channels mod 4, dilated
accesses_of_4    | 2x22x9x13 70x3x2 pad 1x0       | channels mod 2
""")

# For three multiprocessors: tiles in turn, what bulk copies and clusters have corners for.
HOPPER = table("""
many_tiles       | 3x72x15x14 200x1x1        | a plain product, several tiles to a block, tails all around
rows_and_columns | 2x64x12x13 136x3x3 pad 1  | several tiles to a block, whole chunks of channels
images_in_tile   | 9x64x5x5 40x3x3 pad 1     | many small images in a column of pixels
strides          | 2x64x17x15 72x3x3 stride 2x3, pad 1x2 | im2col steps over pixels
dilated          | 1x64x15x17 64x3x3 pad 2x3, dilate 2x3 | taps that lie apart
four_pads        | 2x64x9x8 48x4x3 pad 1x2x0x3 | another pad on each side
no_pads          | 1x64x11x12 64x5x2         | fewer outputs than inputs
late_layer       | 1x512x7x7 96x3x3 pad 1    | 72 steps for one tile: clusters of every size
wide_groups      | 2x128x7x6 176x3x3 pad 1, groups 2 | a group's channels are whole chunks, not its columns
odd_groups       | 1x144x6x7 80x3x3 pad 1, groups 2 | the copy would read the next group's channels
far_stride       | 2x64x19x10 64x1x1 stride 9x1 | a step that no map takes
far_pad          | 1x64x4x3 64x1x1 pad 135x0x0x0, stride 8x1 | a corner that no map takes
one_pixel        | 3x64x1x1 64x3x3 pad 1     | all but the middle tap is padding
few_channels     | 1x8x9x12 40x3x3 pad 1     | most of a chunk lies behind the channels
many_columns     | 2x64x9x7 580x1x1          | columns of tiles in two bands, the second narrower
""")

# Rows that end within a tile, and columns that end within eight channels or with them.
AHEAD = table("""
short | 2x32x13x11 72x1x1     | the residual is under way beside the operands
long  | 1x64x9x13 68x3x3 pad 1 | the residual comes behind the operands
""")

# 9 and 5 channels leave accesses of 4 bytes to float32.
ODD = table("""
odd | 1x9x12x12 40x3x3 pad 1 | accesses of one float32
""")

FEW_PIXELS = table("""
squeeze        | 1x480x1x1 20x1x1               | 60 16-bit chunks: not a power of two, and K has a tail
excite         | 2x24x1x1 200x1x1               | 3 chunks for teams of 4 lanes, two rows of four
deep           | 3x2080x1x1 3x1x1               | K = 3: every warp of a block on one reduction, several steps
one_chunk      | 5x8x1x1 70x1x1                 | a single 16-bit chunk: teams of one lane
row_tiles      | 19x72x1x1 40x1x1               | rows in three tiles of 8, the last with 3
pixels         | 1x64x4x4 24x1x1                | 16 pixels of one image
most_pixels    | 4x16x8x8 9x1x1                 | as many pixels as it takes
strided_pixels | 2x32x5x3 24x1x1 stride 2       | 1x1 that skips pixels
chunks_of_8    | 2x20x1x1 33x1x1                | 8-byte loads in 16-bit types, half a chunk at the end
chunks_of_4    | 9x38x1x1 18x1x1                | 4-byte loads in 16-bit types, with a tail
odd            | 4x47x1x1 19x1x1                | odd channel counts: value by value
one_channel    | 2x1x1x1 25x1x1                 | C = 1
one_filter     | 6x100x1x1 1x1x1                | K = 1
full_window    | 2x32x5x4 18x5x4                | a filter as large as the image
border         | 1x24x4x4 10x3x3 pad 1          | 16 pixels, most windows over the border
middle_tap     | 3x16x1x1 12x3x3 pad 1          | 3x3 on one pixel: the rest is padding
padded_1x1     | 1x16x2x2 9x1x1 stride 2x3, pad 1x2 | a padded 1x1 filter: whole windows of padding
everything     | 2x24x9x8 12x3x2 stride 4x3, pad 0x2x1x0, dilate 2x3, groups 3 | all options at once
odd_groups     | 2x15x3x3 35x2x2 groups 5       | five groups of 3 to 7 channels
depthwise      | 1x10x3x3 20x3x3 groups 10      | depthwise with multiplier 2
""")

GROUPED = table("""
of_8               | 1x32x14x14 32x3x3 pad 1, groups 4 | nine chunks: the last step has but one
of_4               | 2x24x9x9 24x3x3 pad 1, groups 6 | two words a tap, half an octet of columns
of_2_to_4          | 1x16x8x17 32x3x3 pad 1, groups 8 | one word a tap
of_6_to_5          | 1x30x9x12 25x3x3 stride 1x2, pad 1, groups 5 | three words a tap, columns start odd
of_12_to_20        | 1x24x6x7 40x3x3 pad 1, groups 2 | words, and several octets of columns
of_16              | 1x96x7x7 96x3x3 pad 1, groups 6 | six groups: the last slab has fewer of them
of_24              | 2x48x10x9 48x3x3 stride 2, pad 1, groups 2 | three octets of columns, stride 2
of_32_to_44        | 1x64x5x20 88x3x3 pad 1, groups 2 | the last share of a group's columns is smaller
of_64              | 1x128x5x9 128x3x3 pad 1, groups 2 | wide groups
pointwise          | 3x32x6x6 64x1x1 groups 4       | one chunk in all: the first step is the last
dilated            | 1x16x15x13 16x5x4 pad 4x3, dilate 2, groups 2 | a large filter, spread
phases             | 2x16x14x25 16x3x3 stride 2x3, pad 1x2, dilate 1x2, groups 2 | differs by direction
stride_over_filter | 1x16x9x40 16x1x2 stride 3x4, pad 0x1, groups 2 | columns that nothing reads
long_row           | 1x16x2x90 16x1x3 pad 0x1, groups 2 | a row of more pixels than a warp takes
tall               | 1x16x40x3 16x3x1 pad 1x0, groups 2 | a column of pixels, an octet each
one_pixel          | 3x32x1x1 32x3x3 pad 1, groups 4 | all but the middle tap is padding
no_padding         | 1x16x8x8 16x3x3 pad 0x1x0x2, groups 2 | four different pads, some of them 0
dense              | 2x40x9x11 72x3x3 pad 1         | one group, the last of its column shares narrow
dense_words        | 1x20x9x10 36x3x3 stride 2, pad 1 | one group of words, stride 2
dense_1x1          | 3x96x7x7 88x1x1                | one group and one tap
""")

# Around strips of 7 columns, bands of up to 16 rows, slabs of up to 8 chunks of 16 bytes, and 128 threads.
DEPTHWISE = table("""
# filters with a version of their own
3x3         | 2x64x14x14 64x3x3 pad 1, groups 64 | whole strips, a whole slab of half
5x5         | 3x72x7x7 72x5x5 pad 2, groups 72 | a block over several images, two slabs of 5
7x7         | 1x24x17x9 24x7x7 pad 3, groups 24 | two bands of 9 rows, one too many
3x3_stride2 | 2x16x33x29 16x3x3 stride 2, pad 1, groups 16 | a strip of one column left
5x5_stride2 | 2x24x18x17 24x5x5 stride 2, pad 2, groups 24 | even height, odd width
7x7_stride2 | 1x40x16x18 40x7x7 stride 2, pad 3, groups 40 | a lone row of taps at each border
# narrow accesses
3x3_by_8         | 2x20x9x8 20x3x3 pad 1, groups 20 | channels mod 4: accesses of 8 in half
5x5_by_4         | 1x22x8x15 22x5x5 pad 2, groups 22 | channels mod 2: accesses of 4 in half
7x7_by_4         | 1x6x8x8 6x7x7 pad 3, groups 6  | less than a chunk of half
3x3_stride2_by_4 | 2x70x9x10 70x3x3 stride 2, pad 1, groups 70 | two slabs, a partial chunk
5x5_stride2_by_8 | 1x12x13x16 12x5x5 stride 2, pad 1x2x1x2, groups 12 | TensorFlow's pads
7x7_stride2_by_4 | 1x10x14x13 10x7x7 stride 2, pad 2x3, groups 10 | less than a chunk and a half
5x5_stride2_by_2 | 1x6x9x8 6x5x5 stride 2, pad 2, groups 6 | accesses of 4 in float32 too
# any filter
1x1         | 2x48x7x7 48x1x1 groups 48      | one tap
1x11        | 1x16x9x15 16x1x11 pad 0x5, groups 16 | one row of taps
11x1        | 1x20x15x9 20x11x1 pad 5x0, groups 20 | one column of taps, narrow accesses
9x9         | 1x18x10x9 18x9x9 pad 4, groups 18 | three passes over the weights
dilated     | 1x16x18x17 16x5x5 pad 4, dilate 2, groups 16 | taps apart
mixed       | 2x8x13x15 8x3x2 stride 2x3, pad 2x1, dilate 3x2, groups 8 | all differs by direction
3x3_stride3 | 1x8x14x23 8x3x3 stride 3, groups 8 | a stride without a version of its own
far_stride  | 2x8x5x40 8x2x2 stride 4x9, groups 8 | pixels that nobody reads
twice       | 2x12x9x15 24x3x3 stride 2, pad 1, groups 12 | multiplier 2
thrice      | 1x21x7x7 63x5x5 pad 2, groups 21 | multiplier 3, two slabs of half
odd         | 1x13x8x9 13x3x3 pad 1, groups 13 | odd channels
one_channel | 2x1x9x8 5x3x3 pad 1            | C = 1, and then K = 5
all_padding | 1x8x3x4 8x3x3 pad 4x9, groups 8 | outputs that read only padding
one_pixel   | 5x8x1x1 8x3x3 pad 1, groups 8  | only the middle tap counts
""")

# A tile is at most 16 strips of 4 x 8 outputs by 16 channels.
TOEPLITZ = table("""
convnext_14         | 2x32x14x14 32x7x7 pad 3, groups 32 | the commonest wide filter, two slabs of channels
convnext_7          | 5x16x7x7 16x7x7 pad 3, groups 16 | several small images in a tile, the last one partly
efficientnet_7      | 3x24x7x7 24x5x5 pad 2, groups 24 | a slab of 8 channels at the end, as wide loads
mobilenet_28        | 1x16x28x28 16x5x5 pad 2, groups 16 | a tile's whole height, four strips across
over_a_tile         | 1x16x21x45 16x7x7 pad 3, groups 16 | tiles in both directions, halos, tails in both
wide_image          | 1x16x5x131 16x5x5 pad 2, groups 16 | sixteen strips across, and more
high_image          | 1x16x70x5 16x7x3 pad 3x1, groups 16 | sixteen strips down, and more
channels_mod_4      | 2x20x9x11 20x7x7 pad 3, groups 20 | 8-byte aligned pixels: narrow loads
channels_mod_2      | 2x38x9x6 38x5x7 pad 2x3, groups 38 | 4-byte aligned pixels, a tail of 6 channels
two_channels        | 1x2x8x9 2x3x3 pad 1, groups 2  | as few channels as loads of 4 bytes allow
filter_2x2          | 1x16x6x9 16x2x2 pad 0x1, groups 16 | the narrowest filter, more columns out than in
filter_1x8          | 1x16x5x19 16x1x8 pad 0x3, groups 16 | one row of taps, an even filter
filter_9x9          | 1x16x13x14 16x9x9 pad 4, groups 16 | the widest filter, two passes and a row of zeros
filter_3x9          | 2x16x6x17 16x3x9 pad 1x4, groups 16 | wider than high
filter_31x5         | 1x16x33x9 16x31x5 pad 15x2, groups 16 | many passes
filter_11x4         | 1x16x12x12 16x11x4 pad 5x2, groups 16 | a pass that starts within a strip's rows
filter_image        | 2x16x7x7 16x7x7 groups 16      | one output pixel
filter_over_image   | 1x16x3x2 16x7x7 pad 3, groups 16 | every output reads padding
padding_asymmetric  | 2x16x10x9 16x4x6 pad 1x2x0x5, groups 16 | four different pads, an even filter
padding_over_filter | 1x16x4x5 16x3x5 pad 6x9, groups 16 | whole strips see only zeros
one_row             | 3x16x1x23 16x5x5 pad 2, groups 16 | H = 1
one_column          | 3x16x23x1 16x5x5 pad 2, groups 16 | W = 1
""")

# Each for one more property of the window of x, of the words of the reduction or of their chunks.
STEMS = table("""
resnet             | 1x3x21x32 72x7x7 stride 2, pad 3 | units, a lead, two tiles of channels
mobile             | 2x3x20x24 24x3x3 stride 2, pad 1 | units, a lead, half a tile of channels
vgg                | 1x3x18x16 40x3x3 pad 1         | units of pixels that are padded to four values
patchify           | 2x3x16x24 48x4x4 stride 4      | no padding: no lead
alexnet            | 1x3x27x32 9x11x11 stride 4, pad 2 | a lead of none, many words
shortcut           | 2x3x9x16 33x1x1 stride 2       | a run of two words, half of the pixels unread
odd_width          | 1x3x13x15 16x3x3 stride 2, pad 1 | rows that end within a unit
even_run           | 1x3x9x16 8x4x4 stride 2, pad 1 | a lead before a run of whole words
one_of_two         | 2x1x9x13 8x3x3 stride 2, pad 1 | C = 1 with a lead
two_channels       | 1x2x9x7 10x3x3 pad 1           | a pixel is a word
four_channels      | 2x4x9x11 64x5x3 pad 2x1        | a pixel is two words
dilated            | 1x3x13x16 8x3x3 stride 2, pad 2, dilate 2x3 | taps apart in the window
skips_rows         | 2x3x19x22 8x3x2 stride 5x4, pad 1x0 | rows between windows are left out
skips_dilated      | 1x3x31x16 8x3x2 stride 9x2, pad 1, dilate 3x1 | the same, dilated
patches            | 1x3x32x48 40x16x16 stride 16   | a patch embedding
large_patches      | 1x3x64x96 40x32x32 stride 32   | chunks of patches, rows left out
long_filter        | 1x3x40x15 9x37x13 stride 2, pad 4x5 | chunks of a window, the last one short
padding_over_image | 1x3x3x8 8x3x3 stride 2, pad 9x11 | windows of zeros only
asymmetric         | 1x3x9x16 8x3x3 stride 2, pad 0x2x1x4 | four different pads
mixed_strides      | 1x3x9x16 8x3x3 stride 2x3, pad 1 | an odd stride across, an even one down
""")
