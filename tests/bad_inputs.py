"""The table of calls that must be refused, with the words and numbers of the refusal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.reference import ACTIVATIONS, Problem, Wanted, random_problem
from tests.shapes import ConvShape

BASE = random_problem(
    ConvShape(
        "base", 2, 4, 6, 5, 8, 3, 3, "every extent another, but C and the filter", padding=(1, 1), groups=2
    ),
    torch.float32,
    Wanted("relu", residual_order="add_act"),
)
HUGE = 2**62


@dataclass(frozen=True)
class Bad:
    """BASE with some changes, the wording expected, and the numbers that the message must contain."""

    name: str
    changes: dict[str, Any]
    wording: str
    numbers: tuple[object, ...]
    like_torch: bool = field(default=False)

    def __str__(self) -> str:
        return self.name

    @property
    def problem(self) -> Problem:
        return BASE.replace(**self.changes)


def like_torch(name: str, changes: dict[str, Any], wording: str, *numbers: object) -> Bad:
    """torch.conv2d refuses it too, in the same words."""
    return Bad(name, {"residual": None, **changes}, wording, numbers, like_torch=True)


def own(name: str, changes: dict[str, Any], wording: str, *numbers: object) -> Bad:
    return Bad(name, changes, wording, numbers)


def ones(*size: int, **options: Any) -> Tensor:
    return torch.ones(size, **options)


BAD: tuple[Bad, ...] = (
    like_torch(
        "x_channels", {"x": ones(2, 5, 6, 7)}, "to have 4 channels, but got 5 channels", "[2, 5, 6, 7]"
    ),
    like_torch(
        "x_channels_times_groups", {"x": ones(2, 2, 6, 7)}, "to have 4 channels, but got 2", "[8, 2, 3, 3]"
    ),
    like_torch("x_2d", {"x": ones(6, 5)}, "3D (unbatched) or 4D (batched) input to conv2d", "[6, 5]"),
    like_torch("x_5d", {"x": ones(1, 2, 4, 6, 5)}, "4D (batched) input to conv2d", "[1, 2, 4, 6, 5]"),
    like_torch("groups_zero", {"groups": 0}, "non-positive groups is not supported", 0),
    like_torch("groups_negative", {"groups": -2}, "non-positive groups is not supported", -2),
    like_torch(
        "filters_not_divisible",
        {"weight": ones(7, 2, 3, 3), "bias": None},
        "expected weight to be divisible by 2 at dimension 0",
        "[7, 2, 3, 3]",
    ),
    like_torch(
        "fewer_filters_than_groups",
        {"weight": ones(1, 2, 3, 3)},
        "to be at least 2 at dimension 0",
        "[1, 2, 3, 3]",
    ),
    like_torch("no_filters", {"weight": ones(0, 2, 3, 3)}, "to be at least 2 at dimension 0", "[0, 2, 3, 3]"),
    like_torch("bias_length", {"bias": ones(7)}, "expected bias to be 1-dimensional with 8 elements", "[7]"),
    like_torch(
        "bias_2d", {"bias": ones(8, 1)}, "expected bias to be 1-dimensional with 8 elements", "[8, 1]"
    ),
    like_torch("stride_zero", {"stride": (0, 1)}, "non-positive stride is not supported", "[0, 1]"),
    like_torch("stride_negative", {"stride": (1, -1)}, "non-positive stride is not supported", "[1, -1]"),
    like_torch(
        "stride_triple",
        {"stride": (1, 1, 3)},
        "expected stride to be a single integer value or a list of 2",
        "[1, 1, 3]",
    ),
    own(
        "dilation_zero",
        {"dilation": (0, 1), "residual": None},
        "dilation should be greater than zero",
        "[0, 1]",
    ),
    like_torch("dilation_negative", {"dilation": (1, -3)}, "dilation should be greater than zero", "[1, -3]"),
    like_torch(
        "dilation_triple",
        {"dilation": (1, 1, 2)},
        "expected dilation to be a single integer value or a list of 2",
        "[1, 1, 2]",
    ),
    like_torch("padding_negative", {"padding": (-1, 1)}, "negative padding is not supported", "[-1, 1]"),
    like_torch(
        "padding_triple",
        {"padding": (1, 1, 2)},
        "expected padding to be a single integer value or a list of 2",
        "[1, 1, 2]",
    ),
    like_torch(
        "filter_too_large",
        {"weight": ones(8, 2, 9, 3)},
        "Kernel size can't be greater than actual input size",
        "(8 x 7)",
        "(9 x 3)",
    ),
    like_torch(
        "filter_too_large_dilated",
        {"dilation": (1, 4)},
        "Kernel size can't be greater than actual input size",
        "(8 x 7)",
        "(3 x 9)",
    ),
    like_torch(
        "empty_image",
        {"x": ones(2, 4, 0, 5)},
        "Kernel size can't be greater than actual input size",
        "(2 x 7)",
        "(3 x 3)",
    ),
    like_torch(
        "empty_batch_of_small_images",
        {"x": ones(0, 4, 1, 1), "padding": (0, 0)},
        "Kernel size can't be greater",
        "(1 x 1)",
    ),
    like_torch("x_half", {"x": ones(2, 4, 6, 5, dtype=torch.float16)}, "should be the same"),
    like_torch(
        "weight_half", {"weight": ones(8, 2, 3, 3, dtype=torch.float16), "bias": None}, "should be the same"
    ),
    like_torch("bias_double", {"bias": ones(8, dtype=torch.float64)}, "should be the same"),
    own("filter_without_rows", {"weight": ones(8, 2, 0, 3), "residual": None}, "[8, 2, 0, 3]"),
    own("weight_3d", {"weight": ones(8, 2, 3)}, "[8, 2, 3]"),
    own("weight_5d", {"weight": ones(8, 2, 3, 3, 3)}, "[8, 2, 3, 3, 3]"),
    own(
        "padding_four_negative",
        {"padding": (1, 1, 1, -2)},
        "negative padding is not supported",
        "[1, 1, 1, -2]",
    ),
    own(
        "padding_huge",
        {"padding": (2**62, 1), "residual": None},
        "padding should be at most",
        2**62,
        2**31 - 1,
    ),
    own("padding_five", {"padding": (1, 1, 1, 1, 1)}, "padding", "[1, 1, 1, 1, 1]"),
    own(
        "dilation_overflow",
        {"dilation": (HUGE, 1), "residual": None},
        "Kernel size can't be greater",
        "(8 x 7)",
    ),
    own("running_mean_length", {"running_mean": ones(7)}, "running_mean", 7, 8),
    own("running_var_length", {"running_var": ones(9)}, "running_var", 9, 8),
    own("norm_weight_length", {"norm_weight": ones(1)}, "norm_weight", 1, 8),
    own("norm_bias_length", {"norm_bias": ones(4)}, "norm_bias", 4, 8),
    own("norm_vector_2d", {"norm_bias": ones(8, 1)}, "norm_bias", "[8, 1]"),
    own("mean_without_variance", {"running_var": None}, "running_var"),
    own("variance_without_mean", {"running_mean": None}, "running_mean"),
    own(
        "weight_without_statistics",
        {"running_mean": None, "running_var": None, "norm_bias": None},
        "norm_weight",
    ),
    own(
        "bias_without_statistics",
        {"running_mean": None, "running_var": None, "norm_weight": None},
        "norm_bias",
    ),
    own(
        "norm_vector_dtype",
        {"norm_weight": ones(8, dtype=torch.float64)},
        "norm_weight",
        "float64",
        "float32",
    ),
    own(
        "norm_vectors_mixed",
        {"norm_weight": ones(8, dtype=torch.float16)},
        "norm_weight",
        "float16",
        "float32",
    ),
    own("residual_size", {"residual": ones(2, 8, 5, 5)}, "residual", "[2, 8, 5, 5]", "[2, 8, 6, 5]"),
    own("residual_channels", {"residual": ones(2, 4, 6, 5)}, "residual", "[2, 4, 6, 5]", "[2, 8, 6, 5]"),
    own("residual_broadcast", {"residual": ones(1, 8, 1, 1)}, "residual", "[1, 8, 1, 1]", "[2, 8, 6, 5]"),
    own("residual_3d", {"residual": ones(8, 6, 5)}, "residual", "[8, 6, 5]"),
    own(
        "residual_dtype",
        {"residual": ones(2, 8, 6, 5, dtype=torch.float16)},
        "residual",
        "float16",
        "float32",
    ),
    own("residual_order", {"residual_order": "before"}, "before", "add_act", "act_add"),
    own("act_unknown", {"act": "swish"}, "swish", *ACTIVATIONS),
    own("act_capital", {"act": "ReLU"}, "ReLU", *ACTIVATIONS),
    own("act_params_missing", {"act": "leaky_relu", "act_params": ()}, "leaky_relu", "negative_slope"),
    own("act_params_too_many", {"act": "relu", "act_params": (0.25,)}, "relu", 0.25),
    own("act_params_elu", {"act": "elu", "act_params": (1.0, 2.0)}, "elu", "alpha"),
    own("residual_device", {"residual": ones(2, 8, 6, 5, device="meta")}, "residual", "meta"),
    own("weight_device", {"weight": ones(8, 2, 3, 3, device="meta")}, "weight", "meta"),
    own("norm_device", {"norm_bias": ones(8, device="meta")}, "norm_bias", "meta"),
)
