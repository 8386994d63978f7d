"""Machine instructions of a kernel, from nvdisasm's listing, and the loops that their branches make."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?)(U?P(?:\w+)) +)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"(\.L_x_\d+):")
_TARGET = re.compile(r"\.L_x_\d+")
_PENDING = re.compile(r" SB(\d), (0x\d+) ")
_NO_SCOREBOARD = 7

_JUMPS = ("BRA", "BRX", "JMP", "JMX", "CALL")
"""A call of a function names no label and is left out; one that names a label is a jump like the others."""

_ENDS = ("EXIT", "RET", "BRA", "BRX", "JMP", "JMX")

TENSOR_CORES = r"HMMA\..*"
"""The opcodes of mma.sync, modifiers included."""

WARPGROUP_TENSOR_CORES = r"HGMMA\..*"
"""The opcodes of wgmma, modifiers included."""

CUDA_CORES = r"FFMA\b.*"
"""The opcodes of fmaf."""

COPIES = r"LDGSTS\b.*"
"""The opcodes of cp.async."""

LOADS = r"LDG\b.*"
"""The opcodes of loads from global memory into registers."""


@dataclass(frozen=True)
class Scheduling:
    """What the compiler tells the scheduler of warps: an instruction's control bits.

    Attributes:
        stall: cycles until the next instruction may be issued.
        result: the scoreboard that is held until the result is there.
        operands: the scoreboard that is held until the operands are read.
        waits: the scoreboards waited for, each with how many may still hold it.
    """

    stall: int = 1
    result: int | None = None
    operands: int | None = None
    waits: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Instruction:
    """Its opcode with modifiers, whether a predicate may skip it, and where it may jump, by number."""

    opcode: str
    is_conditional: bool = False
    targets: tuple[int, ...] = ()
    scheduling: Scheduling = field(default=Scheduling(), compare=False, repr=False)

    @property
    def falls_through(self) -> bool:
        return self.is_conditional or self.opcode.partition(".")[0] not in _ENDS


Code = tuple[Instruction, ...]

Graph = list[list[int]]
"""For each instruction, by number, those that may come next."""


def parse_section(listing: str, encoding: bytes = b"") -> Code:
    """The instructions of a kernel in order: its section of what ``nvdisasm -c`` prints.

    How they are scheduled stands in their encoding alone, of 16 bytes each.
    """
    lines: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction)
    upper_halves = [high for _, high in struct.iter_unpack("<QQ", encoding)] or [0] * len(lines)
    found = []
    for instruction, upper_half in zip(lines, upper_halves, strict=True):
        negation, predicate, opcode, operands = instruction.groups()
        is_conditional = predicate is not None and not (negation == "@" and predicate in ("PT", "UPT"))
        names = _TARGET.findall(operands) if opcode.partition(".")[0] in _JUMPS else []
        pending = _PENDING.match(operands) if opcode == "DEPBAR.LE" else None
        scheduling = _scheduling(upper_half >> 41, pending and pending.groups())
        found.append(Instruction(opcode, is_conditional, tuple(labels[name] for name in names), scheduling))
    return tuple(found)


@cache
def _scheduling(control: int, pending: tuple[str, ...] | None) -> Scheduling:
    """From the control bits, and what ``DEPBAR.LE`` says of a scoreboard and those that may still hold it.

    The bits are, from the lowest, 4 for the stall, 1 for a hint, 3 for each scoreboard held, and a mask of 6.
    """
    result, operands, mask = control >> 5 & 7, control >> 8 & 7, control >> 11
    waits = [(scoreboard, 0) for scoreboard in range(6) if mask >> scoreboard & 1]
    if pending:
        waits.append((int(pending[0]), int(pending[1], 16)))
    return Scheduling(
        control & 15,
        result if result != _NO_SCOREBOARD else None,
        operands if operands != _NO_SCOREBOARD else None,
        tuple(waits),
    )


def count(code: Iterable[Instruction], pattern: str) -> int:
    """How many instructions have an opcode, modifiers included, that ``pattern`` matches as a whole."""
    matches = re.compile(pattern).fullmatch
    opcodes = Counter(instruction.opcode for instruction in code)
    return sum(number for opcode, number in opcodes.items() if matches(opcode))


def share(code: Code, pattern: str) -> float:
    """Of the instructions those that ``pattern`` matches. Skipped ones are issued all the same, and count."""
    return count(code, pattern) / len(code)


def positions(code: Code, pattern: str) -> list[int]:
    """Where the instructions that ``count`` counts are."""
    matches = re.compile(pattern).fullmatch
    return [i for i, instruction in enumerate(code) if matches(instruction.opcode)]


def main_loop(code: Code, products: str) -> Code:
    """The instructions of the loop that ``main_loop_positions`` finds."""
    return tuple(code[i] for i in main_loop_positions(code, products))


def main_loop_positions(code: Code, products: str) -> list[int]:
    """The loop with the most instructions that ``products`` matches, the innermost with so many.

    With blocks of it that lie elsewhere. A loop that stores to global memory is the epilogue's, and left out.

    Raises:
        ValueError: no such instruction lies in such a loop.
    """
    graph = graph_of(code)
    before: Graph = [[] for _ in graph]
    for node, following in enumerate(graph):
        for other in following:
            before[other].append(node)
    best: list[int] = []
    most = 1
    for nodes in _loops(graph, before, set(range(len(code)))):
        loop = tuple(code[i] for i in nodes)
        if count(loop, products) >= most and not count(loop, r"STG\b.*"):
            best, most = sorted(nodes), count(loop, products)
    if not best:
        raise ValueError(f"no loop has an instruction like {products}")
    return best


def graph_of(code: Code) -> Graph:
    following = []
    for i, instruction in enumerate(code):
        next_one = [i + 1] if instruction.falls_through and i + 1 < len(code) else []
        following.append([*instruction.targets, *next_one])
    return following


def _loops(graph: Graph, before: Graph, within: set[int]) -> Iterator[set[int]]:
    """The sets of nodes that reach one another, each before those in it that do so without its entry.

    Each has a jump back, in the order of the nodes.
    """
    found: set[int] = set()
    for node in sorted(within):
        if node in found or not any(other <= node for other in graph[node]):
            continue
        loop = _reached(graph, node, within) & _reached(before, node, within)
        if loop:
            found |= loop
            yield loop
            entries = [other for other in loop if not loop.issuperset(before[other])]
            yield from _loops(graph, before, loop - {min(entries, default=min(loop))})


def _reached(graph: Graph, start: int, within: Collection[int]) -> set[int]:
    """What lies on the ways from a node, the node itself where a way comes back."""
    found: set[int] = set()
    stack = [start]
    while stack:
        for other in graph[stack.pop()]:
            if other in within and other not in found:
                found.add(other)
                stack.append(other)
    return found
