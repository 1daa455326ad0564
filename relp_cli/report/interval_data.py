"""Values with intervals as plain numbers for the page's script: a panel per task and node kind, a row per method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from relp_cli.report.canvas import method_colors
from relp_cli.report.names import kind_title, model_title, varying
from relp_cli.report.page import plain


def agreement_panels(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Of `compare`'s rows (as `bars.agreement_figure`): PCC with its interval, models as groups of rows.

    Tasks, and whatever else varies (direction, seed), have panels of their own. All panels have one axis, down to 0 at least and
    up to 1; a PCC that is missing stands as null, with the reason where the table has it.
    """
    several = table["task"].nunique() > 1 if "task" in table else False
    by = [*(["task"] if several else []), *varying(table), "kind"]
    colors = method_colors(table.method)
    columns = [c for c in ("pcc", "pcc_lo") if c in table]
    low = min(0.0, float(table[columns].min(numeric_only=True).min()))
    panels = []
    for key, part in table.groupby(by, sort=False):
        *more, kind = key if isinstance(key, tuple) else (key,)
        title = ", ".join([kind_title(str(kind)), *map(str, more)])
        groups = [
            {"name": model_title(str(model)), "rows": _rows(rows, "method", ("pcc", "pcc_lo", "pcc_hi"), colors)}
            for model, rows in part.groupby("model", sort=False)
        ]
        panels.append({"title": title, "low": plain(low), "high": 1, "groups": groups})
    return panels


def interval_panel(table: pd.DataFrame, name: str, columns: tuple[str, str, str], title: str) -> list[dict[str, Any]]:
    """One panel: a row per row of the table, named by a column; columns: value, low and high."""
    ends = table[list(columns)].to_numpy(dtype=float)
    rows = _rows(table, name, columns, method_colors(table[name].astype(str)))
    high = 1.02 * float(pd.Series(ends.ravel()).max())
    return [{"title": title, "low": plain(min(0.0, float(pd.Series(ends.ravel()).min()))), "high": plain(high or 1.0),
             "groups": [{"name": "", "rows": rows}]}]  # fmt: skip


def _rows(table: pd.DataFrame, name: str, columns: Sequence[str], colors: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "name": str(row[name]),
            **{key: plain(row.get(column)) for key, column in zip(("value", "low", "high"), columns, strict=True)},
            "color": colors[str(row[name])],
            "why": str(row.get("note") or "") if isinstance(row.get("note"), str) else "",
        }
        for row in table.to_dict("records")
    ]
