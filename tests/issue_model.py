"""When a kernel issues its first product, estimated from its machine instructions alone.

One warp is followed from the entry. What it waits for stands beside each instruction, as the compiler wrote
it (``Scheduling``; Jia et al. 2018, "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking",
chapter 2, and still so on 8.0 and 9.0). Fixed latencies are thus the compiler's own; only those that vary
are assumed here.

The way is the one that falls through. A branch is taken only where the other way leads to no product, or
only past an exit, an output or the call of a function, which is the slow path of a division or a root. So a
loop before the product is run once, and what a predicate may skip is issued. Waiting for the kernel before
(ACQBULK) takes no time.

Not seen: misses of the instruction and the constant cache, contention for units and for memory, operands
that lie in a cache already, further turns of a loop, and of other warps all but their turns at a scheduler.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from tests.machine_code import (
    TENSOR_CORES,
    WARPGROUP_TENSOR_CORES,
    Code,
    Instruction,
    graph_of,
    main_loop_positions,
    positions,
)

LOAD_CYCLES = 800
"""From a load or copy to its landing: ``memory_latency`` of csrc/plan/cost.h."""

SHARED_CYCLES = 29
"""Luo et al. 2024, "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", of A100 and H100."""

CONSTANT_CYCLES = 40

OTHER_CYCLES = 20
"""Of special registers, conversions, MUFU; until operands are read; of a barrier that all have reached."""

THREADS_IN_TURN = 128
"""Of four schedulers a warp each. With more threads warps take turns at a scheduler."""

_LOADS = re.compile(r"(LDG|LD|LDGSTS|UTMALDG)\b.*")
_SHARED = re.compile(r"(LDS|LDSM|SHFL)\b.*")
_BARRIERS = re.compile(r"(BAR\.SYNC|UCGABAR_WAIT)\b.*")
_WALLS = re.compile(r"(STG|UTMASTG|EXIT|RET|BPT)\b.*")

OPERANDS_IN_BULK = r"UTMALDG\.(2D|4D)\b.*"
"""A residual's have three dimensions."""


@dataclass(frozen=True)
class Moment:
    """Cycles after the entry, and the loads from memory in series: each asked for once the last was there.

    `waited` are the cycles up to the wait for the kernel ahead, which an early start hides behind that one.
    """

    cycles: int = 0
    loads: int = 0
    waited: int = 0


def latest(moments: Iterable[Moment]) -> Moment:
    cycles, loads = zip(*((each.cycles, each.loads) for each in moments), strict=True)
    return Moment(max(cycles), max(loads))


def first_product(code: Code, products: str, threads: int) -> Moment:
    """When a kernel of so many threads issues its first product; on CUDA cores the first of its main loop.

    Operands that one warp copies in bulk for the others are there a load after its first copy.
    """
    found: Collection[int] = positions(code, products)
    if products not in (TENSOR_CORES, WARPGROUP_TENSOR_CORES):
        found = set(found).intersection(main_loop_positions(code, products))
    turn = max(threads // THREADS_IN_TURN, 1)
    copies = positions(code, OPERANDS_IN_BULK)
    in_bulk = _end(code[copies[0]], follow(code, way_to(code, copies), turn)) if copies else Moment()
    return follow(code, way_to(code, found), turn, in_bulk)


def way_to(code: Code, goals: Collection[int]) -> list[int]:
    """The instructions from the entry to one of ``goals``, depth first and falling through before jumping.

    Raises:
        ValueError: they are not reached.
    """
    graph = graph_of(code)
    before: dict[int, int] = {}
    waiting = [(0, -1)]
    while waiting:
        node, last = waiting.pop()
        if node in before:
            continue
        before[node] = last
        if node in goals:
            way = [node]
            while before[way[-1]] >= 0:
                way.append(before[way[-1]])
            return way[::-1]
        if not _is_wall(code[node]):
            waiting += [(other, node) for other in graph[node]]
    raise ValueError(f"no way leads from the entry to any of {sorted(goals)}")


def _is_wall(instruction: Instruction) -> bool:
    if instruction.is_conditional:
        return False
    calls_function = instruction.opcode.startswith("CALL") and not instruction.targets
    return calls_function or _WALLS.fullmatch(instruction.opcode) is not None


def follow(code: Code, way: list[int], turn: int, in_bulk: Moment = Moment()) -> Moment:
    """When the last instruction of a way is issued, one at a time and none sooner than ``turn`` cycles on."""
    now = copied = Moment()
    waited = 0
    held: dict[int, list[Moment]] = defaultdict(list)
    for i in way:
        opcode, scheduling = code[i].opcode, code[i].scheduling
        for scoreboard, pending in scheduling.waits:
            holders = held[scoreboard]
            now = latest([now, *holders[: max(len(holders) - pending, 0)]])
        if opcode.startswith("SYNCS.PHASECHK"):
            now = latest([now, in_bulk])
        if opcode == "ACQBULK":
            waited = now.cycles
        if i == way[-1]:
            break
        end = copied if opcode == "LDGDEPBAR" else _end(code[i], now)
        if opcode.startswith("LDGSTS"):
            copied = latest([copied, end])
        if scheduling.result is not None:
            held[scheduling.result].append(end)
        if scheduling.operands is not None:
            held[scheduling.operands].append(Moment(now.cycles + OTHER_CYCLES, now.loads))
        wait = OTHER_CYCLES if _BARRIERS.fullmatch(opcode) else 0
        now = Moment(now.cycles + max(scheduling.stall, turn, wait), now.loads)
    return replace(now, waited=waited)


def _end(instruction: Instruction, start: Moment) -> Moment:
    """When the result of an instruction with a scoreboard is there."""
    opcode = instruction.opcode
    if _LOADS.fullmatch(opcode):
        return Moment(start.cycles + LOAD_CYCLES, start.loads + 1)
    if _SHARED.fullmatch(opcode):
        return Moment(start.cycles + SHARED_CYCLES, start.loads)
    return Moment(start.cycles + (CONSTANT_CYCLES if opcode.startswith("LDC") else OTHER_CYCLES), start.loads)
