"""Tables on a terminal of any width: nothing is cropped. Imports neither pandas nor torch.

1. A table that fits is printed as it is, with columns closer to each other where that makes it fit; columns of prose may wrap
   between words.
2. A wider one of numbers is cut into blocks of columns below each other, its key columns repeated.
3. A wider one of prose, or whose keys leave no room, becomes a list: a heading a row, and a line a column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relp_cli.errors import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

WIDE, CLOSE = 3, 2  # characters between columns
PROSE = 32  # characters: text that is longer may wrap, to no less than this


@dataclass(frozen=True)
class Column:
    """One column as text. best: the cells that are set in bold."""

    name: str
    cells: Sequence[str]
    numeric: bool = False
    best: Sequence[bool] = ()

    @property
    def longest(self) -> int:
        return max(map(len, self.cells), default=0)

    @property
    def prose(self) -> bool:
        return not self.numeric and self.longest > PROSE and any(" " in cell for cell in self.cells)


def print_table(
    console: Console, columns: Sequence[Column], keys: int = 1, title: str | None = None, notes: Sequence[str] = ()
) -> None:
    """Print a table, in the form that fits the console's width; `keys`: how many of its first columns name a row."""
    if title:
        console.print(_text(title))
    if _fits(console, columns, WIDE):
        console.print(_table(columns, WIDE))
    elif _fits(console, columns):
        console.print(_table(columns))
    elif any(c.prose for c in columns) or not all(_fits(console, [*columns[:keys], c]) for c in columns[keys:]):
        _print_list(console, columns)
    else:
        for block in _blocks(console, columns, keys):
            console.print(_table(block))
    for note in notes:
        console.print(_text(f"  {note}"))


def _text(value: str, bold: bool = False) -> Text:
    """Text, never markup, whatever it holds."""
    from rich.text import Text

    return Text(visible(value), style="bold" if bold else "")


def _table(columns: Sequence[Column], gap: int = CLOSE) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, gap - 2))
    for column in columns:
        least = PROSE if column.prose else max(column.longest, len(column.name))
        justify = "right" if column.numeric else "left"
        table.add_column(_text(column.name), justify=justify, min_width=least, no_wrap=not column.prose)  # type: ignore[arg-type]
    for row in range(max((len(column.cells) for column in columns), default=0)):
        table.add_row(*(_text(c.cells[row], bold=bool(c.best) and c.best[row]) for c in columns))
    return table


def _fits(console: Console, columns: Sequence[Column], gap: int = CLOSE) -> bool:
    """gap: between columns; half of it stands before the first and after the last."""
    least = (PROSE if c.prose else max(c.longest, len(c.name)) for c in columns)
    return sum(width + gap for width in least) + 1 <= console.width


def _blocks(console: Console, columns: Sequence[Column], keys: int) -> Iterator[list[Column]]:
    """The columns in groups that fit, each behind the key columns."""
    first, rest = list(columns[:keys]), list(columns[keys:])
    block: list[Column] = []
    for column in rest:
        if block and not _fits(console, [*first, *block, column]):
            yield [*first, *block]
            block = []
        block.append(column)
    yield [*first, *block]


def _print_list(console: Console, columns: Sequence[Column]) -> None:
    from rich.padding import Padding
    from rich.table import Table

    heading, rest = columns[0], columns[1:]
    for row, name in enumerate(heading.cells):
        console.print(_text(name, bold=True))
        fields = Table.grid(padding=(0, 2, 0, 0))
        fields.add_column(no_wrap=True, style="dim")
        fields.add_column(overflow="fold")
        for column in rest:
            if column.cells[row]:
                fields.add_row(
                    _text(column.name), _text(column.cells[row], bold=bool(column.best) and column.best[row])
                )
        console.print(Padding(fields, (0, 0, 0, 2)))
