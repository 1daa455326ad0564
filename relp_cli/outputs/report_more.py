"""What else a run's folder holds, as sections of its page: evaluations elsewhere, minimality, tests, robustness."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from relp_cli.report.dots import in_both, strips_figure
from relp_cli.report.page import Section, Sheet
from relp_cli.report.tables import read_table
from relp_cli.runs.evaluated import circuit_of, read_evaluation
from relp_cli.runs.made import command_of, read_made
from relp_cli.studies.robustness import FACTORS

ORDER = (
    "test",
    "rejected",
    "verdict",
    "p",
    "statistic",
    "of_statistic",
    "n",
    "of_n",
    "effect",
    "effect_lo",
    "effect_hi",
)


def more_sections(folder: Path, circuit: str | None) -> list[Section]:
    """circuit: the hash of the run's circuit; results that are of another one say so."""
    parts = []
    for path in sorted(folder.glob("evaluation-*.csv")):
        table = read_evaluation(path)
        assert table is not None
        text = _of_other(table, circuit)
        parts.append(_section(path, f"Evaluation: {path.stem.partition('-')[2]}", table, text))
    for path in sorted(folder.glob("minimality*.csv")):
        noted = (read_made(path) or {}).get("circuit", "")
        text = [*_other(noted, circuit), "Every unit of the circuit dropped alone; loss: of faithfulness."]
        parts.append(_section(path, "Minimality" + _of(path, "minimality"), read_table(path, may_be_empty=True), text))
    for path in sorted(folder.glob("tests*.csv")):
        if not path.stem.startswith("tests-units"):
            parts.append(_tests(path, circuit))
    if (folder / "robustness.csv").is_file():
        parts.append(_robustness(folder))
    return parts


def _tests(path: Path, circuit: str | None) -> Section:
    table, units = read_table(path), path.with_name(path.name.replace("tests", "tests-units", 1))
    first = [c for c in ORDER if c in table.columns]
    table = table[[*first, *(c for c in table.columns if c not in first)]]
    said = [f"{row['test']}: {row['verdict']}. H0: {row['null']}." for row in table.to_dict("records")]
    sheets = [Sheet(path.stem, table.drop(columns=["verdict", "null"], errors="ignore"), "Tests", fold=True)]
    if units.is_file() and len(of_units := read_table(units, may_be_empty=True)):
        sheets.append(Sheet(units.stem, of_units, "Units", fold=True))
    return Section(
        path.stem, "Hypothesis tests" + _of(path, "tests"), (*_of_other(table, circuit), *said), sheets=tuple(sheets),
        commands=(command_of(path),),
    )  # fmt: skip


def _robustness(folder: Path) -> Section:
    path = folder / "robustness.csv"
    settings = read_table(path)
    factors = [f for f in FACTORS if f in settings and settings[f].nunique() > 1]
    f = settings.faithfulness
    text = f"Faithfulness {f.mean():.3f} on average over {len(f)} settings, from {f.min():.3f} to {f.max():.3f}."
    caption = "Faithfulness of every setting by what was chosen; lines: means."
    pictures = [in_both("robustness", caption, lambda theme: strips_figure(settings, factors, "faithfulness", theme))]
    titles = {"robustness-variance": "Share of the variance by factor", "robustness-transfer": "Faithfulness of a row's circuit "
              "on a column's task"}  # fmt: skip
    more = [(folder / f"{name}.csv", title) for name, title in titles.items()]
    sheets = [Sheet(p.stem, read_table(p), title) for p, title in more if p.is_file()]
    return Section(
        "robustness", "Robustness", (text,), pictures=tuple(pictures) if factors else (),
        sheets=(*sheets, Sheet("robustness", settings, "Settings", by="faithfulness", fold=True)), commands=(command_of(path),),
    )  # fmt: skip


def _section(path: Path, title: str, table: pd.DataFrame, text: list[str]) -> Section:
    return Section(
        path.stem, title, tuple(text), sheets=(Sheet(path.stem, table, fold=True),), commands=(command_of(path),)
    )


def _of_other(table: pd.DataFrame, circuit: str | None) -> list[str]:
    theirs = circuit_of(table)
    return [] if theirs is None else _other(theirs, circuit)


def _other(theirs: str, circuit: str | None) -> list[str]:
    """theirs: "" where it is not known."""
    return (
        [] if theirs == circuit else [f"Of {'an unknown' if not theirs else 'another'} circuit, not of the one above."]
    )


def _of(path: Path, name: str) -> str:
    """Of another task, or of other settings (`keep_earlier`): its name."""
    other = path.stem.removeprefix(name).strip("-")
    return f": {other}" if other else ""
