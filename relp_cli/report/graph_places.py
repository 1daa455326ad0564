"""Where the interactive graph draws a circuit's nodes: layers up, positions (or heads) across, several nodes to a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LINE, LINES = 6, 3  # places of a cell: per line, and lines
FIRST = 1500  # cells are as large as these nodes, the strongest, need
APART = 1.2  # how far to the right of the others an error term, or an MLP, stands
GAP, SPACE = 0.9, 0.35  # between columns, between rows
BAR = -1  # the column of a node that is one bar across all columns


@dataclass(frozen=True)
class Mark:
    """A node before it has a place.

    name: in full. row, column: of the grid. kind: of `SHAPES`. text: inside the mark. order: in the cell, from left to right.
    apart: right of the cell's other nodes. rise: how far above the middle of its row, in lines. unit: without its position.
    """

    name: str
    row: int
    column: int
    kind: str
    text: str = ""
    order: int = 0
    apart: bool = False
    rise: float = 0.0
    unit: str = ""


@dataclass(frozen=True)
class Places:
    """x, y: in places and lines, y upwards. over: nodes for which their cell has no place; it counts them instead.

    rows: the middle of every row. columns: left edge and width of every column. width, height: of the whole.
    """

    x: np.ndarray
    y: np.ndarray
    over: np.ndarray
    rows: list[float]
    columns: list[tuple[float, float]]
    width: float
    height: float


def placed(
    marks: Sequence[Mark], n_rows: int, n_columns: int, which: Sequence[int] | None = None, empty: float = 1.0
) -> Places:
    """Marks in the order of strength get the places of their cell in turn; those that have one stand in their own order.

    which: numbers of the marks that get a place (None: all). empty: the width of a column without any.
    """
    which = range(len(marks)) if which is None else which
    cells: dict[tuple[int, int], list[int]] = {}
    apart: set[int] = set()
    for i in which:
        if marks[i].apart:
            apart.add(marks[i].column)
        elif marks[i].column != BAR:
            cells.setdefault((marks[i].row, marks[i].column), []).append(i)
    first = set(which[:FIRST])
    needed = {cell: sum(i in first for i in members) for cell, members in cells.items()}
    fullest = [max((n for (_, c), n in needed.items() if c == column), default=0) for column in range(n_columns)]
    per_line = [min(max(n, 1), LINE) for n in fullest]
    widths = [float(size) if n else empty for n, size in zip(fullest, per_line, strict=True)]
    lines = [1] * n_rows
    for (row, column), n in needed.items():
        lines[row] = max(lines[row], min(-(-n // per_line[column]), LINES))
    more = [APART if column in apart else 0.0 for column in range(n_columns)]
    starts = np.cumsum([0.0, *(w + m + GAP for w, m in zip(widths, more, strict=True))])
    bottoms = np.cumsum([0.0, *(n + SPACE for n in lines)])
    x, y, over = np.zeros(len(marks)), np.zeros(len(marks)), np.zeros(len(marks), dtype=bool)
    width = float(starts[-1] - GAP)
    for i in which:
        row, column = marks[i].row, marks[i].column
        if column == BAR or marks[i].apart:
            x[i] = (width - 1) / 2 if column == BAR else float(starts[column]) + widths[column] - 1 + APART
            y[i] = bottoms[row] + (lines[row] - 1) / 2 + (marks[i].rise if lines[row] == 1 else 0.0)
    for (row, column), members in cells.items():
        size = per_line[column] * lines[row]
        kept = members if len(members) <= size else members[: size - 1]
        left, bottom = float(starts[column]), float(bottoms[row])
        count = len(kept) if len(kept) == len(members) else size
        for place, i in enumerate(sorted(kept, key=lambda i: (marks[i].order, marks[i].name))):
            x[i], y[i] = _place(place, count, per_line[column], lines[row], left, bottom)
            y[i] += marks[i].rise if lines[row] == 1 else 0.0
        for i in members[len(kept) :]:
            over[i] = True
            x[i], y[i] = _place(size - 1, size, per_line[column], lines[row], left, bottom)
    rows = [float(b + (n - 1) / 2) for b, n in zip(bottoms, lines, strict=False)]
    edges = [(float(s), w + m) for s, w, m in zip(starts, widths, more, strict=False)]
    return Places(x, y, over, rows, edges, width, float(bottoms[-1] - SPACE))


def _place(place: int, count: int, per_line: int, lines: int, left: float, bottom: float) -> tuple[float, float]:
    """x and y of one of `count` nodes of a cell: lines from below, centred in the cell."""
    line, at = divmod(place, per_line)
    used, in_line = -(-count // per_line), min(per_line, count - line * per_line)
    return left + at + (per_line - in_line) / 2, bottom + (lines - used) / 2 + line


def layout(places: Places) -> Mapping[str, Any]:
    """Where the script draws what."""
    return {
        "x": [round(float(v), 3) for v in places.x],
        "y": [round(float(v), 3) for v in places.y],
        "over": [int(v) for v in places.over],
        "rows": places.rows,
        "columns": places.columns,
        "size": [places.width, places.height],
    }


def as_columns(marks: Sequence[Mark], kinds: Sequence[str]) -> Mapping[str, list[Any]]:
    """What the script says of nodes."""
    number = {kind: i for i, kind in enumerate(kinds)}
    return {
        "row": [mark.row for mark in marks],
        "column": [mark.column for mark in marks],
        "kind": [number[mark.kind] for mark in marks],
        "name": [mark.name for mark in marks],
        "text": [mark.text for mark in marks],
    }
