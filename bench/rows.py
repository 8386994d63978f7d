"""What the layers job measures: rows, each a layer at a batch and a precision, the most telling first."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from bench.layer_list import ROLES, Layer, layers_of_roles
from bench.networks import NETWORKS, layers_of_network
from bench.roofline import Ceilings, floor
from bench.setting import PRECISIONS

QUICK_COUNT = 8
SUITES = {
    "default": f"one layer for each of {len(ROLES)} roles, from 194 networks",
    "quick": f"the first {QUICK_COUNT} of those",
    **{name: network.summary for name, network in NETWORKS.items()},
}
ORDER_RULE = (
    "Within a network at one batch and precision, layers are ranked by their share of its floor time (uses "
    "times the roofline's time). All first layers are measured, then all second ones, and so on; within a "
    "rank by precision, then batch, then suite, as they were given. The suites default and quick keep their "
    "own order. A layer that several suites have is measured once, when its first turn comes."
)


@dataclass
class Row:
    """A layer at a batch and a precision, measured once. `uses` is how often each suite has it."""

    layer: Layer
    batch: int
    precision: str
    uses: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The same for the same measurement in every file: every number, whatever the suites."""
        numbers = {name: value for name, value in asdict(self.layer).items() if name not in _NOT_MEASURED}
        return f"{self.precision} n{self.batch} " + " ".join(str(value) for value in numbers.values())

    @property
    def name(self) -> str:
        """For people: 'fp16 n8 3x3 64 @56 BN ReLU'."""
        return f"{self.precision} n{self.batch} {self.layer.name}"

    @property
    def itemsize(self) -> int:
        return PRECISIONS[self.precision].dtype.itemsize


_NOT_MEASURED = ("uses", "models", "role")


def layers_of(suite: str) -> tuple[Layer, ...]:
    """The distinct layers of a suite, in the suite's own order; `uses` is how often it has each."""
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
    if suite in NETWORKS:
        return layers_of_network(suite)
    chosen = tuple(replace(layer, uses=1) for layer in layers_of_roles())
    return chosen[:QUICK_COUNT] if suite == "quick" else chosen


def ordered_rows(
    suites: Sequence[str],
    batches: Sequence[int],
    precisions: Sequence[str],
    ceilings: Mapping[str, Ceilings],
) -> list[Row]:
    """Every row once, by ORDER_RULE. `ceilings` has those of each precision."""
    turns: list[tuple[int, Row]] = []
    for precision in precisions:
        for batch in batches:
            for suite in suites:
                rows = _ranked(suite, batch, precision, ceilings[precision])
                turns += enumerate(rows)
    turns.sort(key=lambda turn: turn[0])
    merged: dict[str, Row] = {}
    for _, row in turns:
        merged.setdefault(row.key, row).uses.update(row.uses)
    return list(merged.values())


def _ranked(suite: str, batch: int, precision: str, ceilings: Ceilings) -> list[Row]:
    rows = [Row(layer, batch, precision, {suite: layer.uses}) for layer in layers_of(suite)]
    if suite not in NETWORKS:
        return rows
    return sorted(rows, key=lambda row: -network_floor(row, suite, ceilings))


def network_floor(row: Row, suite: str, ceilings: Ceilings) -> float:
    """Seconds that the roofline gives a network for this row: its uses times its floor."""
    return row.uses[suite] * floor(row.layer, row.batch, row.itemsize, ceilings).seconds
