"""What the tables are printed with: rich where it is installed, else plain text with the same calls."""

import re
import sys
import traceback
from dataclasses import dataclass, field
from typing import Any

try:
    from rich import box, console, table
except ModuleNotFoundError:
    HAS_RICH = False
else:
    HAS_RICH = True

WIDTH_IN_FILES = 200
_MARKUP = re.compile(r"\[/?(?:bold|red|green|yellow|default)?\]")


@dataclass
class PlainTable:
    """Columns of text, aligned. Takes what rich's Table takes of it, and ignores what is only looks."""

    title: str | None = None
    caption: str | None = None
    columns: list[tuple[str, str]] = field(default_factory=list)
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add_column(self, header: str, justify: str = "left", **looks: Any) -> None:
        self.columns.append((header, justify))

    def add_row(self, *cells: str) -> None:
        self.rows.append(tuple(_MARKUP.sub("", cell) for cell in cells))

    def __str__(self) -> str:
        headers = tuple(header for header, _ in self.columns)
        widths = [max(len(row[index]) for row in (headers, *self.rows)) for index in range(len(headers))]
        lines = [
            "  ".join(
                cell.rjust(width) if justify == "right" else cell.ljust(width)
                for cell, width, (_, justify) in zip(row, widths, self.columns, strict=True)
            ).rstrip()
            for row in (headers, *self.rows)
        ]
        return "\n".join(line for line in (self.title, *lines, self.caption) if line is not None)


class PlainConsole:
    """Prints without colours. Takes what rich's Console takes of it, and ignores what is only looks."""

    def print(self, *values: object, **looks: Any) -> None:
        print(*(_MARKUP.sub("", v) if isinstance(v, str) else v for v in values), flush=True)

    def print_exception(self) -> None:
        traceback.print_exc(file=sys.stdout)


Console = Any  # rich.console.Console or PlainConsole


def make_console() -> Console:
    """As wide as the terminal; wide enough for the tables where the output goes to a file."""
    if not HAS_RICH:
        return PlainConsole()
    made = console.Console()
    return made if made.is_terminal else console.Console(width=WIDTH_IN_FILES)


def make_table(title: str, caption: str | None = None, *, dense: bool = False) -> Any:
    """A table with a title above and a caption below; `dense` draws no lines between columns."""
    if not HAS_RICH:
        return PlainTable(title, caption)
    if dense:
        return table.Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    return table.Table(title=title, caption=caption)
