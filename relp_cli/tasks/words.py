"""Word lists: `.txt` (a word per line), `.csv` (rows with named forms, such as sg,pl), `.yaml` (a list of either)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

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


def find_list(name: str, base: Path) -> Path:
    """The file of a list: a path relative to the folder `base`, or the name of a shipped list.

    Raises: RelpError on an unknown name, with the nearest shipped one.
    """
    if Path(name).suffix:
        path = base / name
        if not path.is_file():
            raise RelpError(f"no such word list: {path}")
        return path
    root = data_root("datasets")
    for ending in _ENDINGS:
        if (root / f"{name}{ending}").is_file():
            return root / f"{name}{ending}"
    raise unknown("word list", name, [p.stem for p in root.iterdir() if p.suffix in _ENDINGS])


def read_list(name: str, path: Path) -> WordList:
    """Read a word list. Raises: RelpError on an empty list, a repeated word, and rows with missing forms."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RelpError(f"{path}: cannot be read: {error}") from None
    if path.suffix == ".yaml":
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RelpError(f"{path}: not valid YAML: {getattr(error, 'problem', error)}") from None
        if not isinstance(values, list):
            raise RelpError(f"{path}:1: expected a YAML list of words or of rows")
        return inline_list(name, values, str(path), path)
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
    lines = [(i, line) for i, line in lines if line and not line.startswith("#")]
    if path.suffix == ".csv":
        if not lines:
            raise RelpError(f"{path}: word list '{name}' is empty")
        cells = [tuple(cell.strip() for cell in next(csv.reader([line]))) for _, line in lines]
        for (i, _), row in zip(lines, cells, strict=True):
            if len(row) != len(cells[0]) or not all(row):
                raise RelpError(f"{path}:{i}: expected {len(cells[0])} words ({', '.join(cells[0])}), got {row}")
        rows = [Row(cells[0], row) for row in cells[1:]]
    else:
        rows = [Row(("word",), (line,)) for _, line in lines]
    return _checked(name, rows, str(path), path)


def inline_list(name: str, values: Sequence[object], where: str, path: Path | None = None) -> WordList:
    """A list from YAML values: words, or mappings of forms that all have the same keys."""
    rows = []
    for value in values:
        if isinstance(value, dict):
            rows.append(Row(tuple(map(str, value)), tuple(map(str, value.values()))))
        elif isinstance(value, str):
            rows.append(Row(("word",), (value,)))
        else:
            raise RelpError(f"{where}: expected a word or a mapping of forms, got {value!r} (quote it if it is a word)")
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
