"""Small figures of tables: values with intervals, values of many settings by what was chosen, lines over a path."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from relp_cli.report.canvas import DARK, LIGHT, Theme, bare, method_colors, new_figure, themed
from relp_cli.report.page import Picture


def in_both(name: str, caption: str, draw: Callable[[Theme], Figure]) -> Picture:
    """A picture for both colour schemes."""
    return Picture(name, caption, draw(LIGHT), draw(DARK))


def intervals_figure(
    table: pd.DataFrame, label: str, columns: Sequence[str], title: str, theme: Theme = LIGHT
) -> Figure:
    """A dot per row, at columns[0], and a line from columns[1] to columns[2]; rows from the top down."""
    with themed(theme):
        figure = new_figure(6.4, 0.9 + 0.3 * len(table))
        axes = figure.subplots()
        colors = method_colors(table[label].astype(str))
        for y, row in enumerate(table.to_dict("records")):
            value, low, high = (float(row[c]) for c in columns)
            axes.plot([low, high], [y, y], color=theme.ink, lw=1, solid_capstyle="butt")
            axes.plot(value, y, "o", color=colors[str(row[label])], ms=6)
        axes.set_yticks(range(len(table)), table[label].astype(str).tolist())
        axes.invert_yaxis()
        axes.grid(axis="x", lw=0.5)
        axes.set_axisbelow(True)
        axes.set_xlim(left=min(0.0, float(np.nanmin(table[list(columns)].to_numpy(dtype=float)))))
        axes.set_xlabel(title)
        bare(axes)
    return figure


def strips_figure(table: pd.DataFrame, factors: Sequence[str], y: str, theme: Theme) -> Figure:
    """A panel per factor: every setting's `y` over the factor's levels, and the level's mean as a line."""
    with themed(theme):
        widths = [max(1.0, 0.45 * table[f].nunique()) for f in factors]
        figure = new_figure(1.2 + 1.05 * sum(widths), 3.6)
        grid = np.atleast_1d(figure.subplots(1, len(factors), sharey=True, gridspec_kw={"width_ratios": widths}))
        for axes, factor in zip(grid, factors, strict=True):
            levels = list(dict.fromkeys(table[factor].astype(str)))
            for x, level in enumerate(levels):
                values = table.loc[table[factor].astype(str) == level, y].to_numpy(dtype=float)
                spread = 0.32 * np.linspace(-1, 1, len(values)) if len(values) > 1 else np.zeros(len(values))
                axes.plot(x + spread, values, "o", ms=2.5, mew=0, alpha=0.55, color="#2f7fc8")
                axes.plot([x - 0.36, x + 0.36], [np.nanmean(values)] * 2, color=theme.ink, lw=1.6)
            axes.set_xticks(range(len(levels)), levels, rotation=90 if max(map(len, levels)) > 5 else 0)
            axes.set_title(factor, loc="left")
            axes.grid(axis="y", lw=0.5)
            axes.set_axisbelow(True)
            bare(axes)
        grid[0].set_ylabel(y)
    return figure


def lines_figure(table: pd.DataFrame, x: str, columns: Sequence[str], labels: tuple[str, str], theme: Theme) -> Figure:
    """A line per column over `x`, from dark to bright in the columns' order. labels: of x and y."""
    with themed(theme):
        figure = new_figure(4.9, 3.0)
        axes = figure.subplots()
        shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.9, len(columns)))
        for column, color in zip(columns, shades, strict=True):
            axes.plot(table[x], table[column], color=color, lw=1.4, marker="o", ms=2.5)
        axes.axhline(1, color=theme.soft, lw=0.8, ls=":")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        for column, color in ((columns[0], shades[0]), (columns[-1], shades[-1])):
            axes.plot([], [], color=color, lw=1.8, label=column)
        axes.legend(loc="best")
        bare(axes)
    return figure
