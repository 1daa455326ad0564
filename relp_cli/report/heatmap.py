"""Figure 2's form: layer × position heatmaps of scores, one column per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relp_cli.errors import RelpError
from relp_cli.evaluation.agreement import agreement
from relp_cli.report.canvas import LIGHT, Theme, new_figure, one_line, root_scale, save_figure, themed
from relp_cli.report.names import kind_title
from relp_cli.spaces.scores import KindScores, Scores

REFERENCE = "act_patch"
MAX_LABELS = 64
SHOWN = (-1.0, -0.25, 0.0, 0.25, 1.0)  # of the limit, at the colour bar
Over = Literal["units", "positions"]


def heatmaps(
    scores: Mapping[str, Scores],
    kinds: Sequence[str],
    path: str | Path,
    title: str,
    tokens: Sequence[str] | None = None,
) -> None:
    """Write `heatmap_figure(...)`."""
    save_figure(heatmap_figure(scores, kinds, title, tokens), path)


def heatmap_figure(
    scores: Mapping[str, Scores],
    kinds: Sequence[str],
    title: str,
    tokens: Sequence[str] | None = None,
    theme: Theme = LIGHT,
    over: Over = "units",
) -> Figure:
    """Layer × position maps of pair-averaged scores: rows = node kinds, columns = methods, act_patch first.

    Within a row all panels share one colour scale, taken from act_patch (beyond it colours saturate, and the colour bar
    ends in arrows); without act_patch, from the largest |score| of the row. It is one of square roots (`root_scale`). A panel's
    title has its PCC with act_patch over what the panel shows.

    over: what kinds with units are summed over. "units": heads, neurons or dimensions of a position are added up (the row's
          label says so). "positions": layer × head (or neuron) maps instead, added up over positions; kinds with units only.
    tokens: what stands under each position label; "" is nothing.
    Raises: RelpError for an unknown kind, or scores of different positions or shapes.
    """
    if not scores or not kinds:
        raise RelpError("heatmaps: no scores or no node kinds to draw")
    methods = sorted(scores, key=lambda m: m != REFERENCE)
    panels = {(k, m): summed(scores[m][k], over) for k in kinds for m in methods}
    labels = _same_axes(panels, kinds, methods, tokens)
    layers, positions = panels[kinds[0], methods[0]].mean.shape
    width, height = float(np.clip(0.2 * positions, 1.9, 7)), float(np.clip(0.2 * layers, 1.1, 4.5))
    with themed(theme):
        below = 0.065 * min(18, max(map(len, labels))) + (0.9 if any(tokens or ()) else 0)  # inches: rotated labels
        figure = new_figure(1.6 + (width + 0.15) * len(methods), 0.75 + below + (height + 0.35) * len(kinds))
        grid = figure.subplots(len(kinds), len(methods), squeeze=False, sharex=True, sharey="row")
        for row, kind in zip(grid, kinds, strict=True):
            exact = panels.get((kind, REFERENCE))
            limit = _limit([exact] if exact is not None else [panels[kind, m] for m in methods])
            beyond = False
            for axes, method in zip(row, methods, strict=True):
                values = panels[kind, method].mean.float().numpy()
                image = axes.imshow(
                    values, cmap=theme.cmap(), norm=root_scale(limit), aspect="auto", interpolation="none"
                )
                beyond |= _limit([panels[kind, method]]) > limit * (1 + 1e-6)
                if len(methods) > 1:
                    axes.set_title(panel_title(method, panels[kind, method], exact), loc="left")
                axes.tick_params(length=2)
            bar = figure.colorbar(image, ax=list(row), pad=0.01, aspect=15, extend="both" if beyond else "neither")
            bar.outline.set_visible(False)
            bar.set_ticks([share * limit for share in SHOWN])
            bar.ax.yaxis.set_major_formatter("{x:.3g}")
            bar.minorticks_off()
            note = f"\n(Σ over {over})" if scores[methods[0]][kind].mean.ndim == 3 else ""
            row[0].set_ylabel(f"{kind_title(kind)}{note}\nlayer")
            row[0].set_yticks(range(0, layers, 1 + layers // 16))
        for axes in grid[-1]:
            _label_positions(axes, labels, tokens, theme)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.supxlabel(_caption(scores[methods[-1]], methods), x=0.01, ha="left", fontsize=8, color=theme.soft)
    return figure


def summed(scores: KindScores, over: Over = "units") -> KindScores:
    """Scores[layer, pos] (vector nodes as they are, others added up over units), or [layer, unit], added up over positions.

    Sums keep their sign; they have no variance of their own (NaN) and no examples.
    """
    if scores.mean.ndim == 2:
        if over == "positions":
            raise RelpError(
                f"heatmaps: {scores.kind} nodes have no units to show; only heads, neurons and the like have"
            )
        return replace(scores, examples=None)
    mean = scores.mean.sum(-1 if over == "units" else 1)
    labels, n = scores.labels, scores.n
    if over == "positions":
        labels, n = tuple(map(str, range(mean.shape[1]))), n.amin().expand(mean.shape[1])
    return replace(scores, mean=mean, variance=mean * float("nan"), n=n, labels=labels, examples=None, present=None)


def panel_title(method: str, scores: KindScores, exact: KindScores | None) -> str:
    """`relp · PCC 0.968`: Pearson correlation over the panel's cells; "—" where an array is constant."""
    if exact is None or method == REFERENCE:
        return method
    unsigned = not scores.meta.get("signed", True)
    pcc = agreement(scores, exact, unsigned=unsigned).pcc
    return f"{method} · PCC{' with |exact|' if unsigned else ''} " + ("—" if np.isnan(pcc) else f"{pcc:.3f}")


def _caption(scores: Scores, methods: Sequence[str]) -> str:
    metric = scores.meta.get("metric", "the metric")
    colors = f"Blue: patching the node lowers {metric}; red: raises it.\nDepth of colour: square root of |score|."
    if REFERENCE not in methods:
        return colors
    return f"{colors} PCC: correlation with {REFERENCE} over the panel; each row has {REFERENCE}'s colour scale."


def _same_axes(
    panels: Mapping[tuple[str, str], KindScores],
    kinds: Sequence[str],
    methods: Sequence[str],
    tokens: Sequence[str] | None,
) -> tuple[str, ...]:
    first = panels[kinds[0], methods[0]]
    for (kind, method), panel in panels.items():
        if panel.labels != first.labels or panel.mean.shape != first.mean.shape:
            raise RelpError(
                f"heatmaps: {method}'s {kind} scores are [layer, column] {list(panel.mean.shape)}, {methods[0]}'s "
                f"{kinds[0]} scores {list(first.mean.shape)}: all panels must have the same layers and columns"
            )
    if tokens is not None and len(tokens) != len(first.labels):
        raise RelpError(f"heatmaps: {len(tokens)} tokens for {len(first.labels)} positions")
    return first.labels


def _limit(panels: Sequence[KindScores]) -> float:
    """The largest finite |score|; 1 where all are zero."""
    largest = max(float(np.nan_to_num(p.mean.float().numpy(), posinf=0, neginf=0).__abs__().max()) for p in panels)
    return largest or 1.0


def _label_positions(axes: Axes, labels: Sequence[str], tokens: Sequence[str] | None, theme: Theme) -> None:
    """Role labels, rotated, and below them the tokens."""
    step = 1 + (len(labels) - 1) // MAX_LABELS
    shown = range(0, len(labels), step)
    names = [one_line(labels[i]) for i in shown]
    turn = 90 if max(map(len, names)) > 2 else 0
    axes.set_xticks(list(shown), names, rotation=turn, family="DejaVu Sans Mono", fontsize=7.5)
    if tokens is None:
        return
    below = 11 + 4.6 * max(map(len, names))  # points: the height of the longest rotated label
    for i in shown:
        if not tokens[i]:
            continue
        axes.annotate(
            one_line(tokens[i], 12), (i, 0), (0, -below), xycoords=("data", "axes fraction"),
            textcoords="offset points", rotation=90, ha="center", va="top", fontsize=7.5, color=theme.soft,
        )  # fmt: skip
