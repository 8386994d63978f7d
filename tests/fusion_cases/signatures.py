"""How a network is called: containers, None, options, and the same module called in several ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import ADDED, WHOLE, Draw, Group, TwoGroups, add, case, two_images


class Features(Group):
    """A decoder's block: takes the features of an encoder, in whatever holds them, some of them missing."""

    def __init__(self, keys: tuple[Any, ...] = (0, 1)) -> None:
        super().__init__()
        self.keys = keys

    def forward(self, features: Any) -> Tensor:
        x, skip = (features[key] for key in self.keys)
        z = self.norm(self.conv(x))
        return self.act(z if skip is None else z + skip)


class Pair(NamedTuple):
    low: Tensor
    high: Tensor | None


HOLDERS: dict[str, Callable[[Tensor, Any], Any]] = {
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "named_tuple": Pair,
    "integer_keys": lambda x, y: {0: x, 1: y},
    "longer_list": lambda x, y: [x, y, None, 3],
}
for name, hold in HOLDERS.items():
    add(
        f"features_in_a_{name}",
        Features,
        fused=ADDED,
        inputs=lambda draw, hold=hold: (hold(*two_images(draw)),),
    )
    add(f"features_missing_in_a_{name}", Features, inputs=lambda draw, hold=hold: (hold(draw.image(), None),))
add(
    "features_in_a_dict",
    lambda: Features(("x", "y")),
    fused=ADDED,
    inputs=lambda draw: (dict(zip("xy", two_images(draw), strict=True)),),
)
add(
    "features_in_a_dict_of_another_order",
    lambda: Features(("x", "y")),
    inputs=lambda draw: (
        dict(list(zip("xy", two_images(draw), strict=True))[:: -1 if draw.seed % 2 else 1]),
    ),
)
add(
    "features_missing_every_other_time",
    Features,
    inputs=lambda draw: ([draw.image(), draw.image(salt=1) if draw.seed % 2 else None],),
)


@case(inputs=lambda draw: ([[draw.image(), {"deep": (draw.image(salt=1), None)}], draw.image(salt=2)],))
def nested_features(self: Any, nested: Any) -> Any:
    """Containers in containers, None among them."""
    (x, rest), last = nested
    y, nothing = rest["deep"]
    return [self.act(self.norm(self.conv(x)) + y), nothing], last


class Options(Group):
    """A size, a flag and a name, each with a default."""

    def forward(
        self, x: Tensor, size: Any = None, flag: bool = False, mode: str = "nearest", scale: float = 1
    ) -> Tensor:
        y = self.first(x)
        if size is not None:
            y = F.interpolate(y, size, mode=mode)
        return (-y if flag else y) * scale


OPTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "default_by_position": ((None, False), {}),
    "default_by_keyword": ((), {"flag": False}),
    "all_defaults_by_keyword": ((), {"scale": 1, "mode": "nearest", "flag": False, "size": None}),
    "size": ((12,), {}),
    "size_as_pair": (((12, 13),), {}),
    "size_and_flag": ((12, True), {}),
    "mode_by_keyword": ((12,), {"mode": "bilinear"}),
    # One equals the other, and has another type.
    "flag_as_number": ((None, 0, "nearest", True), {}),
    "number_as_float": ((), {"scale": 1.0}),
    "size_as_list": (([12, 13],), {}),
}
for name, (positional, keywords) in OPTIONS.items():
    add(
        f"option_{name}",
        Options,
        fused=WHOLE,
        inputs=lambda draw, positional=positional: (draw.image(), *positional),
        keywords=(lambda draw, keywords=keywords: keywords) if keywords else None,
    )
add(
    "option_size_of_another_type_each_time",
    Options,
    inputs=lambda draw: (draw.image(), (12, (12, 12), None, 9)[draw.seed - 1], draw.seed == 3),
)
add(
    "option_number_of_another_type_each_time",
    Options,
    inputs=lambda draw: (draw.image(), None, (False, 0, True, 1)[draw.seed - 1]),
)
add(
    "option_scale_that_is_a_tensor",
    Options,
    inputs=lambda draw: (draw.image(), None, False, "nearest", draw.tensor(1) if draw.seed % 2 else 2),
)


@case(
    inputs=lambda draw: (draw.image(), *[draw.image(salt=i) for i in range(1, draw.seed)]),
    keywords=lambda draw: {name: draw.image(salt=9) for name in ("ab", "ba", "a", "b")[draw.seed - 1]},
)
def any_tensors(self: Any, x: Tensor, *more: Tensor, **named: Tensor) -> Any:
    """`*args` and `**kwargs` of tensors, as many as there are, in the order in which they are given."""
    y = self.first(x)
    for one in more:
        y = y + one
    return y, {name: value * 2 for name, value in named.items()}


class Skip(Group):
    """The block of a decoder, with a skip connection that may be missing."""

    def forward(self, x: Tensor, skip: Tensor | None = None, *, double: bool = False) -> Tensor:
        z = self.first(x)
        z = z if skip is None else z + skip
        return z * 2 if double else z


class CalledInManyWays(nn.Module):
    """One block, with and without its options within one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Skip()

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.block(x), x)
        return self.block(self.block(y, None), skip=y, double=True)


class InPython(CalledInManyWays):
    """The same in code that no trace can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


add("block_called_in_many_ways", CalledInManyWays)
add("block_called_in_many_ways_by_python", InPython)


class Aliased(TwoGroups):
    """The inputs may be one tensor, or views of one; the first is overwritten in between."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first = self.act(self.norm(self.conv(x)) + y)
        x.mul_(0.5)
        return first, self.act(self.second(y) + x)


def twice(draw: Draw) -> tuple[Tensor, Tensor]:
    x = draw.image()
    return x, x


def views(draw: Draw) -> tuple[Tensor, Tensor]:
    x = draw.tensor(draw.n, 4, draw.h + 1, draw.w)
    return x[:, :, 1:], x[:, :, :-1]


add("inputs_apart", Aliased, inputs=two_images)
add("inputs_that_are_one", Aliased, inputs=twice)
add("inputs_that_are_views", Aliased, inputs=views)
add("inputs_that_are_one_every_other_time", Aliased, inputs=lambda d: twice(d) if d.seed % 2 else views(d))
add("inputs_that_are_one_in_a_list", Features, inputs=lambda draw: (list(twice(draw)),))


@case(inputs=lambda draw: (draw.image(), [draw.image(salt=1)]))
def list_grows(self: Any, x: Tensor, kept: list[Any]) -> Tensor:
    """What the network does to a list of the caller's is seen by the caller."""
    y = self.act(self.norm(self.conv(x)) + kept[0])
    kept.append(y)
    return torch.cat(kept, 1)
