"""What a network takes and gives, and how it calls its modules."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import ADDED, WHOLE, Draw, Group, TwoGroups, add, case, conv, two_images


class Optional(Group):
    """Forward has a second argument, a flag and a number, each with a default."""

    def forward(
        self, x: Tensor, residual: Tensor | None = None, negate: bool = False, scale: float = 1.0
    ) -> Tensor:
        z = self.norm(self.conv(x))
        if residual is not None:
            z = z + residual
        y = self.act(z) * scale
        return -y if negate else y


add("optional_left_out", Optional, fused={"conv": WHOLE})
add("optional_given", Optional, inputs=two_images)
add("optional_none", Optional, inputs=lambda draw: (draw.image(), None, False))
add("optional_flag", Optional, inputs=lambda draw: (draw.image(), None, True, 2.0))
add("optional_by_keyword", Optional, keywords=lambda draw: {"negate": True})
add("optional_tensor_by_keyword", Optional, keywords=lambda draw: {"residual": draw.image(salt=1)})
add(
    "all_by_keyword",
    Optional,
    inputs=lambda draw: (),
    keywords=lambda draw: {"scale": 3.0, "x": draw.image()},
)
add(
    "optional_given_every_other_time",
    Optional,
    inputs=lambda draw: (draw.image(),) if draw.seed % 2 else two_images(draw),
)
add(
    "optional_flag_that_changes",
    Optional,
    inputs=lambda draw: (draw.image(), None, draw.seed % 2 == 0, float(draw.seed)),
)


class KeywordOnly(Group):
    """A flag that can only be given by name."""

    def forward(self, x: Tensor, *, halve: bool, times: int = 1) -> Tensor:
        y = self.act(self.norm(self.conv(x))) * times
        return y / 2 if halve else y


add("keyword_only", KeywordOnly, keywords=lambda draw: {"halve": draw.seed % 2 == 1, "times": draw.seed})


@case(inputs=two_images)
class AnyNumber(Group):
    """`*args`."""

    def forward(self, *images: Tensor) -> list[Tensor]:
        return [self.act(self.norm(self.conv(image))) for image in images]


@case(
    inputs=lambda draw: (draw.image(),), keywords=lambda draw: {"residual": draw.image(salt=1), "unknown": 3}
)
class AnyKeywords(Group):
    """`**kwargs`."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.act(self.norm(self.conv(x)) + options["residual"]) * options.get("unknown", 1)


@case(inputs=lambda draw: ({"image": draw.image(), "residual": draw.image(salt=1)},))
class DictionaryIn(Group):
    """A dictionary in, an ordered one out."""

    def forward(self, batch: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
        y = self.act(self.norm(self.conv(batch["image"])) + batch["residual"])
        return OrderedDict([("y", y), ("negated", -y)])


@case(inputs=lambda draw: ([draw.image(), draw.image(salt=1)],))
class ListIn(Group):
    """A list in, one of the same length out."""

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.act(self.norm(self.conv(image))) for image in images]


@case(inputs=lambda draw: ([draw.image(salt=i) for i in range(draw.seed)],))
class ListOfAnyLength(ListIn):
    """How many images there are differs from call to call."""


@case(inputs=lambda draw: ((draw.image(), [draw.image(salt=1), {"deep": draw.image(salt=2)}]),))
class NestedIn(Group):
    """Containers in containers."""

    def forward(self, nested: Any) -> Any:
        x, (y, rest) = nested
        return {"sum": (self.act(self.norm(self.conv(x)) + y), [rest["deep"]])}


class Features(NamedTuple):
    low: Tensor
    high: Tensor


Plain = namedtuple("Plain", ["first", "second"])


@dataclass
class Output:
    logits: Tensor
    extra: Any = None


@case(inputs=lambda draw: (Features(draw.image(), draw.image(salt=1)),))
class NamedTupleIn(Group):
    """A named tuple in and out."""

    def forward(self, features: Features) -> Features:
        return Features(self.act(self.norm(self.conv(features.low)) + features.high), features.high)


@case()
class NamedTupleOut(Group):
    """One made by `namedtuple`."""

    def forward(self, x: Tensor) -> Any:
        y = self.act(self.norm(self.conv(x)))
        return Plain(y, second=y.mean())


@case()
class DataclassOut(Group):
    """A result object, as many libraries give."""

    def forward(self, x: Tensor) -> Output:
        return Output(self.act(self.norm(self.conv(x))), extra={"shape": x.shape[1]})


@case(inputs=lambda draw: (Output(draw.image(), 3.0),))
class ObjectIn(Group):
    """An object whose attributes are read; with a type that containers of tensors do not know."""

    def forward(self, given: Output) -> Tensor:
        if not isinstance(given, Output):
            raise TypeError("an Output, please")
        return self.act(self.norm(self.conv(given.logits))) * given.extra


@case()
class NothingOut(Group):
    """A hole in the result."""

    def forward(self, x: Tensor) -> Any:
        return self.act(self.norm(self.conv(x))), None, (), {}, 7, "text"


@case(fused={"conv": WHOLE})
class ByKeyword(Group):
    """Modules called with keywords."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(input=self.norm(input=self.conv(input=x)))


@case(fused={"conv": WHOLE})
class ByPartial(Group):
    """Modules called through partial, map, a lambda and getattr."""

    def forward(self, x: Tensor) -> Tensor:
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


@case(fused={"net.0": "conv + relu"}, unused_norms=("net.1", "net.4"))
class SequenceByIndex(Layers):
    """The norm is skipped by index."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


@case(fused={"net.0": WHOLE, "net.3": "conv + norm + silu"})
class SequenceBySlice(Layers):
    """Slices are sequences of their own, made in forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[3:](self.net[:3](x))


@case(unused_norms=("net.4",))
class SequenceBySliceAndWhole(Layers):
    """Once a part, once the whole: the first three run twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[:3](x) + self.net[:-1](x)


@case()
class SequenceBackwards(Layers):
    """In another order than it is registered in."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.net):
            x = layer(x)
        return x


@case(fused={"net.0": WHOLE})
class SequenceTapped(Layers):
    """Every third layer's output is kept."""

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = []
        for name, layer in self.net.named_children():
            x = layer(x)
            if name in ("2", "5"):
                kept.append(x)
        return kept


@case(fused={"convs.0": WHOLE, "convs.1": WHOLE, "convs.2": WHOLE})
class Lists(nn.Module):
    """Convolutions in one list, norms in another."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv() for _ in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return x


@case(fused={"layers.conv": WHOLE}, inputs=lambda draw: (draw.image(), "conv"))
class Dictionary(nn.Module):
    """Modules in a dictionary, picked by an argument that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"conv": conv(), "norm": nn.BatchNorm2d(4)})

    def forward(self, x: Tensor, which: str = "conv") -> Tensor:
        return F.relu(self.layers["norm"](self.layers[which](x)))


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
        return self.act(self.norm(self.conv(x))) + self.inner(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardOnTheObject:
        copy = type(self)()
        copy.to(next(self.parameters()).dtype).load_state_dict(self.state_dict())
        return copy.train(self.training)


@case(inputs=lambda draw: (draw.image(), torch.neg))
class FunctionIn(Group):
    """An argument is a function."""

    def forward(self, x: Tensor, after: Callable[[Tensor], Tensor]) -> Tensor:
        return after(self.act(self.norm(self.conv(x))))


@case(draws=(Draw(1, 2, 8, 9), Draw(2, 0, 8, 9), Draw(3, 1, 1, 1)))
class EmptyBatch(Group):
    """No image at all, and one of a single pixel."""
