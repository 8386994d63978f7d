"""What a case is: a network with a trap, how to call it, and what fusing it has to come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

WHOLE = "conv + norm + relu"
ADDED = "conv + norm + add + relu"
ADDED_AFTER = "conv + norm + relu + add"
NORMED = "conv + norm"

Maker = TypeVar("Maker", bound=Callable[..., Any])


@dataclass(frozen=True)
class Draw:
    """Sizes and values of one call; batch and image differ from draw to draw, and so does the mean's sign."""

    seed: int
    n: int
    h: int
    w: int

    def tensor(self, *size: int, salt: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(100 * self.seed + salt)
        mean = 0.4 if self.seed % 2 else -0.4
        return torch.randn(size, generator=generator, dtype=torch.float64) + mean

    def image(self, channels: int = 4, salt: int = 0) -> Tensor:
        return self.tensor(self.n, channels, self.h, self.w, salt=salt)


EXAMPLE = Draw(1, 2, 8, 9)
DRAWS = (EXAMPLE, Draw(2, 3, 11, 7), Draw(3, 1, 8, 9), Draw(4, 2, 8, 9))


def image(seed: int = 0) -> Tensor:
    return DRAWS[seed].image()


def one_image(draw: Draw) -> tuple[Any, ...]:
    return (draw.image(),)


def two_images(draw: Draw) -> tuple[Any, ...]:
    return draw.image(), draw.image(salt=1)


@dataclass(frozen=True)
class Case:
    """One network; `fused` and `unfused` say what the report has to say of convolutions, by name."""

    name: str
    make: Callable[[], nn.Module]
    fused: str | tuple[str, ...] | Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """The parts that a convolution, `conv` or those named, must be fused with; per call if these differ."""
    unfused: str | Mapping[str, str] = field(default_factory=dict)
    """A pattern for the reason why a convolution must not be fused with anything."""
    inputs: Callable[[Draw], tuple[Any, ...]] = one_image
    keywords: Callable[[Draw], dict[str, Any]] | None = None
    """Keyword arguments beside `inputs`; such a case cannot be given as example inputs."""
    draws: tuple[Draw, ...] = DRAWS
    """The first makes the example inputs."""
    prepare: Callable[[Any], object] | None = None
    """What happens to the network after it was put in eval mode."""
    attributes: tuple[str, ...] = ()
    """Attributes that a call changes, compared after each call."""
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        for field_name in ("fused", "unfused"):
            value = getattr(self, field_name)
            if not isinstance(value, Mapping):
                object.__setattr__(self, field_name, {"conv": value})

    def __str__(self) -> str:
        return self.name

    def build(self) -> Any:
        """The network: the same values each time."""
        torch.manual_seed(0)
        network = self.make()
        randomise(network)
        network.to(self.dtype)
        network.eval()
        if self.prepare is not None:
            self.prepare(network)
        return network

    def arguments(self, draw: Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        keywords = {} if self.keywords is None else self.keywords(draw)
        return self._cast(self.inputs(draw)), self._cast(keywords)

    def _cast(self, values: Any) -> Any:
        def cast(value: Any) -> Any:
            return (
                value.to(self.dtype) if isinstance(value, Tensor) and value.dtype == torch.float64 else value
            )

        return torch.utils._pytree.tree_map(cast, values)


CASES: dict[str, Case] = {}


def add(name: str, make: Callable[[], nn.Module], **options: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(name, make, **options)


def net(
    forward: Callable[..., Any] | None,
    base: type[nn.Module] | None = None,
    modules: Mapping[str, Callable[[], Any] | None] = MappingProxyType({}),
) -> Callable[[], nn.Module]:
    """Makes networks of a base class with a forward, and with modules and buffers; None takes one away."""

    def make() -> nn.Module:
        made = kind()
        for name, part in modules.items():
            value = None if part is None else part()
            if part is None:
                delattr(made, name)
            elif type(value) is Tensor:
                made.register_buffer(name, value)
            else:
                setattr(made, name, value)
        return made

    kind = type("Network", (base or Group,), {} if forward is None else {"forward": forward})
    return make


def add_net(
    name: str,
    forward: Callable[..., Any],
    base: type[nn.Module] | None = None,
    modules: Mapping[str, Callable[[], Any] | None] = MappingProxyType({}),
    **options: Any,
) -> None:
    add(name, net(forward, base, modules), **options)


def case(
    base: type[nn.Module] | None = None,
    modules: Mapping[str, Callable[[], Any] | None] = MappingProxyType({}),
    **options: Any,
) -> Callable[[Maker], Maker]:
    """Adds what it decorates to the cases: a class, or the forward of a network that `net` makes."""

    def register(made: Maker) -> Maker:
        words = "".join("_" + letter.lower() if letter.isupper() else letter for letter in made.__name__)
        add(words.lstrip("_"), made if isinstance(made, type) else net(made, base, modules), **options)
        return made

    return register


def randomise(network: nn.Module) -> None:
    """Statistics and affine parameters far from those of the identity, so that a lost norm shows."""
    generator = torch.Generator().manual_seed(7)

    def draw(value: Tensor, low: float, high: float) -> None:
        with torch.no_grad():
            value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)

    done: set[int] = set()
    for module in network.modules():
        if getattr(module, "running_var", None) is None and not isinstance(
            module, nn.modules.batchnorm._NormBase
        ):
            continue
        for name, low, high in (
            ("running_mean", -0.8, 0.8),
            ("running_var", 0.3, 2.0),
            ("weight", 0.6, 1.7),
            ("bias", -0.7, 0.7),
        ):
            value = getattr(module, name, None)
            if isinstance(value, Tensor) and id(value) not in done:
                done.add(id(value))
                draw(value, low, high)


def is_plain(x: Any) -> bool:
    """A question that code in another file asks."""
    return type(x) is Tensor


def conv(c: int = 4, k: int = 4, size: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size of the image."""
    return nn.Conv2d(c, k, size, **{"padding": size // 2, **options})


class Group(nn.Module):
    """A convolution, a norm and an activation; what they are called on is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()

    def first(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class TwoGroups(Group):
    """Two convolutions with a norm each; `first` and `second` are what the cases call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = conv()
        self.norm2 = nn.BatchNorm2d(4)

    def second(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(x))
