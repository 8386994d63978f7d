"""One turn of the loop in which a kernel stores its results."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from tests.machine_code import Code, Graph, count, graph_of, positions

WIDE_LOADS = r"LDG\.E.*\.128.*"
WIDE_COPIES = r"LDGSTS\.E.*\.128.*"
WIDE_STORES = r"STG\.E.*\.128.*"
WAITS = r"DEPBAR\..*"


def epilogue_turns(code: Code) -> tuple[Code, Code]:
    """The shortest way from a 16-byte store back to it: as it is, and with a 16-byte residual.

    Where a turn can copy the residual of a later one to shared memory, and wait for its own, it does so; else
    it loads the residual. What a predicate skips may lie in both. Empty where no loop does so.
    """
    graph = graph_of(code)
    loads, copies, waits, stores = (
        positions(code, pattern) for pattern in (WIDE_LOADS, WIDE_COPIES, WAITS, WIDE_STORES)
    )
    plain, with_residual = [], []
    for store in stores:
        # A turn that stores several rows is one in which all of them exist.
        rest = [[other] for other in stores if other != store]
        rest = rest if _shortest_turn(graph, store, rest) else []
        asked = [[copy] for copy in copies if _shortest_turn(graph, store, [[copy]])]
        plain.append(_shortest_turn(graph, store, rest))
        with_residual.append(_shortest_turn(graph, store, [*rest, *asked, waits if asked else loads]))
    shortest = [min(filter(None, turns), key=len, default=[]) for turns in (plain, with_residual)]
    return tuple(code[i] for i in shortest[0]), tuple(code[i] for i in shortest[1])


def instructions_per_output(turn: Code, value_bytes: int) -> float:
    return len(turn) * value_bytes / (16 * count(turn, WIDE_STORES))


def _shortest_turn(graph: Graph, start: int, past: Collection[Collection[int]]) -> list[int]:
    """The nodes after ``start`` on the shortest way back to it; empty where there is none.

    On the way it passes one node of each collection in ``past``.
    """
    marks: dict[int, int] = {}
    for i, nodes in enumerate(past):
        marks |= {node: marks.get(node, 0) | 1 << i for node in nodes}
    first, last = (start, 0), (start, (1 << len(past)) - 1)
    before: dict[tuple[int, int], tuple[int, int]] = {}
    waiting = deque([first])
    while waiting and last not in before:
        place = waiting.popleft()
        for node in graph[place[0]]:
            reached = node, place[1] | marks.get(node, 0)
            if reached not in before:
                before[reached] = place
                waiting.append(reached)
    turn = [start] if last in before else []
    while turn and before[last] != first:
        last = before[last]
        turn.append(last[0])
    return turn[::-1]
