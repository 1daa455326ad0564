"""A job's results from its cell files: no model and no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from relp_cli.runs.job import Cell, read_cell


@dataclass(frozen=True)
class Collected:
    """All rows of a job's cells, and (cell, error) of those that failed."""

    rows: pd.DataFrame
    errors: tuple[tuple[str, str], ...]


def collect(paths: dict[Cell, Path]) -> Collected:
    """The cell files of one job, in the order of its grid."""
    lost = {"error": "its result is not in the job's folder here: all workers must share that file system"}
    contents = {cell: read_cell(path) or lost for cell, path in paths.items()}
    rows = [row for content in contents.values() for row in content.get("rows", [])]
    errors = tuple((cell.label, content["error"]) for cell, content in contents.items() if "error" in content)
    return Collected(pd.DataFrame(rows), errors)
