"""How a kernel begins and ends: instructions before its first load, and one turn of the loop that stores."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence

from tests.machine_code import COPIES, Code, Graph, count, graph_of, positions

LOADS = r"LDG\..*"
WIDE_LOADS = r"LDG\.E.*\.128.*"
WIDE_COPIES = r"LDGSTS\.E.*\.128.*"
WIDE_STORES = r"STG\.E.*\.128.*"
COMMIT = "LDGDEPBAR"
WAITS = r"DEPBAR\..*"

TURNS_TO_WAIT = 16
"""A load that so many turns do not wait for is waited for nowhere."""


def before_the_first_load(code: Code) -> tuple[int, int]:
    """Instructions before the first copy to shared memory, or before the first load where there is no copy.

    On the shortest path there, which goes around every loop in which some thread may have no share, and in
    the code as it lies, with all branches of these loops.
    """
    loads = positions(code, COPIES) or positions(code, LOADS)
    return len(_shortest_walk(graph_of(code), 0, set(loads))), min(loads)


def epilogue_turns(code: Code) -> tuple[Code, Code]:
    """The shortest way from a 16-byte store back to it: as it is, and with a 16-byte residual.

    Where a turn can copy the residual of a later one to shared memory, and wait for its own, it does so; else
    it loads the residual. What a predicate skips may lie in both. Empty where no loop does so.
    """
    graph = graph_of(code)
    loads, copies, waits = (set(positions(code, pattern)) for pattern in (WIDE_LOADS, WIDE_COPIES, WAITS))
    plain: list[int] = []
    loading: list[int] = []
    copying: list[int] = []
    stores = positions(code, WIDE_STORES)
    for store in stores:
        # A turn that stores several rows is one in which all of them exist.
        every = [[{other}] for other in stores if other != store]
        rest = every if _shortest_walk(graph, store, {store}, every) else []
        plain = _shorter(plain, _shortest_walk(graph, store, {store}, rest))
        loading = _shorter(loading, _shortest_walk(graph, store, {store}, [*rest, [loads]]))
        asked = [[{copy}] for copy in copies if _shortest_walk(graph, store, {store}, [[{copy}]])]
        if asked:
            copying = _shorter(copying, _shortest_walk(graph, store, {store}, [*rest, *asked, [waits]]))
    return tuple(code[i] for i in plain), tuple(code[i] for i in copying or loading)


def instructions_per_output(turn: Code, value_bytes: int) -> float:
    return len(turn) * value_bytes / (16 * count(turn, WIDE_STORES))


def shared_loads(turn: Code) -> Counter[int]:
    """How many loads from shared memory a turn has, by their bits."""
    widths = [re.search(r"\d+$", each.opcode) for each in turn if each.opcode.partition(".")[0] == "LDS"]
    return Counter(int(width[0]) if width else 32 for width in widths)


def residual_loads_under_way(turn: Code) -> int | None:
    """How many 16-byte loads of the residual a thread has started when it first waits for one of them.

    Copies to shared memory are waited for in groups: those that a wait leaves under way, and the one that it
    is for. A load into registers is waited for by its barrier. None where the turn waits for nothing.
    """
    if groups := count(turn, COMMIT):
        left = [each.leaves for each in turn if each.leaves is not None]
        return (min(left) + 1) * count(turn, WIDE_COPIES) // groups if left else None
    first = positions(turn, WIDE_LOADS)[0]
    barrier, under_way = turn[first].barrier, 1
    for each in (turn[first + 1 :] + turn[: first + 1]) * TURNS_TO_WAIT:
        if barrier is not None and each.waits >> barrier & 1:
            return under_way
        under_way += count([each], WIDE_LOADS)
    return None


def _shorter(one: list[int], other: list[int]) -> list[int]:
    """The shorter of two walks; an empty one is none."""
    return min((one, other), key=lambda walk: len(walk) or float("inf"))


def _shortest_walk(
    graph: Graph, start: int, ends: set[int], past: Sequence[Sequence[set[int]]] = ()
) -> list[int]:
    """The nodes after ``start`` on the shortest walk to one of the ends; empty where there is none.

    On the way it passes, for each sequence of sets in ``past``, a node of each set in that order.
    """
    marked = {node for sets in past for nodes in sets for node in nodes}
    first = (start, (0,) * len(past))
    everything = tuple(map(len, past))
    before: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}
    waiting = deque([first])
    while waiting:
        place = waiting.popleft()
        for node in graph[place[0]]:
            passed = place[1]
            if node in marked:
                passed = tuple(
                    done + (done < len(sets) and node in sets[done])
                    for done, sets in zip(passed, past, strict=True)
                )
            reached = (node, passed)
            if reached in before:
                continue
            before[reached] = place
            if node in ends and passed == everything:
                walk = [node]
                while place != first:
                    walk.append(place[0])
                    place = before[place]
                return walk[::-1]
            waiting.append(reached)
    return []
