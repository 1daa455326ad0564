"""A pair file as records with their places: JSON-lines, a JSON list, `{"prompts": [...]}`, CSV, or parquet.

Text is data: a line ends at a line feed and nowhere else (U+2028 may stand in JSON strings), a key stands once in an object,
and whatever does not parse is one line that names file and line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from relp_cli.errors import RelpError

FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
Record = tuple[str, dict[str, Any]]  # (`file:line: `, values)


def read_records(path: Path) -> list[Record]:
    """Raises: RelpError `file:line: what was expected` on what cannot be read, and on a file without records."""
    records = list(_parquet_records(path) if path.suffix == ".parquet" else _text_records(path))
    if not records:
        raise RelpError(f"{path}: no pairs in this file")
    return records


def _text_records(path: Path) -> Iterable[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RelpError(f"{path}: cannot be read: {error}") from None
    return _csv_records(path, text) if path.suffix == ".csv" else _json_records(path, text)


def _parquet_records(path: Path) -> Iterator[Record]:
    """Rows, whose places are their numbers from 1 up. Columns of structs are objects, as in JSON."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise RelpError(
            f"{path}: reading .parquet needs pyarrow, which is not installed: pip install 'relp-cli[parquet]'"
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise RelpError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    yield from ((f"{path}:{i}: ", row) for i, row in enumerate(rows, 1))


def _csv_records(path: Path, text: str) -> Iterable[Record]:
    reader = csv.DictReader(io.StringIO(text))
    try:
        names = [name for name in reader.fieldnames or () if name]
        for name in names:
            if names.count(name) > 1:
                raise RelpError(f"{path}:1: column '{name}' occurs twice")
        for values in reader:
            where = f"{path}:{reader.line_num}: "
            if None in values or None in values.values():
                raise RelpError(f"{where}expected {len(reader.fieldnames or ())} cells")
            # A first column without a name is pandas' row index.
            yield where, {key: value for key, value in values.items() if key}
    except csv.Error as error:
        raise RelpError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _json_records(path: Path, text: str) -> Iterable[Record]:
    lines = text.split("\n")
    if path.suffix == ".jsonl" or _is_record(next((line for line in lines if line.strip()), "")):
        for i, one in enumerate(lines, 1):
            if one.strip():
                yield _record(f"{path}:{i}: ", _decode(path, one, line=i)[0])
        return
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise RelpError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        pass  # met again, with its line, below
    line, last = 1, 0
    for place in _records_at(path, text):
        line, last = line + text.count("\n", last, place), place
        yield _record(f"{path}:{line}: ", _decode(path, text, place)[0])


def _is_record(line: str) -> bool:
    """Whether a file's first line is a record by itself."""
    try:
        head = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(head, dict) and "prompts" not in head


def _records_at(path: Path, text: str) -> Iterator[int]:
    """Where the records of a JSON list, or of an object's list `prompts`, start in the text."""
    start, found = _skip(text, 0), None
    if text[start] == "[":
        found = start
    elif text[start] == "{":
        members = dict[str, int]()
        for place in _elements(path, text, start):
            name, end = _decode(path, text, place)
            if name in members:
                raise RelpError(f"{path}:{text.count(chr(10), 0, place) + 1}: duplicate key '{name}'")
            members[name] = _skip(text, text.index(":", end) + 1)
        found = members.get("prompts")
    if found is None or text[found] != "[":
        raise RelpError(f"{path}:1: expected JSON-lines, a list of records, or an object with the key 'prompts'")
    yield from _elements(path, text, found)


def _elements(path: Path, text: str, start: int) -> Iterator[int]:
    """Where the elements of a list, or the keys of an object, start; `start` is its bracket. The text is valid JSON."""
    is_object, place = text[start] == "{", _skip(text, start + 1)
    while text[place] not in "]}":
        yield place
        _, place = _decode(path, text, place)
        if is_object:
            _, place = _decode(path, text, _skip(text, text.index(":", place) + 1))
        place = _skip(text, place)


def _skip(text: str, place: int) -> int:
    """The next place that is neither white space nor a comma."""
    while place < len(text) and text[place] in " \t\r\n,":
        place += 1
    return place


def _decode(path: Path, text: str, place: int | None = None, line: int = 1) -> tuple[Any, int]:
    """The JSON value that starts at `place`, and where it ends; without a place, all of `text` is one value. line: of the
    text's start.

    Raises: RelpError on what is no JSON, a key that stands twice, a number or a nesting beyond Python's limits.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    try:
        return (decoder.decode(text), len(text)) if place is None else decoder.raw_decode(text, place)
    except json.JSONDecodeError as error:
        wrong = f"not valid JSON: {error.msg}"
    except RecursionError:
        wrong = "nested too deeply"
    except _Twice as error:
        wrong = f"duplicate key '{error}'"
    except ValueError:  # the only other one: int() of thousands of digits
        wrong = "a number of too many digits"
    raise RelpError(f"{path}:{line + text.count(chr(10), 0, place or 0)}: {wrong}")


class _Twice(Exception):
    """A key that stands twice in one JSON object."""


def _once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(members)
    if len(values) < len(members):
        keys = [key for key, _ in members]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return values


def _record(where: str, values: Any) -> Record:
    if not isinstance(values, dict):
        raise RelpError(f"{where}expected a JSON object with the keys of a pair")
    return where, values
