"""What the tests of the simulator share: a kernel that breaks a rule is reported, in any order of threads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import pytest

from tests.simt.binding import SimulatorError


def assert_reported(run: Callable[[int], object], pattern: str, seeds: Iterable[int]) -> None:
    """Runs with every seed, and asserts that each report has what the pattern matches."""
    for seed in seeds:
        with pytest.raises(SimulatorError) as caught:
            run(seed)
        assert re.search(pattern, str(caught.value)), str(caught.value)
