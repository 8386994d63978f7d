"""Networks written to break a fuser, each with the trap that it sets."""

# ruff: noqa: F401
from tests.fusion_cases import (
    activations,
    arguments,
    containers,
    control,
    convolutions,
    mutation,
    norms,
    order,
    padding,
    questions,
    residuals,
    sharing,
    signatures,
    state,
    sums,
)
from tests.fusion_cases.case import CASES, DRAWS, Case, Group, conv, image, randomise
from tests.fusion_cases.compare import (
    MODES,
    Snapshot,
    assert_equal_answers,
    assert_same,
    compare,
    every_freeze,
    number_fused,
)
