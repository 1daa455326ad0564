"""Word lists: `.txt` (a word per line), `.csv` (rows with named forms, such as sg,pl), `.yaml` (a list of either)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relp_cli.config.load import read_values
from relp_cli.config.paths import data_root
from relp_cli.errors import RelpError, unknown

_ENDINGS = (".txt", ".csv", ".yaml")


@dataclass(frozen=True)
class Row:
    """One entry of a word list: its forms by column. A plain word has the single column `word`."""

    columns: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def key(self) -> str:
        """The first form: what identifies the row."""
        return self.words[0]

    def form(self, column: str | None) -> str:
        """The word in `column` (None: the first)."""
        return self.words[0 if column is None else self.columns.index(column)]


@dataclass(frozen=True)
class WordList:
    """A named list of rows that all have the same columns. `path` is None for values written in the task itself."""

    name: str
    rows: tuple[Row, ...]
    path: Path | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return self.rows[0].columns


def find_list(name: str, base: Path, task: Path | None = None) -> Path:
    """The file of a list: a path relative to the folder `base`, with its ending, or the name of a shipped list, without.

    task: the file that names it, which may be called as a list is.
    Raises: RelpError on an unknown name, with the nearest shipped one or the file of that name that is there; on a shipped name
    that a file in the folder has too; and on a path that leaves the folder: a task that somebody else wrote shows no other
    files of yours.
    """
    if "/" in name or "\\" in name or Path(name).suffix:
        path = base / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise RelpError(
                f"'{name}' leaves the task's folder; a word list is a shipped one or a file beside or below the task"
            )
        if path.suffix not in _ENDINGS:
            raise RelpError(f"'{name}': expected a word list that ends in {', '.join(_ENDINGS)}")
        if not path.is_file():
            raise RelpError(f"no such word list: {path}")
        return path
    root = data_root("datasets")
    beside = [f"{name}{ending}" for ending in _ENDINGS if (base / f"{name}{ending}").is_file()]
    beside = [file for file in beside if base / file != task]
    for ending in _ENDINGS:
        shipped = root / f"{name}{ending}"
        if not shipped.is_file():
            continue
        # Another task may have a list's name; what ends otherwise can only be meant as one.
        own = next(
            (file for file in beside if not file.endswith(".yaml") and not (base / file).samefile(shipped)), None
        )
        if own is not None:
            raise RelpError(
                f"'{name}' is a shipped word list, and {own} is beside the task: write '{own}' for that file, or rename it"
            )
        return shipped
    if beside:
        lists = [file for file in beside if not file.endswith(".yaml")] or beside
        written = " or ".join(f"'{file}'" for file in lists)
        raise RelpError(
            f"no shipped word list '{name}'; a file beside the task is named with its ending: write {written}"
        )
    raise unknown("word list", name, [p.stem for p in root.iterdir() if p.suffix in _ENDINGS])


def read_list(name: str, path: Path) -> WordList:
    """Read a word list. Raises: RelpError on an empty list, a repeated word, and rows with missing forms."""
    if path.suffix == ".yaml":
        values = read_values(path).values
        if not isinstance(values, list):
            raise RelpError(f"{path}:1: expected a YAML list of words or of rows")
        return inline_list(name, values, str(path), path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RelpError(f"{path}: cannot be read: {error}") from None
    lines = [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1)]
    lines = [(i, line) for i, line in lines if line and not line.startswith("#")]
    if path.suffix == ".csv":
        if not lines:
            raise RelpError(f"{path}: word list '{name}' is empty")
        cells = [_cells(line, f"{path}:{i}: ") for i, line in lines]
        if len(set(cells[0])) < len(cells[0]):
            raise RelpError(f"{path}:{lines[0][0]}: two forms of one name in {cells[0]}")
        for (i, _), row in zip(lines, cells, strict=True):
            if len(row) != len(cells[0]) or not all(row):
                raise RelpError(f"{path}:{i}: expected {len(cells[0])} words ({', '.join(cells[0])}), got {row}")
        rows = [Row(cells[0], row) for row in cells[1:]]
    else:
        rows = [Row(("word",), (line,)) for _, line in lines]
    return _checked(name, rows, str(path), path)


def _cells(line: str, where: str) -> tuple[str, ...]:
    try:
        return tuple(cell.strip() for cell in next(csv.reader([line])))
    except csv.Error as error:
        raise RelpError(f"{where}not valid CSV: {error}") from None


def inline_list(name: str, values: Sequence[object], where: str, path: Path | None = None) -> WordList:
    """A list from YAML values: words, or mappings of forms that all have the same keys."""
    rows = []
    for value in values:
        if isinstance(value, dict) and value and all(isinstance(word, str) for word in value.values()):
            rows.append(Row(tuple(value), tuple(value.values())))
        elif isinstance(value, str):
            rows.append(Row(("word",), (value,)))
        else:
            got = repr(value)
            got = got if len(got) <= 60 else f"{got[:57]}..."
            raise RelpError(f"{where}: expected a word or a mapping of forms, got {got} (quote it if it is a word)")
    for row in rows:
        if row.columns != rows[0].columns:
            raise RelpError(f"{where}: all rows need the same keys {rows[0].columns}, got {row.columns}")
    return _checked(name, rows, where, path)


def _checked(name: str, rows: list[Row], where: str, path: Path | None) -> WordList:
    if not rows:
        raise RelpError(f"{where}: word list '{name}' is empty")
    seen: set[str] = set()
    for row in rows:
        if row.key in seen:
            raise RelpError(f"{where}: word list '{name}': '{row.key}' occurs twice")
        seen.add(row.key)
    return WordList(name, tuple(rows), path)
