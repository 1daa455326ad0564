"""Figure 1's form: bars of agreement with exact patching, per model and node kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from relp_cli.errors import RelpError
from relp_cli.report.canvas import LIGHT, Theme, bare, method_colors, new_figure, save_figure, themed
from relp_cli.report.names import kind_title, model_title, need, varying


def agreement_bars(table: pd.DataFrame, path: str | Path) -> None:
    """Write `agreement_figure(...)`."""
    save_figure(agreement_figure(table), path)


def agreement_figure(table: pd.DataFrame, theme: Theme = LIGHT) -> Figure:
    """Bars of PCC with exact patching: one panel per node kind, groups = models, bars = methods, 95 % intervals.

    table: `compare`'s rows (model, method, kind, pcc; pcc_lo, pcc_hi, task where there are). Tasks, and whatever else
    varies (direction, seed), become rows of panels. A missing PCC is marked "n/a".
    Raises: RelpError for a table without these columns, or with two rows for one bar.
    """
    need(table, ("model", "method", "kind", "pcc"), "agreement bars")
    by = [name for name in ("task",) if name in table.columns] + varying(table)
    parts = list(table.groupby(by, sort=False)) if by else [((), table)]
    kinds, models = list(dict.fromkeys(table.kind)), list(dict.fromkeys(table.model))
    colors = method_colors(table.method)
    lows = table[[c for c in ("pcc", "pcc_lo") if c in table.columns]].to_numpy(dtype=float)
    low = min(0.0, float(np.nan_to_num(lows).min()) - 0.05) if (lows < 0).any() else 0.0
    width = max(2.2, len(models) * (0.16 * len(colors) + 0.2))
    with themed(theme):
        figure = new_figure(max(4.6, 0.8 + width * len(kinds)), 0.9 + 2.2 * len(parts))
        grid = figure.subplots(len(parts), len(kinds), squeeze=False, sharex=True, sharey=True)
        for row, (key, rows) in zip(grid, parts, strict=True):
            row[0].set_ylabel("PCC" + "".join(f"\n{v}" for v in (key if isinstance(key, tuple) else (key,))))
            for axes, kind in zip(row, kinds, strict=True):
                _bars(axes, rows[rows.kind == kind], models, colors, theme)
                axes.set_ylim(low, 1.04)
        for axes, kind in zip(grid[0], kinds, strict=True):
            axes.set_title(kind_title(kind), loc="left")
        for axes in grid[-1]:
            turned = sum(map(len, map(model_title, models))) > 11 * width
            axes.set_xticks(
                range(len(models)), list(map(model_title, models)),
                rotation=35 if turned else 0, ha="right" if turned else "center",
            )  # fmt: skip
        handles = [Line2D([], [], marker="s", ls="", ms=7, color=c, label=m) for m, c in colors.items()]
        if "pcc_lo" in table.columns:
            handles.append(Line2D([], [], color=theme.ink, lw=0.9, label="95 % bootstrap over pairs"))
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _bars(axes: Axes, rows: pd.DataFrame, models: Sequence[str], colors: Mapping[str, str], theme: Theme) -> None:
    width = 0.8 / len(colors)
    for i, (method, color) in enumerate(colors.items()):
        for place, model in enumerate(models):
            found = rows[(rows.model == model) & (rows.method == method)]
            if len(found) > 1:
                raise RelpError(
                    f"agreement bars: {len(found)} rows for {model}, {method}, {found.kind.iloc[0]}; expected one"
                )
            if found.empty:
                continue
            one, x = found.iloc[0], place + (i - (len(colors) - 1) / 2) * width
            if np.isnan(one.pcc):
                axes.text(x, 0.01, "n/a", rotation=90, ha="center", va="bottom", fontsize=7, color=theme.soft)
                continue
            axes.bar(x, one.pcc, width * 0.9, color=color)
            low, high = one.get("pcc_lo", np.nan), one.get("pcc_hi", np.nan)
            if not (np.isnan(low) or np.isnan(high)):
                axes.plot([x, x], [low, high], color=theme.ink, lw=0.9, solid_capstyle="butt")
    axes.axhline(0, color=theme.soft, lw=0.7)
    axes.grid(axis="y", lw=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", length=0)
    bare(axes)
