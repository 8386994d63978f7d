"""The few statistics that the tables need."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of repeated measurements, in the unit of the samples."""

    median: float
    low: float
    high: float
    count: int

    @property
    def spread(self) -> float:
        """The distance between the quartiles."""
        return self.high - self.low

    def as_json(self) -> dict[str, float | int]:
        return {"median": self.median, "low": self.low, "high": self.high, "count": self.count}


def summarize(samples: Sequence[float]) -> Summary:
    """Median and lower and upper quartile of `samples` (ValueError if there are none)."""
    if not samples:
        raise ValueError("summarize needs at least one sample, got none")
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0], 1)
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return Summary(median(samples), low, high, len(samples))


def geometric_mean(ratios: Sequence[float]) -> float:
    """The geometric mean of positive `ratios` (ValueError if there are none, or one is not positive)."""
    if not ratios or min(ratios) <= 0:
        raise ValueError(f"geometric_mean needs at least one ratio, all positive, got {list(ratios)}")
    return math.exp(math.fsum(math.log(ratio) for ratio in ratios) / len(ratios))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Summary:
    """Ratios of times taken in the same rounds: pairing cancels what slows both, as another process does."""
    if len(numerator) != len(denominator):
        raise ValueError(
            f"paired_ratio needs one time of each per round, got {len(numerator)} and {len(denominator)}"
        )
    return summarize([above / below for above, below in zip(numerator, denominator, strict=True)])


def verdict(speedup: Summary) -> str:
    """'faster' or 'slower' when three quarters of the rounds say so, else 'even'."""
    if speedup.low > 1:
        return "faster"
    return "slower" if speedup.high < 1 else "even"
