"""Curves as plain numbers for the page's script: what `curve_plot` draws, a panel per model and node kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from relp_cli.report.canvas import method_colors
from relp_cli.report.curve_plot import MEASURES, protocol, structures
from relp_cli.report.curves import curve, mean_curve
from relp_cli.report.maps import short
from relp_cli.report.names import counted, kind_title, model_title, varying

DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")  # told apart without colours too
LOWEST, HIGHEST = -0.5, 1.5  # of an axis; what is beyond stands at its edge and is counted


def curve_panels(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Of `evaluate`'s rows, a panel per model and kind that has circuits of several sizes.

    measures: faithfulness and completeness. lines: one per method, with [size, value, low, high] where it is of one structure; of
    several tasks or seeds, their mean where all have data, and each of them as a thin line; random circuits.
    """
    if len(varying(table, ("direction",))):
        table = table.assign(method=table["method"].astype(str) + " (" + table["direction"].astype(str) + ")")
    keys = [name for name in ("model", "kind") if name in table]
    panels = []
    for key, rows in table.groupby(keys, sort=False):
        if rows.n_nodes.nunique() < 2 or not rows[list(MEASURES)].notna().any(axis=None):
            continue
        names = dict(zip(keys, key, strict=True))
        title = [kind_title(str(names["kind"]))] if "kind" in names else []
        title += [model_title(str(names["model"]))] if "model" in names else []
        n = rows.task.nunique() if "task" in rows else 1
        notes = [
            protocol(rows),
            f"bold: the mean of {n} tasks, thin: each of them" if n > 1 else "bands: 95 % bootstrap over pairs",
        ]
        panels.append({
            "title": ", ".join(title), "noun": counted(rows.get("kind", ())), "note": "; ".join(note for note in notes if note),
            "measures": [_measure(rows, measure) for measure in MEASURES],
        })  # fmt: skip
    return panels


def _measure(rows: pd.DataFrame, y: str) -> dict[str, Any]:
    colors = method_colors(rows.method.astype(str))
    lines: list[dict[str, Any]] = []
    for i, (method, chosen) in enumerate(rows.groupby("method", sort=False)):
        parts = structures(chosen, "task")
        look = {"color": colors[str(method)], "dash": DASHES[i % len(DASHES)]}
        if len(parts) > 1:
            lines += [{**look, "name": f"{method}", "weight": 0.9, "points": _points(part, y)} for part in parts]
            x, mean = mean_curve([curve(part, "n_nodes", y) for part in parts])
            points = [[short(float(a)), short(float(b)), None, None] for a, b in zip(x, mean, strict=True)]
        else:
            points = _points(chosen, y)
        lines.append({**look, "name": str(method), "weight": 2.2, "points": points})
    if f"random_{y}" in rows:
        x, mean = mean_curve([curve(part, "n_nodes", f"random_{y}") for part in structures(rows, "task")])
        points = [[short(float(a)), short(float(b)), None, None] for a, b in zip(x, mean, strict=True)]
        lines.append(
            {"name": "random circuits", "color": "var(--soft)", "dash": "3 3", "weight": 1.4, "points": points}
        )
    values = np.array([p[1] for line in lines for p in line["points"] if p[1] is not None] or [0.0], dtype=float)
    low, high = (float(np.clip(v, LOWEST, HIGHEST)) for v in (values.min(), values.max()))
    ends = min(low - 0.03, -0.03), max(high + 0.03, 1.03)
    beyond = int(((values < ends[0]) | (values > ends[1])).sum())
    return {"name": y, "low": ends[0], "high": ends[1], "beyond": beyond, "lines": lines}


def _points(rows: pd.DataFrame, y: str) -> list[list[Any]]:
    """[size, value, low, high] by size; None where something is missing."""
    columns: Sequence[str] = ("n_nodes", y, f"{y}_lo", f"{y}_hi")
    table = rows.reindex(columns=list(columns)).astype(float).sort_values("n_nodes", kind="stable")
    return [[short(value) for value in row] for row in table.itertuples(index=False, name=None)]
