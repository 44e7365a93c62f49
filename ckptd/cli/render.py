"""What people see: tables on a terminal, aligned plain lines in a pipe, and JSON for programs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

_FEWEST = 60


def columns(most: int) -> int:
    """Return how many columns a line may have: `most`, or fewer on a terminal that is narrower."""
    return max(_FEWEST, min(most, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else most


def show_json(data: Any) -> None:
    """Print a documented JSON shape."""
    print(json.dumps(data, indent=2))


def show_table(titles: str, rows: Sequence[Sequence[object]], empty: str) -> None:
    """Print rows under the titles, of which those that end with > are aligned right; `empty` is said without rows."""
    columns = [(title.rstrip(">"), title.endswith(">")) for title in titles.split()]
    if not rows:
        print(empty)
    elif sys.stdout.isatty():
        _show_rich(columns, rows)
    else:
        _show_plain(columns, rows)


def _show_rich(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[object]]) -> None:
    from rich import box  # noqa: PLC0415 - a pipe needs no rich, which takes 50 ms to import
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title, right in columns:
        table.add_column(title, justify="right" if right else "left", no_wrap=right)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console().print(table)


def _show_plain(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[object]]) -> None:
    lines = [[title for title, _ in columns], *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    for line in lines:
        places = zip(line, widths, columns, strict=True)
        cells = (cell.rjust(width) if right else cell.ljust(width) for cell, width, (_, right) in places)
        print("  ".join(cells).rstrip())


def show_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Print names and values, one a line."""
    print("\n".join(aligned(fields)))


def aligned(fields: Sequence[tuple[str, object]]) -> list[str]:
    """Return names and values, one a line."""
    width = max(len(name) for name, _ in fields)
    return [f"{name:<{width}}  {value}" for name, value in fields]
