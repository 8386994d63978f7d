"""What a network takes and gives, and how it calls its modules."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import ADDED, WHOLE, Draw, Group, TwoGroups, add, add_net, case, conv


class KeywordOnly(Group):
    """A flag that can only be given by name."""

    def forward(self, x: Tensor, *, halve: bool, times: int = 1) -> Tensor:
        y = self.first(x) * times
        return y / 2 if halve else y


add("keyword_only", KeywordOnly, keywords=lambda draw: {"halve": draw.seed % 2 == 1, "times": draw.seed})
add_net(
    "any_keywords",
    lambda self, x, **options: (
        self.act(self.norm(self.conv(x)) + options["residual"]) * options.get("unknown", 1)
    ),
    inputs=lambda draw: (draw.image(),),
    keywords=lambda draw: {"residual": draw.image(salt=1), "unknown": 3},
)
# How many images there are differs from call to call.
add_net(
    "list_of_any_length",
    lambda self, images: [self.first(image) for image in images],
    inputs=lambda draw: ([draw.image(salt=i) for i in range(draw.seed)],),
)


Plain = namedtuple("Plain", ["first", "second"])


@dataclass
class Output:
    logits: Tensor
    extra: Any = None


add_net("named_tuple_out", lambda self, x: Plain((y := self.first(x)), second=y.mean()))
# A result object, as many libraries give.
add_net("dataclass_out", lambda self, x: Output(self.first(x), extra={"shape": x.shape[1]}))


@case(inputs=lambda draw: (Output(draw.image(), 3.0),))
def object_in(self: Any, given: Output) -> Tensor:
    """An object whose attributes are read; with a type that containers of tensors do not know."""
    if not isinstance(given, Output):
        raise TypeError("an Output, please")
    return self.first(given.logits) * given.extra


add_net("nothing_out", lambda self, x: (self.first(x), None, (), {}, 7, "text"))
add_net("by_keyword", lambda self, x: self.act(input=self.norm(input=self.conv(input=x))), fused=WHOLE)


@case(fused=WHOLE)
def by_partial(self: Any, x: Tensor) -> Tensor:
    """Modules called through partial, map, a lambda and getattr."""
    y = partial(self.conv)(x)
    (z,) = map(getattr(self, "no" + "rm"), [y])
    return (lambda value: self.act(value))(z)


@case(fused={"conv": WHOLE, "conv2": ADDED})
class ThroughMethods(TwoGroups):
    """Parts of forward in other methods and a closure."""

    def stem(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return self.norm2(self.conv2(x)) + x

        return self.act(block(self.stem(x)))


class Layers(nn.Module):
    """A sequence that forward takes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


add("sequence", Layers, fused={"net.0": WHOLE, "net.3": "conv + norm + silu"})
add_net(
    "sequence_by_index", lambda self, x: self.net[2](self.net[0](x)), Layers, fused={"net.0": "conv + relu"}
)
# Slices are sequences of their own, made in forward.
add_net(
    "sequence_by_slice",
    lambda self, x: self.net[3:](self.net[:3](x)),
    Layers,
    fused={"net.0": WHOLE, "net.3": "conv + norm + silu"},
)
# Once a part, once the whole: the first three run twice.
add_net("sequence_by_slice_and_whole", lambda self, x: self.net[:3](x) + self.net[:-1](x), Layers)


@case(Layers)
def sequence_backwards(self: Any, x: Tensor) -> Tensor:
    """In another order than it is registered in."""
    for layer in reversed(self.net):
        x = layer(x)
    return x


@case(Layers, fused={"net.0": WHOLE})
def sequence_tapped(self: Any, x: Tensor) -> list[Tensor]:
    """Every third layer's output is kept."""
    kept = []
    for name, layer in self.net.named_children():
        x = layer(x)
        if name in ("2", "5"):
            kept.append(x)
    return kept


@case(
    nn.Module,
    {
        "convs": lambda: nn.ModuleList([conv() for _ in range(3)]),
        "norms": lambda: nn.ModuleList([nn.BatchNorm2d(4) for _ in range(3)]),
    },
    fused={"convs.0": WHOLE, "convs.1": WHOLE, "convs.2": WHOLE},
)
def lists(self: Any, x: Tensor) -> Tensor:
    """Convolutions in one list, norms in another."""
    for layer, norm in zip(self.convs, self.norms, strict=True):
        x = F.relu(norm(layer(x)))
    return x


# Modules in a dictionary, picked by an argument that is no tensor.
add_net(
    "dictionary",
    lambda self, x, which="conv": F.relu(self.layers["norm"](self.layers[which](x))),
    nn.Module,
    {"layers": lambda: nn.ModuleDict({"conv": conv(), "norm": nn.BatchNorm2d(4)})},
    fused={"layers.conv": WHOLE},
    inputs=lambda draw: (draw.image(), "conv"),
)


class Calling(Group):
    """A class that overrides `__call__`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return super().__call__(*args, **options) * 2


add("own_call", Calling)
add("own_call_within", lambda: nn.Sequential(Calling(), nn.Identity()))


class Registered(Group):
    """A class whose subclasses have to say something."""

    def __init_subclass__(cls, *, purpose: str) -> None:
        super().__init_subclass__()


class Forwarded(Group):
    """A class that asks what it is."""

    def forward(self, x: Tensor) -> Tensor:
        assert type(self).__name__ == "Forwarded"
        return super().forward(x) if isinstance(self, Forwarded) else x


add("class_with_demands_on_subclasses", Registered)
add("class_that_asks_for_its_name", Forwarded)


@case()
class ForwardOnTheObject(Group):
    """A forward set on the object replaces the class's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Group()
        self.inner.forward = lambda x: self.inner.norm(self.inner.conv(x)) * 3

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.inner(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardOnTheObject:
        copy = type(self)()
        copy.to(next(self.parameters()).dtype).load_state_dict(self.state_dict())
        return copy.train(self.training)


add_net(
    "function_in", lambda self, x, after: after(self.first(x)), inputs=lambda draw: (draw.image(), torch.neg)
)
# No image at all, and one of a single pixel.
add("empty_batch", Group, draws=(Draw(1, 2, 8, 9), Draw(2, 0, 8, 9), Draw(3, 1, 1, 1)))
