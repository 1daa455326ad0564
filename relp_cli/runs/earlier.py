"""A table that new results would replace: of other settings it is kept, under a name that says which, and that is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from relp_cli.errors import RelpError
from relp_cli.report.tables import read_table
from relp_cli.runs.evaluated import circuit_of

SETTINGS = ("kind", "ablation", "metric", "exclude_layers")  # columns that are the same in every row of a table
Say = Callable[[str], None]


def quiet(_: str) -> None:
    """Says nothing."""


def keep_earlier(path: Path, table: pd.DataFrame, say: Say, beside: tuple[Path, ...] = ()) -> None:
    """Before `table` is written to `path`: rename what is there, if it is of other settings, and say what becomes of it.

    `evaluation.csv` becomes `evaluation-sweep-mlp_neuron-mean-logit_diff-1.csv`, where that is there already in its place.
    beside: files that belong to it and are renamed with it (`tests-units.csv`). What cannot be read is replaced; an earlier
    table of the same settings too.
    """
    if not path.is_file():
        return
    try:
        before = read_table(path)
    except RelpError:
        return
    if (label := _label(before)) != _label(table):
        there = path.with_name(f"{path.stem}-{label}{path.suffix}")
        changed = there.is_file() and there.read_bytes() != path.read_bytes()
        for one in (path, *beside):
            if one.is_file():
                kept = one.with_name(f"{one.stem}-{label}{one.suffix}")
                one.replace(kept)
                note, moved = (place.parent / "made" / f"{place.name}.json" for place in (one, kept))
                if note.is_file():
                    note.replace(moved)
        say(
            f"{path.name} was of other settings, and is kept as {there.name}"
            + (", in place of what had this name" if changed else "")
        )
    elif circuit_of(before) != circuit_of(table):
        say(f"{path.name} was of another circuit, {circuit_of(before)}, and is replaced (-o FILE keeps both)")
    elif len(before) != len(table):
        say(f"{path.name} had {len(before)} rows of the same settings, and is replaced (-o FILE keeps both)")


def _label(table: pd.DataFrame) -> str:
    what = [] if "test" in table else ["sweep" if circuit_of(table) is None else "circuit"]
    said = [str(table[name].iloc[0]) for name in SETTINGS if name in table and len(table)]
    return re.sub(r"[^\w.+-]+", "_", "-".join([*what, *said]))[:150]
