"""The units with the largest scores, as a table."""

from __future__ import annotations

from typing import Any

import pandas as pd

from relp_cli.spaces.table import space_of

COLUMNS = ["kind", "layer", "position", "unit", "score", "se", "n"]


def top_units(scores: Any, k: int = 10) -> pd.DataFrame:
    """The k units with the largest |mean score|: kind, layer (of features: the site), position, unit (missing for vector
    nodes and error terms), score, se (standard error over the pairs that have the position), n. Edges are named where nodes
    have a position, and stand under their reader's layer (logits: the number of layers).
    """
    scores = scores.whole  # of a view too
    units, space = scores.units, space_of(scores.units)
    sizes = scores.mean.double().abs().nan_to_num(0)
    cells = scores.cells
    # of those that tie, the first in the order of cells
    by_place = units.rank(scores.positions, cells % len(units), len(scores.labels)).argsort()
    rows = []
    for column in by_place[sizes[by_place].argsort(descending=True, stable=True)[:k]].tolist():
        at, which = divmod(int(cells[column]), len(units))
        row, n = space.row(units, which, scores.labels[at]), int(scores.n[at])
        if isinstance(row["unit"], str):
            named = row["unit"] if row["position"] == "*" else f"{row['unit']} @ {row['position']}"
            row |= {"position": named, "unit": None}
        error = float((scores.variance[column].double() / n).sqrt()) if n > 1 else float("nan")
        rows.append({**row, "score": float(scores.mean[column]), "se": error, "n": n})
    return pd.DataFrame(rows, columns=COLUMNS).astype({"unit": "Int64"})
