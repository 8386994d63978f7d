"""Machine instructions of a kernel, from nvdisasm's listing, and the loops that their branches make."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?)(U?P(?:\w+)) +)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"(\.L_x_\d+):")
_TARGET = re.compile(r"\.L_x_\d+")
_GROUPS_LEFT = re.compile(r" SB\d, (0x[0-9a-f]+)")

_JUMPS = ("BRA", "BRX", "JMP", "JMX", "CALL")
"""A call of a function names no label and is left out; one that names a label is a jump like the others."""

_ENDS = ("EXIT", "RET", "BRA", "BRX", "JMP", "JMX")

TENSOR_CORES = r"HMMA\..*"
"""The opcodes of mma.sync, modifiers included."""

CUDA_CORES = r"FFMA\b.*"
"""The opcodes of fmaf."""

COPIES = r"LDGSTS\..*"
"""The opcodes of cp.async."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its modifiers.
        is_conditional: whether a predicate may skip it.
        targets: where it may jump, as indices into the kernel's instructions.
        barrier: the one that is released when its result is there.
        waits: the barriers that it waits for, a bit each.
        leaves: as many groups of copies may be under way when it has waited.
    """

    opcode: str
    is_conditional: bool = False
    targets: tuple[int, ...] = ()
    barrier: int | None = None
    waits: int = 0
    leaves: int | None = None

    @property
    def falls_through(self) -> bool:
        return self.is_conditional or self.opcode.partition(".")[0] not in _ENDS


Code = tuple[Instruction, ...]

Graph = list[list[int]]
"""For each instruction, by number, those that may come next."""


def parse_section(listing: str, encodings: bytes) -> Code:
    """The instructions of a kernel in order: its section of what ``nvdisasm -c`` prints, and its bytes."""
    found: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append(instruction)
    control = [int.from_bytes(encodings[at + 8 : at + 16], "little") for at in range(0, 16 * len(found), 16)]
    return tuple(_make_instruction(*each, labels) for each in zip(found, control, strict=True))


def _make_instruction(match: re.Match[str], control: int, labels: dict[str, int]) -> Instruction:
    negation, predicate, opcode, operands = match.groups()
    is_conditional = predicate is not None and not (negation == "@" and predicate in ("PT", "UPT"))
    jumps = opcode.partition(".")[0] in _JUMPS
    targets = tuple(labels[name] for name in _TARGET.findall(operands)) if jumps else ()
    # of an instruction's 128 bits 110 to 112 are the barrier, 116 to 121 those that it waits for
    barrier, waits = control >> 46 & 7, control >> 52 & 63
    left = _GROUPS_LEFT.match(operands) if opcode == "DEPBAR.LE" else None
    leaves = int(left[1], 16) if left else None
    return _shared(opcode, is_conditional, targets, None if barrier == 7 else barrier, waits, leaves)


_shared = cache(Instruction)
"""Instructions that say the same are one object: an extension has millions."""


def count(code: Iterable[Instruction], pattern: str) -> int:
    """How many instructions have an opcode, modifiers included, that ``pattern`` matches as a whole."""
    matches = re.compile(pattern).fullmatch
    opcodes = Counter(instruction.opcode for instruction in code)
    return sum(number for opcode, number in opcodes.items() if matches(opcode))


def positions(code: Code, pattern: str) -> list[int]:
    """Where the instructions that ``count`` counts are."""
    matches = re.compile(pattern).fullmatch
    return [i for i, instruction in enumerate(code) if matches(instruction.opcode)]


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop: ``every_turn`` is the part that no turn can go around."""

    all: Code
    every_turn: Code

    def share(self, pattern: str) -> float:
        """The share of instructions that ``pattern`` matches, over the whole loop."""
        return count(self.all, pattern) / len(self.all)

    def families(self) -> Counter[str]:
        """How often each opcode occurs in the whole loop, without its modifiers."""
        return Counter(instruction.opcode.partition(".")[0] for instruction in self.all)


def main_loop(code: Code, pattern: str = TENSOR_CORES) -> Loop:
    """The loop with the most instructions that ``pattern`` matches, blocks that lie elsewhere included.

    A loop that stores to global memory is the epilogue's, and left out. A loop is everything that can be
    reached from one of its instructions, following branches, and from which that instruction can be reached
    again. A skipped instruction is issued all the same, and counts.

    Raises:
        ValueError: no such instruction lies in such a loop.
    """
    graph = graph_of(code)
    loops = [loop for loop in _strong_components(graph) if not count((code[i] for i in loop), r"STG\..*")]
    loop = max(loops, key=lambda nodes: count((code[i] for i in nodes), pattern), default=set())
    if not count((code[i] for i in loop), pattern):
        raise ValueError(f"no loop has an instruction like {pattern}")
    every_turn = _unavoidable(graph, loop)
    return Loop(tuple(code[i] for i in sorted(loop)), tuple(code[i] for i in every_turn))


def innermost_loop(code: Code, pattern: str) -> Code:
    """The loop with no other in it that has the most instructions that ``pattern`` matches.

    For loops whose instructions lie next to each other, from a jump's target to the jump back.

    Raises:
        ValueError: no such instruction lies in such a loop.
    """
    spans = [(target, i) for i, jump in enumerate(code) for target in jump.targets if target <= i]
    inner = [
        (start, end)
        for start, end in spans
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in spans)
    ]
    loops = [code[start : end + 1] for start, end in inner]
    best = max(loops, key=lambda loop: count(loop, pattern), default=())
    if not count(best, pattern):
        raise ValueError(f"no innermost loop has an instruction like {pattern}")
    return best


def graph_of(code: Code) -> Graph:
    following = []
    for i, instruction in enumerate(code):
        next_one = [i + 1] if instruction.falls_through and i + 1 < len(code) else []
        following.append([*instruction.targets, *next_one])
    return following


def reversed_graph(graph: Graph) -> Graph:
    """For each instruction those that may come before."""
    reverse: Graph = [[] for _ in graph]
    for node, following in enumerate(graph):
        for other in following:
            reverse[other].append(node)
    return reverse


def _strong_components(graph: Graph) -> list[set[int]]:
    """The sets of nodes that reach one another, nodes that do not reach themselves left out."""
    reverse = reversed_graph(graph)
    components = []
    left = set(range(len(graph)))
    for node in reversed(_postorder(graph)):
        if node in left:
            component = _reached(reverse, node, left)
            left -= component
            if len(component) > 1 or node in graph[node]:
                components.append(component)
    return components


def _postorder(graph: Graph) -> list[int]:
    """Every node after those that it leads to, as a depth-first walk leaves them."""
    order: list[int] = []
    seen: set[int] = set()
    for start in range(len(graph)):
        stack = [] if start in seen else [(start, iter(graph[start]))]
        seen.add(start)
        while stack:
            node, following = stack[-1]
            unseen = next((other for other in following if other not in seen), None)
            if unseen is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(unseen)
                stack.append((unseen, iter(graph[unseen])))
    return order


def _reached(graph: Graph, start: int, within: Collection[int]) -> set[int]:
    found, stack = {start}, [start]
    while stack:
        for other in graph[stack.pop()]:
            if other in within and other not in found:
                found.add(other)
                stack.append(other)
    return found


def _unavoidable(graph: Graph, loop: set[int]) -> list[int]:
    """The nodes of a loop without which no walk inside it comes back."""
    inside = {node: [other for other in graph[node] if other in loop] for node in loop}
    arrivals = Counter(other for following in inside.values() for other in following)
    found: list[int] = []
    for node in sorted(loop):
        continues = inside.get(node - 1) == [node] and arrivals[node] == 1
        # what follows in a straight line shares the answer, which is dear
        if found[-1:] == [node - 1] if continues else not _has_cycle(graph, loop - {node}):
            found.append(node)
    return found


def _has_cycle(graph: Graph, within: set[int]) -> bool:
    """Whether a walk inside ``within`` can come back: taking away nodes that nothing leads to leaves some."""
    arrivals = Counter(other for node in within for other in graph[node] if other in within)
    free = [node for node in within if not arrivals[node]]
    left = len(within)
    while free:
        left -= 1
        for other in graph[free.pop()]:
            if other in within:
                arrivals[other] -= 1
                if not arrivals[other]:
                    free.append(other)
    return left > 0
