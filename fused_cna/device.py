"""A GPU by its figures, for plans on devices that are not here: :class:`Device`."""

import math
from dataclasses import asdict, dataclass
from typing import Any

_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "multiprocessors": (int,),
    "shared_per_multiprocessor": (int,),
    "shared_per_block": (int,),
    "clock_ghz": (float, int),
    "bandwidth_gbs": (float, int),
    "is_geforce": (bool,),
}


@dataclass(frozen=True)
class Device:
    """A GPU as the planner sees it; any can be given to :func:`fused_cna.explain`.

    Args:
        name: as it is printed.
        compute_capability: (major, minor), two ints, at least (8, 0).
        multiprocessors: their number.
        shared_per_multiprocessor: bytes of shared memory of a multiprocessor.
        shared_per_block: bytes that a block may use after opting in.
        clock_ghz: the highest clock, in GHz.
        bandwidth_gbs: of device memory, in GB/s.
        is_geforce: whether tensor cores take half the rate with float32 sums, as on GeForce cards.

    The bytes are in the CUDA programming guide's table of compute capabilities, the rest on the datasheet.

    Raises:
        TypeError: a figure of another type.
        ValueError: a figure that is not positive and finite, a compute capability below 8.0, or a block with
            more shared memory than its multiprocessor.

    >>> Device("A10", (8, 6), 72, 100 << 10, 99 << 10, clock_ghz=1.7, bandwidth_gbs=600)
    """

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_per_multiprocessor: int
    shared_per_block: int
    clock_ghz: float
    bandwidth_gbs: float
    is_geforce: bool = False

    def __post_init__(self) -> None:
        capability = self.compute_capability
        if not isinstance(capability, tuple) or [type(number) for number in capability] != [int, int]:
            raise TypeError(f"compute_capability must be two ints, such as (8, 6), but got {capability!r}")
        if capability < (8, 0):
            raise ValueError(f"compute_capability must be at least (8, 0), but got {capability}")
        for name, kinds in _KINDS.items():
            figure = getattr(self, name)
            if type(figure) not in kinds:
                words = " or ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"{name} must be of type {words}, but got {figure!r}")
            if type(figure) in (int, float) and not 0 < figure < math.inf:
                raise ValueError(f"{name} must be positive and finite, but got {figure}")
        if self.shared_per_block > self.shared_per_multiprocessor:
            raise ValueError(
                "shared_per_block must be at most shared_per_multiprocessor, but got "
                f"{self.shared_per_block} and {self.shared_per_multiprocessor}"
            )

    def fields(self) -> dict[str, Any]:
        """The figures as the planner takes them."""
        figures = asdict(self)
        del figures["name"]
        major, minor = figures.pop("compute_capability")
        return {
            **figures,
            "compute_major": major,
            "compute_minor": minor,
            "has_hopper_code": True,
            "has_tensor_maps": True,
        }
