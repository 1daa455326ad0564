"""`relp export RUN FILE.csv`: a run's scores and circuit as one table, a row a unit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from relp_cli.files import check_file_writable
from relp_cli.report.tables import write_table
from relp_cli.runs.evaluating import own_circuit
from relp_cli.runs.scoring import open_run
from relp_cli.spaces.top import in_circuit, unit_table


@dataclass(frozen=True)
class Exported:
    """rows: in the file. zeros: units at positions that are 0 in every pair and have no row. kept: rows in the circuit (None: the
    run has none).
    """

    rows: int
    zeros: int
    kept: int | None


def export_table(run: Path, file: Path) -> Exported:
    """Write kind, layer (of features: the site; of edges: the reader's), position, unit, score, se (over pairs), n and in_circuit
    (empty where the run has no circuit), in full precision.

    Raises: RelpError for a file that cannot be written and a circuit that is not of these scores.
    """
    check_file_writable(file)
    run_dir, _, scores = open_run(run)
    table = unit_table(scores)
    if not any(isinstance(unit, str) for unit in table.unit):
        table = table.astype({"unit": "Int64"})
    kept = None
    if run_dir.circuit.is_file():
        mask = in_circuit(scores, own_circuit(run_dir, scores))
        table["in_circuit"], kept = mask.numpy(), int(mask.sum())
    else:
        table["in_circuit"] = pd.array([pd.NA] * len(table), dtype="boolean")
    write_table(table, file)
    return Exported(len(table), scores.n_nodes - len(table), kept)
