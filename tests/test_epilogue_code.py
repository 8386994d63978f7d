"""What is read of a kernel's beginning and end, on made-up kernels of a few instructions."""

from __future__ import annotations

import pytest

from tests.epilogue_code import (
    before_the_first_load,
    epilogue_turns,
    instructions_per_output,
    residual_loads_under_way,
    shared_loads,
)
from tests.machine_code import Code
from tests.test_machine_code import straight


def opcodes(code: Code) -> str:
    return " ".join(each.opcode for each in code)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        # a loop over a table, which a thread without a share in it jumps over, and a load for it
        ("S2R ?BRA>6 LDG.E MOV STS ?BRA>2 LDGSTS.E EXIT", (2, 6)),
        ("S2R MOV LDG.E LDG.E STG.E EXIT", (2, 2)),
        # the shortest path leads to another copy than the first in the code
        ("S2R ?BRA>5 MOV MOV LDGSTS.E LDGSTS.E EXIT", (2, 4)),
    ],
)
def test_instructions_before_the_first_load(code: str, expected: tuple[int, int]) -> None:
    assert before_the_first_load(straight(code)) == expected


LOADING = straight("MOV LDS.128 LDS ?BRA>6 LDG.E.128+2 FADD-2 ?BRA>9 STG.E.128 BRA>1 STG.E.U16 BRA>1")
"""A loop that loads the residual where there is one, and stores value by value where it must."""

LOADING_AHEAD = straight("LDG.E.128+0 LDG.E.128+1 FADD-0 LDG.E.128+0 FADD-1 STG.E.128 STG.E.128 ?BRA>1 EXIT")
"""Two turns, their loads started one turn ahead."""

SKIPPING = straight("LDS.128 ?LDG.E.128+2 FADD-2 STG.E.128 ?BRA>0 EXIT")
"""A loop with a load that a predicate skips."""

COPYING = straight("MOV ?LDGSTS.E.BYPASS.128 LDGDEPBAR DEPBAR.LE=3 LDS.128 FADD STG.E.128 ?BRA>1 EXIT")
"""The copy of a later residual starts, four are under way, and one is read."""

BRANCHING = straight(
    "LDS.128 ?BRA>5 LDS.128 LDS.128 LDS.128 ?BRA>10 DEPBAR.LE=1 LDS.128 HADD2 MOV "
    "?BRA>15 LDGSTS.E.BYPASS.128 ?BRA>14 LDGSTS.E.BYPASS.128 LDGDEPBAR "
    "?BRA>17 STG.E.128 ?BRA>19 STG.E.128 ?BRA>0 EXIT"
)
"""Branches around new folds, the residual of this turn's two rows, copies for a later one, and each store."""


@pytest.mark.parametrize(
    ("code", "plain", "added", "under_way"),
    [
        (LOADING, "BRA LDS.128 LDS BRA BRA STG.E.128", "BRA LDS.128 LDS BRA LDG.E.128 FADD BRA STG.E.128", 1),
        (SKIPPING, "BRA LDS.128 LDG.E.128 FADD STG.E.128", "BRA LDS.128 LDG.E.128 FADD STG.E.128", 1),
        (
            COPYING,
            "BRA LDGSTS.E.BYPASS.128 LDGDEPBAR DEPBAR.LE LDS.128 FADD STG.E.128",
            "BRA LDGSTS.E.BYPASS.128 LDGDEPBAR DEPBAR.LE LDS.128 FADD STG.E.128",
            4,
        ),
        (
            BRANCHING,
            "BRA STG.E.128 BRA LDS.128 BRA BRA BRA BRA STG.E.128",
            "BRA STG.E.128 BRA LDS.128 BRA BRA DEPBAR.LE LDS.128 HADD2 MOV "
            "BRA LDGSTS.E.BYPASS.128 BRA LDGSTS.E.BYPASS.128 LDGDEPBAR BRA STG.E.128",
            4,
        ),
    ],
)
def test_a_turn_of_the_epilogue(code: Code, plain: str, added: str, under_way: int) -> None:
    turn, with_residual = epilogue_turns(code)
    assert opcodes(turn) == plain
    assert opcodes(with_residual) == added
    assert residual_loads_under_way(with_residual) == under_way


def test_loads_under_way_are_counted_to_the_wait_for_the_first() -> None:
    turn = LOADING_AHEAD[1:-1]
    assert residual_loads_under_way(turn) == 2, "the loop's first load is waited for after its second"
    assert residual_loads_under_way(straight("LDG.E.128+3 FADD-2 STG.E.128")) is None
    assert residual_loads_under_way(straight("LDGSTS.E.128 LDGDEPBAR BAR STG.E.128")) is None


def test_a_turn_is_measured_by_what_it_stores() -> None:
    turn, _ = epilogue_turns(LOADING)
    assert instructions_per_output(turn, value_bytes=2) == 6 / 8
    assert instructions_per_output(LOADING_AHEAD, value_bytes=4) == 9 / 8
    assert shared_loads(turn) == {128: 1, 32: 1}


def test_a_kernel_without_wide_stores_has_no_such_turn() -> None:
    assert epilogue_turns(straight("LDS.128 STG.E.U16 ?BRA>0 STG.E.128 EXIT")) == ((), ())
