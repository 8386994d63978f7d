"""The summary, what the small jobs have in it, and the JSON file."""

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.overhead import Overhead
from bench.pipeline import NetworkResult
from bench.stats import Summary
from bench.summary import LAUNCHES
from bench.terminal import Console

SCHEMA = 3
MOST_LINES = 8
WIDEST_LINE = 150


def time_text(summary: Summary) -> str:
    """Median and quartile distance with a unit that reads well: '12.3 ±0.4 us'."""
    unit, factor = ("us", 1e6) if summary.median < 1e-3 else ("ms", 1e3)
    return f"{summary.median * factor:.4g} ±{summary.spread * factor:.2g} {unit}"


def ratio_text(summary: Summary) -> str:
    return f"{summary.median:.2f} ({summary.low:.2f}-{summary.high:.2f})"


def clipped(lines: Sequence[str], most: int = MOST_LINES) -> list[str]:
    """The first of them, cut to a width, and how many more there are."""
    shown = [textwrap.shorten(line, WIDEST_LINE, placeholder=" ...") for line in lines[:most]]
    more = [f"and {len(lines) - most} more, in the file"] if len(lines) > most else []
    return [f"  {line}" for line in (*shown, *more)]


def print_summary(console: Console, lines: Sequence[str], failures: Sequence[str]) -> None:
    """What to read first, so it comes last: of a long log only the end may be seen."""
    console.print("[bold]summary")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"wrong or not run: {len(failures) or 'none'}", style="red" if failures else None)
    for line in clipped(failures):
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)


def pipeline_summary(results: Sequence[NetworkResult]) -> list[str]:
    """A line for each network, and one for each way of launching it."""
    lines = []
    for one in results:
        lines.append(
            f"photographs, {one.network} n{one.batch}: {one.layers_replaced} of {one.convolutions} "
            f"convolutions replaced; largest relative error of an image {one.fused_error:.2e}, of eager "
            f"{one.eager_error:.2e}; top-1 agreement {one.top1_agreement:.1%}"
        )
        lines += [
            f"  {LAUNCHES[launch]}: {time_text(latency.before)} before, {time_text(latency.after)} after, "
            f"{ratio_text(latency.speedup)}"
            for launch, latency in one.latency.items()
        ]
    return lines


def overhead_summary(result: Overhead) -> list[str]:
    """Host time per call, and the goal as information."""
    goal = f"goal {result.goal:.2g}: {'reached' if result.reached else 'not reached'}"
    return [
        f"host time of a call: {time_text(result.fused)}, three modules {time_text(result.three_modules)}, "
        f"in one module {time_text(result.hand_written)}; fused / three {ratio_text(result.ratio)}, {goal}"
    ]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` after the schema number. JSON has no infinity or NaN: they become "inf" and "nan"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = json.dumps(_finite_or_word({"schema": SCHEMA, **content}), indent=1, allow_nan=False)
    # A run that is killed while it writes must not take the result before with it.
    beside = path.with_suffix(".part")
    beside.write_text(written + "\n")
    beside.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; ValueError if it is no result of this version of the bench."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} should be a result of the bench with schema {SCHEMA}, got schema {schema}")
    return content


def _finite_or_word(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_word(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_word(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
