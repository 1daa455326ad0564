"""A job's tables and figures, made from its collected rows. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.features.kinds import FEATURE_KINDS
from relp_cli.jobs.grid import COSTS, JobSpec
from relp_cli.report.bars import agreement_bars
from relp_cli.report.canvas import save_figure
from relp_cli.report.curve_plot import curves_figure
from relp_cli.report.published import beside
from relp_cli.report.tables import table5, write_table
from relp_cli.runs.checked import file_label
from relp_cli.runs.made import note_made

# What a table of all cells has even where it is undefined in every one of them.
MEASURES = (
    "pcc",
    "pcc_lo",
    "pcc_hi",
    "pcc_per_pair",
    "spearman",
    "topk",
    "slope",
    "note",
    "faithfulness",
    "completeness",
)
KEYS = ("task", "model", "kind", "method", "direction", "seed")
TIMES = ["seconds"]
Tables = list[tuple[str, pd.DataFrame]]


def summarise(
    job: JobSpec, rows: pd.DataFrame, folder: Path, errors: Sequence[tuple[str, str]] = ()
) -> tuple[list[Path], Tables]:
    """Write results.csv (tidy, all cells), parquet where pyarrow is installed, summary tables and figures.

    errors: (cell, what it failed with), for a report. Returns the files, and (title, table) pairs to print; the title
    "agreement" marks rows in `relp compare`'s form.
    """
    if rows.empty:
        return [], []
    files = [folder / "results.csv"]
    values = rows.drop(columns=TIMES, errors="ignore")  # the same bytes, however many processes computed them
    write_table(values, files[0])
    note_made(files[0], job=job.model_dump(mode="json"), errors=dict(errors))
    if _has_pyarrow():
        files.append(folder / "results.parquet")
        write_table(values, files[-1])
    if timed := [name for name in TIMES if name in rows.columns]:
        files.append(folder / "timings.csv")
        write_table(rows[rows[timed[0]].notna()][[*KEYS, *timed]].drop_duplicates(), files[-1])
    tables: Tables = []
    for part, make in (("agreement", _agreement), ("evaluation", _evaluation)):
        chosen = rows[rows.what == part]
        chosen = chosen[[c for c in chosen if c in MEASURES or chosen[c].notna().any()]]
        if len(chosen):
            made, shown = make(job, chosen, folder)
            files += made
            tables += shown
    return files, tables


def _has_pyarrow() -> bool:
    import importlib.util

    return importlib.util.find_spec("pyarrow") is not None


def _agreement(job: JobSpec, rows: pd.DataFrame, folder: Path) -> tuple[list[Path], Tables]:
    files = [folder / f"agreement.{end}" for end in ("csv", "md", "tex")]
    for path in files:
        write_table(table5(rows), path)
    figure = folder / "agreement.png"
    agreement_bars(rows, figure)
    tables: Tables = [("agreement", rows)]
    if job.published == "table5":
        tables.append(("PCC with exact patching, ours beside the paper's Table 5", beside(rows)))
    return [*files, figure], tables


def _evaluation(job: JobSpec, rows: pd.DataFrame, folder: Path) -> tuple[list[Path], Tables]:
    files = []
    defined = rows.groupby(["model", "kind"]).filter(
        lambda part: part[["faithfulness", "completeness"]].notna().any(axis=None)
    )
    drawn = defined.drop(columns=TIMES, errors="ignore")  # figures are the same bytes, too
    for (model, kind), chosen in drawn.groupby(["model", "kind"], sort=False):
        stem = f"curves-{file_label(str(model))}-{kind}"
        files += _curves(chosen, folder / stem)
    for model, chosen in drawn.groupby("model", sort=False):
        if any(kind in FEATURE_KINDS for kind in chosen.kind):  # Figure 3: features and neurons below each other
            files += _curves(chosen, folder / f"figure3-{file_label(str(model))}")
    areas = areas_of(rows)
    for end in ("csv", "md", "tex"):
        files.append(folder / f"summary.{end}")
        write_table(areas.drop(columns=TIMES, errors="ignore"), files[-1])
    tables: Tables = [(f"{job.name}: areas under the curves against the fraction of nodes kept", areas)]
    if job.published == "figure3":
        tables.append(("neuron circuits, ours beside the paper's Figure 3", beside(rows)))
    return files, tables


def _curves(rows: pd.DataFrame, stem: Path) -> list[Path]:
    """One figure, as stem.png and stem.pdf."""
    figure, files = curves_figure(rows), [Path(f"{stem}.{end}") for end in ("png", "pdf")]
    for path in files:
        save_figure(figure, path)
    return files


def areas_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Per cell: CPR and CMD over the fraction of nodes kept, and the number of nodes at which faithfulness reaches 1/2."""
    from relp_cli.evaluation.areas import areas

    keys = list(KEYS)
    out: list[dict[str, Any]] = []
    for key, chosen in rows.groupby(keys, sort=False):
        fraction = (chosen.n_nodes / chosen.n_possible).tolist()
        cpr, cmd = areas(fraction, chosen.faithfulness.tolist())
        reached = chosen[chosen.faithfulness >= 0.5].n_nodes
        out.append(
            dict(zip(keys, key, strict=True))
            | {"CPR": cpr, "CMD": cmd, "nodes for F ≥ .5": int(reached.min()) if len(reached) else float("nan")}
            | {name: float(chosen[name].iloc[0]) for name in COSTS if name in chosen.columns}
            | {"n_possible": int(chosen.n_possible.iloc[0]), "n_pairs": int(chosen.n_pairs.iloc[0])}
        )
    table = pd.DataFrame(out)
    if table.CPR.isna().any():
        table.attrs["notes"] = ["—: the sweep does not reach the full model (most features are active in no prompt)"]
    return table
