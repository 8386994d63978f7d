"""How a kernel begins and ends: instructions before its first load, and one turn of the loop that stores."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tests.machine_code import COPIES, LOADS, Code, Graph, count, graph_of, positions

WIDE_LOADS = r"LDG\.E.*\.128.*"
WIDE_COPIES = r"LDGSTS\.E.*\.128.*"
WIDE_STORES = r"STG\.E.*\.128.*"
WAITS = r"DEPBAR\..*"


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
        every = [{other} for other in stores if other != store]
        rest = every if _shortest_walk(graph, store, {store}, every) else []
        plain = _shorter(plain, _shortest_walk(graph, store, {store}, rest))
        loading = _shorter(loading, _shortest_walk(graph, store, {store}, [*rest, loads]))
        asked = [{copy} for copy in copies if _shortest_walk(graph, store, {store}, [{copy}])]
        if asked:
            copying = _shorter(copying, _shortest_walk(graph, store, {store}, [*rest, *asked, waits]))
    return tuple(code[i] for i in plain), tuple(code[i] for i in copying or loading)


def instructions_per_output(turn: Code, value_bytes: int) -> float:
    return len(turn) * value_bytes / (16 * count(turn, WIDE_STORES))


def _shorter(one: list[int], other: list[int]) -> list[int]:
    """The shorter of two walks; an empty one is none."""
    return min((one, other), key=lambda walk: len(walk) or float("inf"))


def _shortest_walk(graph: Graph, start: int, ends: set[int], past: Sequence[set[int]] = ()) -> list[int]:
    """The nodes after ``start`` on the shortest walk to one of the ends; empty where there is none.

    On the way it passes a node of each set in ``past``.
    """
    marks = {
        node: sum(1 << i for i, nodes in enumerate(past) if node in nodes) for node in set().union(*past)
    }
    first, everything = (start, 0), (1 << len(past)) - 1
    before: dict[tuple[int, int], tuple[int, int]] = {}
    waiting = deque([first])
    while waiting:
        place = waiting.popleft()
        for node in graph[place[0]]:
            reached = node, place[1] | marks.get(node, 0)
            if reached in before:
                continue
            before[reached] = place
            if node in ends and reached[1] == everything:
                walk = [node]
                while place != first:
                    walk.append(place[0])
                    place = before[place]
                return walk[::-1]
            waiting.append(reached)
    return []
