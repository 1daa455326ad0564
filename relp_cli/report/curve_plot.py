"""Figure 3's form: faithfulness and completeness against the number of nodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from relp_cli.errors import RelpError
from relp_cli.report.canvas import LIGHT, Theme, bare, method_colors, new_figure, save_figure, themed
from relp_cli.report.curves import curve, mean_curve
from relp_cli.report.names import counted, kind_title, model_title, need, varying
from relp_cli.tasks.counted import pairs_text

MEASURES = ("faithfulness", "completeness")


def faithfulness_curves(
    table: pd.DataFrame, path: str | Path, x: str = "n_nodes", by: str = "method", faint: str = "task"
) -> None:
    """Write `curves_figure(...)`."""
    save_figure(curves_figure(table, x, by, faint), path)


def curves_figure(
    table: pd.DataFrame, x: str = "n_nodes", by: str = "method", faint: str = "task", theme: Theme = LIGHT
) -> Figure:
    """Faithfulness and completeness against the number of nodes, on a log axis.

    One colour per value of `by`; a faint line per value of `faint` (and per seed); a bold mean over them where all of
    them have data (`curves.mean_curve`); with a single structure, its line with the 95 % band. Random circuits of the
    same sizes are dashed; lines at 1 and 0 are the full and the empty model. A circuit of 0 nodes has no place on a log
    axis: it is a ring at the left edge, over the label 0. Each model × kind gets a row of panels.

    table: `evaluate`'s rows with columns `by` and `faint` (and model, kind, seed, direction where there are).
    Raises: RelpError for a table without these columns or without one finite point.
    """
    need(table, (x, by, faint, *MEASURES), "faithfulness curves")
    if not np.isfinite(table[list(MEASURES)].astype(float).to_numpy()).any():
        raise RelpError("faithfulness curves: no finite faithfulness or completeness in the table")
    if len(varying(table, ("direction",))) and by != "direction":
        table = table.assign(**{by: table[by].astype(str) + " (" + table["direction"].astype(str) + ")"})
    rows_by = [name for name in ("model", "kind") if name in table.columns and name not in (by, faint)]
    parts = list(table.groupby(rows_by, sort=False)) if rows_by else [((), table)]
    colors = method_colors(table[by].astype(str))
    with themed(theme):
        figure = new_figure(8.4, 1.1 + 2.9 * len(parts))
        grid = figure.subplots(len(parts), 2, squeeze=False)
        for row, (key, rows) in zip(grid, parts, strict=True):
            for axes, measure in zip(row, MEASURES, strict=True):
                _curves_panel(axes, rows, (x, measure), (by, faint), colors, theme)
            names = dict(zip(rows_by, key, strict=True))
            about = [model_title(str(names["model"]))] if "model" in names else []
            about += [kind_title(str(names["kind"]))] if "kind" in names else []
            row[0].set_title(" · ".join(about) or "faithfulness", loc="left", fontweight="bold")
            row[1].set_title(protocol(rows), loc="right", fontsize=8, color=theme.soft)
            row[0].set_xlabel(row[0].get_xlabel() + _costs(rows, by))
        _curves_legend(figure, table, colors, faint, theme)
    return figure


def structures(rows: pd.DataFrame, faint: str) -> list[pd.DataFrame]:
    """The rows of each value of `faint`, and of each seed, metric and ablation where these vary."""
    keys = [
        *([faint] if faint in rows else []),
        *varying(rows, tuple(k for k in ("seed", "metric", "ablation") if k != faint)),
    ]
    return [group for _, group in rows.groupby(keys, sort=False)] if keys else [rows]


def _curves_panel(
    axes: Axes, rows: pd.DataFrame, xy: tuple[str, str], keys: tuple[str, str], colors: Mapping[str, str], theme: Theme
) -> None:
    (x, y), (by, faint) = xy, keys
    bold: list[np.ndarray] = [np.array([0.0, 1.0])]
    zero = _zero_place(rows[x])
    for i, (name, chosen) in enumerate(rows.groupby(by, sort=False)):
        color, width = colors[str(name)], max(1.4, 3 - 0.6 * i)  # a line that another one covers stays visible
        parts = structures(chosen, faint)
        several = len(parts) > 1
        for one in parts if several else []:
            axes.plot(*curve(one, x, y), color=color, lw=0.9, alpha=0.35)
        mean = mean_curve([curve(one, x, y) for one in parts])
        axes.plot(*mean, color=color, lw=width, marker="" if several else "o", ms=3, solid_capstyle="round")
        bold.append(mean[1])
        if not several:
            _band(axes, parts[0], x, y, color)
        at_zero = chosen.loc[chosen[x] == 0, y].astype(float).dropna()
        if len(at_zero):
            axes.plot(zero, at_zero.mean(), "o", color=color, mfc="none", ms=7, mew=1.4, clip_on=False)
            bold.append(at_zero.to_numpy())
    if f"random_{y}" in rows.columns:
        base = mean_curve([curve(one, x, f"random_{y}") for one in structures(rows, faint)])
        axes.plot(*base, color=theme.soft, lw=1.4, ls=(0, (4, 2)))
        bold.append(base[1])
    for level, label in ((1, "full\nmodel"), (0, "empty\nmodel")):  # completeness is the complement's faithfulness
        axes.axhline(level, color=theme.soft, lw=0.8, ls=":", zorder=0)
        axes.annotate(
            label, (1.01, level), xycoords=("axes fraction", "data"), va="center", fontsize=7, color=theme.soft
        )
    label = f"number of {counted(rows.get('kind', ()))}" if x == "n_nodes" else x.replace("_", " ")
    _scale_x(axes, rows[x], label, zero, theme)
    _scale_y(axes, rows[y].astype(float).to_numpy(), np.concatenate(bold), theme)
    axes.set_ylabel(y)
    bare(axes)


def _band(axes: Axes, rows: pd.DataFrame, x: str, y: str, color: str) -> None:
    if f"{y}_lo" in rows.columns and f"{y}_hi" in rows.columns:
        (at, low), (_, high) = curve(rows, x, f"{y}_lo"), curve(rows, x, f"{y}_hi")
        if len(low) == len(high):
            axes.fill_between(at, low, high, color=color, alpha=0.15, lw=0)


def _zero_place(values: pd.Series) -> float:
    """Where a circuit of 0 nodes stands: well left of the smallest circuit that a log axis can show."""
    positive = values[values > 0].astype(float)
    if positive.empty:
        return 0.3
    return float(positive.min() / max(2.0, (positive.max() / positive.min()) ** 0.12))


def _scale_x(axes: Axes, values: pd.Series, label: str, zero: float, theme: Theme) -> None:
    """A log axis with plain labels; left of a thin line, the place of 0 nodes."""
    positive = values[values > 0].astype(float)
    low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    steps = (1, 2, 5) if high / low < 60 else (1,)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [s * 10.0**k for k in decades for s in steps if low * 0.999 <= s * 10.0**k <= high * 1.001]
    labels = [f"{t:,.0f}" if t >= 1 else f"{t:g}" for t in ticks]
    axes.set_xscale("log")
    right = high * (high / low) ** 0.04 * 1.05
    if (values == 0).any():
        axes.axvline((zero * low) ** 0.5, color=theme.soft, lw=0.7, ls=(0, (1, 2)))
        ticks, labels = [zero, *ticks], ["0", *labels]
        axes.set_xlim(zero / (low / zero) ** 0.4, right)
    else:
        axes.set_xlim(low / ((high / low) ** 0.04 * 1.05), right)
    axes.set_xticks(ticks, labels)
    axes.set_xticks([], minor=True)
    axes.set_xlabel(label)


def _scale_y(axes: Axes, values: np.ndarray, bold: np.ndarray, theme: Theme) -> None:
    """All of the bold lines; faint ones within −0.5 … 1.5, and a count of the points that lie beyond."""
    finite, bold = values[np.isfinite(values)], bold[np.isfinite(bold)]
    low = min(bold.min(), max(finite.min(initial=0), -0.5))
    high = max(bold.max(), min(finite.max(initial=1), 1.5))
    pad = 0.06 * (high - low)
    axes.set_ylim(low - pad, high + pad)
    beyond = int(((finite < low - pad) | (finite > high + pad)).sum())
    if beyond:
        text = f"{beyond} point{'s' if beyond > 1 else ''} beyond the axis"
        axes.annotate(text, (0.99, 0.01), xycoords="axes fraction", ha="right", fontsize=7, color=theme.soft)


def protocol(rows: pd.DataFrame) -> str:
    """What the numbers were measured with, where it is one thing."""

    def only(name: str) -> Any:
        return rows[name].iloc[0] if name in rows.columns and rows[name].nunique() == 1 else None

    parts = []
    if (pairs := only("n_pairs")) is not None:
        parts.append(pairs_text(pairs, only("n_prompts"), "held-out pairs"))
    if (ablation := only("ablation")) is not None:
        parts.append(f"{ablation} ablation")
    if (layers := only("exclude_layers")) is not None and layers > 0:
        parts.append("layer 0 not evaluated" if layers == 1 else f"layers 0–{layers - 1} not evaluated")
    return ", ".join(parts)


def _costs(rows: pd.DataFrame, by: str) -> str:
    """A line per value of `by`: passes per pair, and seconds, of its scores, where the table has them."""
    names = ["forwards_per_pair", "backwards_per_pair", *(["seconds"] if "seconds" in rows.columns else [])]
    if not set(names) <= set(rows.columns):
        return ""
    means = rows.groupby(by, sort=False)[names].mean()
    return "".join(
        f"\n{name}: {c.forwards_per_pair:.0f} forward, {c.backwards_per_pair:.0f} backward passes"
        + (f", {c.seconds:.1f} s" if "seconds" in names else "")
        for name, c in means.iterrows()
        if c.notna().all()
    )


def _curves_legend(figure: Figure, table: pd.DataFrame, colors: Mapping[str, str], faint: str, theme: Theme) -> None:
    handles = [Line2D([], [], color=c, lw=2.2, label=m) for m, c in colors.items()]
    if "random_faithfulness" in table.columns:
        handles.append(Line2D([], [], color=theme.soft, lw=1.4, ls=(0, (4, 2)), label="random circuits"))
    if (n := table[faint].nunique()) > 1:
        handles.append(
            Line2D([], [], color=theme.soft, lw=0.9, alpha=0.5, label=f"faint: each of {n} {faint}s; bold: mean")
        )
    figure.legend(handles=handles, loc="outside upper left", ncols=min(6, len(handles)))
