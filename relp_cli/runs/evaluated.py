"""What a run's evaluation.csv says: of its circuit, or of a sweep, and which τ of a sweep to take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.evaluation.areas import ENOUGH, enough
from relp_cli.report.names import counted
from relp_cli.report.tables import read_table
from relp_cli.tasks.counted import pairs_text


def read_evaluation(path: Path) -> pd.DataFrame | None:
    """An evaluation.csv; None where there is none. Raises RunFailed for one that cannot be read."""
    if not path.is_file():
        return None
    table = read_table(path)
    if "note" in table:
        table["note"] = table["note"].fillna("")
    return table


def read_sweep(folder: Path, kinds: str | None = None) -> tuple[Path, pd.DataFrame] | None:
    """The newest sweep of a run's scores and its file: evaluation.csv, or one that was kept when others took its place
    (`keep_earlier`). kinds: of these alone, as tables call them. None where there is none.
    """
    kept = sorted(folder.glob("evaluation-sweep-*.csv"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in (folder / "evaluation.csv", *kept):
        table = read_evaluation(path)
        if table is None or circuit_of(table) is not None or (kinds and swept_kinds(table) not in (None, kinds)):
            continue
        return path, table
    return None


def circuit_of(table: pd.DataFrame | None) -> str | None:
    """The hash of the one circuit that a table is of; None of a sweep, and where there is no table."""
    return None if table is None or "circuit" not in table or table.empty else str(table["circuit"].iloc[0])


@dataclass(frozen=True)
class Suggestion:
    """A τ of a sweep, and the row of the sweep that it is of."""

    tau: float
    row: dict[str, Any]
    file: str = "evaluation.csv"

    @property
    def from_layer(self) -> int:
        """Lower layers were neither ablated nor counted."""
        return int(self.row["exclude_layers"])

    def __str__(self) -> str:
        r = self.row
        where = f" from layer {self.from_layer} up" if self.from_layer else ""
        pairs = pairs_text(r["n_pairs"], r.get("n_prompts"), "held-out pairs")
        return (
            f"τ = {self.tau:g}: the smallest circuit of the {r['points']} in {self.file} that, like all larger ones, has a "
            f"faithfulness of at least {ENOUGH:g} ({r['faithfulness']:.2f} on {pairs}, {r['ablation']} "
            f"ablation): {r['n_nodes']} of the {r['n_possible']} {counted([str(r.get('kind'))])}{where}"
        )


def suggested(table: pd.DataFrame | None, file: str = "evaluation.csv") -> Suggestion | None:
    """The smallest circuit of a sweep that, like all larger ones, reaches `ENOUGH`, of those that a τ keeps; None where there is
    no sweep, or where already the largest circuit is below.
    """
    need = {"tau", "n_nodes", "n_possible", "faithfulness", "n_pairs", "ablation", "exclude_layers"}
    if table is None or "circuit" in table or not need <= set(table):
        return None
    rows = enough(table)
    chosen = rows[(rows.n_nodes > 0) & rows.tau.notna()]
    if chosen.empty:
        return None
    row = {str(name): value for name, value in chosen.iloc[-1].items()}
    return Suggestion(float(row["tau"]), {**row, "points": len(table)}, file)


def swept_kinds(table: pd.DataFrame | None) -> str | None:
    """The kinds that an evaluation is of, as tables call them; None where there is none, or an old one that does not say."""
    return None if table is None or "kind" not in table or table.empty else str(table["kind"].iloc[0])
