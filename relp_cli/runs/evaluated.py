"""What a run's evaluation.csv says: of its circuit, or of a sweep, and which τ of a sweep to take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.report.tables import read_table

ENOUGH = 0.8  # faithfulness that a suggested circuit has


def read_evaluation(path: Path) -> pd.DataFrame | None:
    """An evaluation.csv; None where there is none. Raises RunFailed for one that cannot be read."""
    if not path.is_file():
        return None
    table = read_table(path)
    if "note" in table:
        table["note"] = table["note"].fillna("")
    return table


@dataclass(frozen=True)
class Suggestion:
    """A τ of a sweep, and the row of the sweep that it is of."""

    tau: float
    row: dict[str, Any]

    def __str__(self) -> str:
        r = self.row
        return (
            f"τ = {self.tau:g}: the smallest circuit of {self.row['points']} in evaluation.csv that, like all larger ones, is at "
            f"least {ENOUGH:g} faithful: {r['n_nodes']} of {r['n_possible']}, faithfulness {r['faithfulness']:.2f} on "
            f"{r['n_pairs']} held-out pairs ({r['ablation']} ablation from layer {r['exclude_layers']} up)"
        )


def suggested(table: pd.DataFrame | None) -> Suggestion | None:
    """The smallest circuit of a sweep that, like all larger ones, reaches `ENOUGH`; None where there is no sweep over τ (or over
    counts, which have a τ too), or where already the largest circuit is below.
    """
    need = {"tau", "n_nodes", "n_possible", "faithfulness", "n_pairs", "ablation", "exclude_layers"}
    if table is None or "circuit" in table or not need <= set(table):
        return None
    rows = table[table.tau.notna()].sort_values(["n_nodes", "tau"], ascending=[False, True], kind="stable")
    reached = (rows.faithfulness >= ENOUGH).cummin()
    chosen = rows[reached & (rows.n_nodes > 0)]
    if chosen.empty:
        return None
    row = {str(name): value for name, value in chosen.iloc[-1].items()}
    return Suggestion(float(row["tau"]), {**row, "points": len(table)})
