"""Networks written to break a fuser, each with the trap that it sets."""

from tests.fusion_cases import (
    activations,
    arguments,
    containers,
    control,
    convolutions,
    mutation,
    norms,
    padding,
    residuals,
    sharing,
)
from tests.fusion_cases.case import CASES, DRAWS, WHOLE, Case, Draw, Group, TwoGroups, conv, randomise
from tests.fusion_cases.compare import (
    MODES,
    Snapshot,
    assert_different,
    assert_same,
    compare,
    gradients,
    storages,
)

__all__ = [
    "CASES",
    "DRAWS",
    "MODES",
    "WHOLE",
    "Case",
    "Draw",
    "Group",
    "Snapshot",
    "TwoGroups",
    "activations",
    "arguments",
    "assert_different",
    "assert_same",
    "compare",
    "containers",
    "control",
    "conv",
    "convolutions",
    "gradients",
    "mutation",
    "norms",
    "padding",
    "randomise",
    "residuals",
    "sharing",
    "storages",
]
