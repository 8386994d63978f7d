"""Switches of the package, read at every call: ``fused_cna.config.strict = True``."""

import difflib
import sys
from collections.abc import Sequence
from types import ModuleType

strict: bool = False
"""Raise a ``RuntimeError`` where a call on CUDA tensors would fall back to eager PyTorch with a warning."""


class FusionFallbackWarning(UserWarning):
    """A call on CUDA tensors runs as eager PyTorch; the message names the cause. Given once per cause."""


class PlanFileWarning(UserWarning):
    """Tuned plans are ignored, or a file of them was set aside; the message says why. Given once."""


_SWITCHES = ("strict",)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A question for an error message, with a space before it; empty where no known name is close."""
    return "".join(f" did you mean {each!r}?" for each in difflib.get_close_matches(name, known, 1))


def _unknown(name: str) -> AttributeError:
    words = f"no switch is called {name!r};{did_you_mean(name, _SWITCHES)}"
    return AttributeError(f"{words} fused_cna.config has {', '.join(_SWITCHES)}")


class _Config(ModuleType):
    """A module in which a misspelt switch is an error, rather than a new attribute that nobody reads."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _SWITCHES and not isinstance(value, bool):
            raise TypeError(f"fused_cna.config.{name} must be True or False, but got {value!r}")
        if name not in _SWITCHES and not name.startswith("__"):
            raise _unknown(name)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> object:
        raise _unknown(name)


sys.modules[__name__].__class__ = _Config
