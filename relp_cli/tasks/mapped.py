"""Records of a file that others published → pairs, by the `columns` of a task YAML."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from relp_cli.errors import RelpError, nearest
from relp_cli.tasks.columns import Columns, FormSet, WordSet
from relp_cli.tasks.files import Form, pair_of, shown
from relp_cli.tasks.prompt import Listed, RawPair
from relp_cli.tasks.records import Record
from relp_cli.tasks.words import WordList

_INDEXED = re.compile(r"(.+?)\[(.+)\]")
_FLAGS = {"1": "true", "yes": "true", "0": "false", "no": "false"}
_WORD = re.compile(r"\s*(?:\w+(?:['’-]\w+)*|[^\w\s])")


def value_at(values: Mapping[str, Any], path: str, where: str) -> Any:
    """What a record has at a path: a column's name, or `a.b`, `a.0`, `a.b[other path]`. None where it holds null.

    Raises: RelpError naming the part that is not there, with the nearest name.
    """
    if path in values:
        return values[path]
    if whole := _INDEXED.fullmatch(path):
        held, key = value_at(values, whole[1], where), value_at(values, whole[2], where)
        return _entry(held, str(key), f"{where}column '{path}': ")
    value: Any = values
    for part in path.split("."):
        value = _entry(value, part, f"{where}column '{path}': ")
    return value


def _entry(value: Any, key: str, where: str) -> Any:
    if isinstance(value, Mapping):
        if key not in value:
            raise RelpError(f"{where}no '{key}'{nearest(key, map(str, value))}")
        return value[key]
    if isinstance(value, list):
        if not key.isdecimal() or int(key) >= len(value):
            raise RelpError(f"{where}expected a number below {len(value)}, got '{key}'")
        return value[int(key)]
    raise RelpError(f"{where}'{key}' of {shown(value)}, which has no parts")


def mapped_pairs(
    records: Sequence[Record],
    columns: Columns,
    lists: Mapping[str, WordList],
    only: Mapping[str, Any] | None = None,
    cut: str = "",
) -> tuple[list[RawPair], str]:
    """The pairs of a file's records, in order, and a note on those that `only` leaves out.

    lists: the word lists that `columns` names. only: column → the value that a record must have there. cut: removed from the
    start of prompts (a BOS token that was written into the text).

    Raises: RelpError `file:line: column: what was expected`.
    """
    chosen = [
        (where, values)
        for where, values in records
        if all(_flag(value_at(values, column, where)) == _flag(value) for column, value in (only or {}).items())
    ]
    if not chosen:
        asked = ", ".join(f"{column} = {value}" for column, value in (only or {}).items())
        raise RelpError(f"{records[0][0].rstrip(': ')}: only: none of {len(records)} records has {asked}")
    note = f"{len(chosen)} of {len(records)} records are those that `only` asks for" if only else ""
    return [_pair(where, values, columns, lists, cut) for where, values in chosen], note


def _pair(where: str, values: dict[str, Any], columns: Columns, lists: Mapping[str, WordList], cut: str) -> RawPair:
    record: dict[str, Any] = {}
    for key in ("original", "patch"):
        if (path := getattr(columns, key)) is not None:
            record[key] = _prompt(value_at(values, path, where), cut)
    for key in ("original_ids", "patch_ids", "answer_id", "foil_id", "roles", "split", "join"):
        if (path := getattr(columns, key)) is not None:
            record[key] = value_at(values, path, where)
    for key in ("answer", "foil"):
        if isinstance(path := getattr(columns, key), str):
            record[key] = _outcome(value_at(values, path, where))
    for key, words in columns.sets.items():
        record[key] = _members(words, value_at(values, words.by if isinstance(words, FormSet) else words.slot, where),
                               lists[words.list], f"{where}{key}: ")  # fmt: skip
    if columns.good is not None and columns.bad is not None:
        record |= _minimal(value_at(values, columns.good, where), value_at(values, columns.bad, where), where)
        if columns.split is not None:
            record["split"] = value_at(values, columns.split, where)
    tokens = columns.original_ids is not None
    form = Form(
        "mapped", "original_ids" if tokens else "original", "patch_ids" if tokens else "patch",
        "answer_id" if columns.ids else "answer", "foil_id" if columns.ids else "foil", ids=columns.ids, tokens=tokens,
    )  # fmt: skip
    return replace(pair_of(form, record, where), listed=_listed(columns))


def _listed(columns: Columns) -> Listed:
    """Which sides of the pairs are words of lists, and whether these stand row against row."""
    sets = columns.sets
    if isinstance(columns.answer, FormSet) and sets.get("foil") == columns.answer.other():
        return "rows"
    return "both" if len(sets) == 2 else "answer" if "answer" in sets else "foil" if sets else ""


def _prompt(value: Any, cut: str) -> Any:
    """A prompt's text; a list of texts is joined as it is."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "".join(value)
    return value.removeprefix(cut) if isinstance(value, str) else value


def _outcome(value: Any) -> Any:
    """An answer as text or texts: cells of a CSV hold lists as they are written in Python, numbers are words."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return value
    if isinstance(value, list):
        return [str(part) if _is_number(part) else part for part in value]
    return str(value) if _is_number(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(value: Any) -> str:
    """A value as keys and cells write it: True, "TRUE" and 1 are `true`."""
    text = str(value).strip().lower()
    text = text.removesuffix(".0") if text in ("1.0", "0.0") else text
    return _FLAGS.get(text, text)


def _members(words: WordSet | FormSet, value: Any, rows: WordList, where: str) -> list[str]:
    """The words of a list that belong to a record's value."""
    if isinstance(words, FormSet):
        forms = {_flag(key): form for key, form in words.forms.items()}
        if _flag(value) not in forms:
            raise RelpError(f"{where}column '{words.by}': expected {' or '.join(words.forms)}, got {shown(value)}")
        return [row.form(forms[_flag(value)]) for row in rows.rows]
    order = [row.key for row in rows.rows]
    text = str(value).strip().removesuffix(".0")
    if text not in order:  # the year 4 is written 04 in the list
        text = text.zfill(max(map(len, order)))
    if text not in order:
        raise RelpError(f"{where}column '{words.slot}': {shown(value)} is not in the ordered list '{words.list}'")
    place = order.index(text) + 1
    chosen = order[place:] if words.after else order[:place]
    if not chosen:
        raise RelpError(f"{where}column '{words.slot}': nothing comes after {shown(value)} in list '{words.list}'")
    return chosen


def _minimal(good: Any, bad: Any, where: str) -> dict[str, Any]:
    """Prompt, answer and foil of two sentences: what they share, and the first word in which they differ."""
    for sentence in (good, bad):
        if not isinstance(sentence, str):
            raise RelpError(f"{where}expected a sentence, got {shown(sentence)}")
    one, two = _WORD.findall(good), _WORD.findall(bad)
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    if not same:
        raise RelpError(
            f"{where}{'the sentences differ in no word' if same is None else 'they differ in the first word'}"
        )
    return {"original": "".join(one[:same]), "answer": one[same], "foil": two[same]}
