"""MIB's data sets of its circuit track (Mueller et al. 2025) as local files: parquet, JSON lines or JSON.

A row has a `prompt`, its answer, and one record per counterfactual with a `prompt` and an answer of its own. Of these, MIB
reads one per data set (`MibForm.column`); answers are read as MIB does: an IOI name after a space, all others as written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relp_cli.errors import RelpError
from relp_cli.registry import Registry
from relp_cli.tasks.prompt import PromptPair, RawPair
from relp_cli.tasks.records import FILE_ENDINGS, Record, read_records

ENDINGS = tuple(ending for ending in FILE_ENDINGS if ending != ".csv")
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
_SPLIT = re.compile(rf"(?:^|[-_.])({'|'.join(SPLITS)})(?:$|[-_.])")
_INNER = re.compile(r"data|\d+_answer_choices")  # folders inside a data set, whose names are not its own
MCQA_CONFIG = "4_answer_choices"  # of the configurations that stand side by side, the one that MIB uses
Row = dict[str, Any]


@dataclass(frozen=True)
class MibForm:
    """column: the counterfactual's record. outcomes: (row, counterfactual, place) → answer and foil. join: before both.

    single: answers of several tokens are not used; otherwise they are read by their first token, where answer and foil
    have equally many.
    """

    name: str
    column: str
    outcomes: Callable[[Row, Row, str], tuple[str, str]]
    join: str
    single: bool = False


def _names(row: Row, counterfactual: Row, where: str) -> tuple[str, str]:
    if "metadata" not in row:
        return _name(row, where), _name(counterfactual, f"{where}{IOI}: ")
    return _text(row, where, "metadata", "indirect_object"), _text(row, where, "metadata", "subject")


def _name(row: Row, where: str) -> str:
    return _chosen(row, where, _at(row, where, "choices"))


def _symbols(row: Row, counterfactual: Row, where: str) -> tuple[str, str]:
    inner = f"{where}{SYMBOL}: "
    return (
        _chosen(row, where, _at(row, where, "choices", "label")),
        _chosen(counterfactual, inner, _at(counterfactual, inner, "choices", "label")),
    )


def _numbers(row: Row, counterfactual: Row, where: str) -> tuple[str, str]:
    return str(_at(row, where, "label")), str(_at(counterfactual, f"{where}{RANDOM}: ", "label"))


IOI, SYMBOL, RANDOM = "s2_io_flip_counterfactual", "symbol_counterfactual", "random_counterfactual"
MIB_FORMS: Registry[MibForm] = Registry("MIB data set")
for _row in (
    MibForm("IOI", IOI, _names, " "),
    MibForm("multiple choice (MCQA, ARC)", SYMBOL, _symbols, ""),
    MibForm("arithmetic", RANDOM, _numbers, "", single=True),
):
    MIB_FORMS.add(_row.name, _row)


@dataclass(frozen=True)
class MibData:
    """One data set. pairs: those whose rows have the counterfactual. without: how many rows of how many have none.

    files: in order. splits: MIB's names of the splits that file names tell, in MIB's order (none where they tell none).
    """

    name: str
    form: MibForm
    files: tuple[Path, ...]
    pairs: tuple[RawPair, ...]
    without: tuple[int, int]
    splits: tuple[str, ...]


def is_mib(values: Row) -> bool:
    """Whether a record is a row of one of MIB's data sets."""
    return "prompt" in values and any(form.column in values for _, form in MIB_FORMS.items())


def mib_folders(root: Path) -> list[Path]:
    """The data sets in a folder: itself (or its file), or the folders in it that hold files of rows.

    Raises: RelpError where there is none.
    """
    if root.is_file() or _files(root):
        return [root]
    if not root.is_dir():
        raise RelpError(f"{root}: no such folder")
    found = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and _files(folder)]
    if not found:
        raise RelpError(
            f"{root}: no MIB data set here; expected files that end in {', '.join(ENDINGS)}, or folders that hold them "
            "(data/train-00000-of-00001.parquet)"
        )
    return found


def read_mib(place: Path) -> MibData:
    """The data set of a folder or file; each pair's `split` is MIB's name of it, or None where file names tell none.

    Raises: RelpError `file:line: what was expected` for what is no row of a data set that MIB's circuit track has.
    """
    files = [place] if place.is_file() else _files(place)
    if not files:
        raise RelpError(f"{place}: no file that ends in {', '.join(ENDINGS)}")
    names = {file: _split_of(file, place) for file in files}
    if len(set(names.values())) == 1:  # one split alone is cut in two like any file of pairs
        names = dict.fromkeys(files)
    unnamed = [file for file, split in names.items() if split is None]
    if unnamed and len(unnamed) < len(files):
        raise RelpError(f"{unnamed[0]}: its name tells no split (train, validation, test), others' names do")
    pairs, total, forms = list[RawPair](), 0, dict[str, MibForm]()
    for file, split in names.items():
        records = read_records(file)
        total += len(records)
        for where, values in records:
            form = _form(values, where)
            forms[form.name] = form
            pairs += _pair(form, (where, values), split)
    if len(forms) > 1:
        raise RelpError(f"{place}: rows of several data sets in one: {', '.join(forms)}")
    if not pairs:
        raise RelpError(f"{place}: none of its {total} rows has a {next(iter(forms.values())).column}")
    splits = tuple(split for split in dict.fromkeys(SPLITS.values()) if split in names.values())
    without = (total - len(pairs), total)
    return MibData(_name_of(place), next(iter(forms.values())), tuple(files), tuple(pairs), without, splits)


def _files(folder: Path) -> list[Path]:
    """Files of rows in a folder, or else in `data/` or the configuration that MIB uses."""
    own = [path for path in sorted(folder.glob("*")) if path.suffix in ENDINGS and _holds_rows(path)]
    if own or not folder.is_dir():
        return own
    inner = (folder / name for name in (MCQA_CONFIG, "data") if (folder / name).is_dir())
    return next((files for place in inner if (files := _files(place))), [])


def _holds_rows(path: Path) -> bool:
    """Not a description of the data set that stands beside it (dataset_infos.json)."""
    return path.is_file() and path.stem not in ("dataset_info", "dataset_infos", "state")


def _split_of(file: Path, place: Path) -> str | None:
    parts = file.relative_to(place).parts if place.is_dir() else (file.name,)
    found = [match[1] for part in reversed(parts) if (match := _SPLIT.search(part))]
    return SPLITS[found[0]] if found else None


def _name_of(place: Path) -> str:
    if place.is_file():
        return place.stem
    folder = place.resolve()
    hub = next((at.parent for at in folder.parents if at.name == "snapshots"), None)  # in the hub's cache
    if hub is not None:
        return hub.name.rpartition("--")[2]
    return next((part.name for part in (folder, *folder.parents) if not _INNER.fullmatch(part.name)), folder.name)


def _form(values: Row, where: str) -> MibForm:
    form = next((form for _, form in MIB_FORMS.items() if form.column in values), None)
    if form is None or "prompt" not in values:
        columns = ", ".join(form.column for _, form in MIB_FORMS.items())
        raise RelpError(f"{where}not a row of MIB's circuit track: expected `prompt` and one of {columns}")
    return form


def _pair(form: MibForm, record: Record, split: str | None) -> list[RawPair]:
    """The row's pair; none where it has no such counterfactual."""
    where, row = record
    counterfactual = row[form.column]
    if counterfactual is None or (isinstance(counterfactual, dict) and counterfactual.get("prompt") is None):
        return []
    if not isinstance(counterfactual, dict):
        raise RelpError(f"{where}{form.column}: expected a record with a prompt, got {_shown(counterfactual)}")
    answer, foil = form.outcomes(row, counterfactual, where)
    pair = PromptPair(
        _text(row, where, "prompt"), _text(counterfactual, f"{where}{form.column}: ", "prompt"), (answer,), (foil,)
    )
    return [RawPair(pair, join=form.join, first=not form.single, split=split, where=where)]


def _at(row: Row, where: str, *keys: str) -> Any:
    value: Any = row
    for i, key in enumerate(keys):
        if not isinstance(value, dict) or value.get(key) is None:
            raise RelpError(f"{where}missing key '{'.'.join(keys[: i + 1])}'")
        value = value[key]
    return value


def _text(row: Row, where: str, *keys: str) -> str:
    value = _at(row, where, *keys)
    if not isinstance(value, str) or not value.strip():
        raise RelpError(f"{where}{'.'.join(keys)}: expected text, got {_shown(value)}")
    return value


def _chosen(row: Row, where: str, choices: Any) -> str:
    """`choices[answerKey]`."""
    key = _at(row, where, "answerKey")
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise RelpError(f"{where}choices: expected a list of texts, got {_shown(choices)}")
    if type(key) is not int or not 0 <= key < len(choices):
        raise RelpError(
            f"{where}answerKey: expected the index of a choice (0 to {len(choices) - 1}), got {_shown(key)}"
        )
    return str(choices[key])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shared_prompts(one: Sequence[RawPair], other: Sequence[RawPair]) -> int:
    """How many of `other`'s pairs have a prompt that one of `one`'s has."""
    prompts = {text for raw in one for text in (raw.pair.original, raw.pair.patch)}
    return sum(bool({raw.pair.original, raw.pair.patch} & prompts) for raw in other)
