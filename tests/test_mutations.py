"""The faults of tests/mutations: the code that they change is still there."""

from __future__ import annotations

import pytest

from tests.mutations.faults import FAULTS, Fault
from tests.simt.build import CSRC


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_applies(fault: Fault) -> None:
    assert (CSRC / "kernels" / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new
