"""What the page's own script shows of a run: the strongest units, and how many a threshold keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from relp_cli.report.digest import of_all_kinds
from relp_cli.report.maps import short
from relp_cli.report.page import plain
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.top import top_units
from relp_cli.spaces.units import Units

MOST = 10_000  # rows of the table
STEPS = 160  # thresholds of the slider


def explorer(
    scores: Scores, evaluation: pd.DataFrame | None, tokens: Sequence[str] | None, most: int = MOST
) -> dict[str, Any]:
    """Plain data for JSON; numbers have six significant digits.

    rows:  the `most` strongest units: kind, layer, position, unit, score, standard error, n. of: how many units there are.
    steps: (τ, how many units have |score| > τ), from the largest τ down. curve: τ, nodes, faithfulness with its interval, and
    completeness of every evaluated circuit, where those are of all kinds, as the threshold is.
    """
    table = top_units(scores, most)
    strengths = np.sort(np.abs(scores.mean.double().numpy()))
    return {
        "labels": list(scores.labels),
        "tokens": list(tokens or []),
        "columns": [str(name) for name in table.columns],
        "rows": [[plain(value) for value in row] for row in table.itertuples(index=False, name=None)],
        "of": scores.n_nodes,
        "steps": _steps(strengths),
        "curve": _curve(evaluation, scores.units),
    }


def _steps(strengths: np.ndarray) -> list[list[float | int]]:
    """Thresholds at which 0, 1, 2, … units are kept, in steps that grow like the logarithm of their number."""
    strengths = strengths[strengths > 0]
    if not len(strengths):
        return [[0.0, 0]]
    counts = np.unique(np.geomspace(1, len(strengths), STEPS).astype(int))
    steps: list[list[float | int]] = [[short(float(strengths[-1]) * (1 + 1e-5)), 0]]  # not rounded below the strongest
    for count in counts.tolist():
        below = strengths[-count - 1] if count < len(strengths) else 0.0
        tau = short(float((strengths[-count] + below) / 2))
        steps.append([tau, int((strengths > tau).sum())])
    return steps


def _curve(table: pd.DataFrame | None, units: Units) -> list[dict[str, Any]]:
    names = ("tau", "n_nodes", "n_possible", "faithfulness", "faithfulness_lo", "faithfulness_hi", "completeness")
    if table is None or not {*names} <= {*table.columns} or not of_all_kinds(table, units):
        return []
    rows = [{name: plain(row[name]) for name in names} for row in table.to_dict("records")]
    return [row for row in rows if row["tau"] is not None]
