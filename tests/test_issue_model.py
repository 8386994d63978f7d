"""When a first product is issued: on kernels of a few instructions, with cycles counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.issue_model import Moment, first_product
from tests.machine_code import CUDA_CORES, TENSOR_CORES, WARPGROUP_TENSOR_CORES, Code, Scheduling
from tests.test_machine_code import straight

FREE, HOLDS_0, HOLDS_1, ON_0, ON_1 = (
    Scheduling(),
    Scheduling(result=0),
    Scheduling(result=1),
    Scheduling(waits=((0, 0),)),
    Scheduling(waits=((1, 0),)),
)


def scheduled(text: str, told: list[Scheduling] | dict[int, Scheduling]) -> Code:
    """What ``straight`` makes of a text, with what the scheduler is told of its instructions by number."""
    by_number = told if isinstance(told, dict) else dict(enumerate(told))
    return tuple(replace(each, scheduling=by_number.get(i, FREE)) for i, each in enumerate(straight(text)))


@pytest.mark.parametrize(
    ("text", "told", "cycles", "loads"),
    [
        ("MOV IADD3 HMMA.1", [Scheduling(stall=4)], 5, 0),
        # a special register takes 20 cycles, a constant 40, shared memory 29, and the barrier 20
        ("S2R LDC IADD3 HMMA.1", [HOLDS_0, HOLDS_1, ON_0, ON_1], 41, 0),
        ("LDS.128 BAR.SYNC HMMA.1", [HOLDS_0, FREE, ON_0], 29, 0),
        ("STS BAR.SYNC HMMA.1", [Scheduling(operands=2), FREE, Scheduling(waits=((2, 0),))], 21, 0),
        # two loads at once, and one that is asked for after the other; what a predicate may skip is issued
        ("LDG.E ?LDG.E HMMA.1", [HOLDS_0, HOLDS_0, ON_0], 801, 1),
        ("LDG.E MOV LDG.E HMMA.1", [HOLDS_0, ON_0, HOLDS_1, ON_1], 1601, 2),
        ("LDG.E LDG.E MOV HMMA.1", [HOLDS_0, HOLDS_1, ON_0, ON_1], 801, 1),
        # of two groups of copies the first, then both
        (
            "LDGSTS.E LDGDEPBAR LDGSTS.E LDGDEPBAR DEPBAR.LE HMMA.1",
            [FREE, HOLDS_0, FREE, HOLDS_0, Scheduling(waits=((0, 1),))],
            801,
            1,
        ),
        ("LDGSTS.E LDGDEPBAR LDGSTS.E LDGDEPBAR HMMA.1", [FREE, HOLDS_0, FREE, HOLDS_0, ON_0], 802, 1),
    ],
)
def test_a_product_waits_for_what_comes_before(
    text: str, told: list[Scheduling], cycles: int, loads: int
) -> None:
    assert first_product(scheduled(text, told), TENSOR_CORES, 128) == Moment(cycles, loads)


def test_warps_take_turns_at_a_scheduler() -> None:
    code = scheduled("MOV MOV MOV HMMA.1", [Scheduling(stall=4)])
    assert [first_product(code, TENSOR_CORES, threads).cycles for threads in (32, 256, 384)] == [6, 8, 10]


@pytest.mark.parametrize(
    ("text", "cycles"),
    [
        # a loop is run once, a branch that jumps ahead is not taken
        ("MOV ?BRA>0 ?BRA>5 MOV MOV HMMA.1", 5),
        # but it is where the other way calls a function, stores, exits or goes round
        ("?BRA>3 MOV CALL MOV HMMA.1", 2),
        ("?BRA>4 ?BRA>3 STG.E EXIT HMMA.1", 1),
        ("?BRA>3 MOV BRA>1 MOV HMMA.1", 2),
        ("MOV BRA>4 MOV MOV HMMA.1", 2),
        ("?EXIT ?CALL HMMA.1", 2),
    ],
)
def test_the_way_falls_through_to_a_product(text: str, cycles: int) -> None:
    assert first_product(straight(text), TENSOR_CORES, 128).cycles == cycles


def test_the_wait_for_the_kernel_ahead_is_told() -> None:
    found = first_product(straight("MOV MOV ACQBULK MOV HMMA.1"), TENSOR_CORES, 128)
    assert (found.waited, found.cycles) == (2, 4)


def test_a_kernel_without_a_product_is_refused() -> None:
    with pytest.raises(ValueError, match="no way leads"):
        first_product(straight("MOV EXIT HMMA.1"), TENSOR_CORES, 128)


def test_on_cuda_cores_the_main_loop_has_the_first_product() -> None:
    code = straight("FFMA MOV FFMA FFMA ?BRA>2 EXIT")
    assert first_product(code, CUDA_CORES, 128).cycles == 2


def test_warpgroups_wait_for_the_copies_of_another_warp() -> None:
    """That warp asks for operands at cycle 23; the products come two instructions after the wait for them."""
    text = "?BRA>5 SYNCS.PHASECHK.TRANS64 WARPGROUP.ARRIVE HGMMA.1 EXIT S2R MOV UTMALDG.3D UTMALDG.2D EXIT"
    code = scheduled(text, {5: HOLDS_0, 6: ON_0})
    assert first_product(code, WARPGROUP_TENSOR_CORES, 128) == Moment(23 + 800 + 2, 1)
