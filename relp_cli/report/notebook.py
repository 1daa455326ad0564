"""Figures of scores and circuits in a notebook: `.plot()`."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from relp_cli.errors import RelpError
from relp_cli.report.canvas import LIGHT, new_figure, themed
from relp_cli.report.graph import DRAWINGS, circuit_figure
from relp_cli.report.heatmap import heatmap_figure
from relp_cli.report.names import kind_title
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.top import strongest

BARS = 20


def scores_figure(scores: Scores) -> Figure:
    """Layer × position maps of nodes (`heatmap_figure`), or bars of the strongest edges or features with ± one standard error."""
    method = str(scores.meta.get("method", "scores"))
    if scores.units.space == "nodes":
        return heatmap_figure({method: scores}, list(scores), str(scores.meta.get("model", "")))
    table = strongest(scores, BARS)
    named = scores.units.space == "edges"  # their names say where they are
    names = [
        " ".join(
            str(part)
            for part in ((row.unit,) if named else (row.layer, row.kind if row.unit is None else row.unit)) + at
        )
        for row in table.itertuples(index=False)
        for at in [() if row.position == "*" else (row.position,)]
    ]
    with themed(LIGHT):
        figure = new_figure(5.5, 0.9 + 0.2 * len(names))
        axes = figure.subplots()
        axes.barh(range(len(names)), table.score, xerr=table.se.fillna(0))
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(f"{method}: effect on {scores.meta.get('metric', 'the metric')}, ± standard error")
    return figure


def kept_figure(circuit: Circuit, scores: Any = None) -> Figure:
    """How many units a circuit of nodes keeps per layer and position; of edges and features, their graph (`circuit_figure`).

    Raises: RelpError for edges without scores.
    """
    if circuit.units.space == "edges" and scores is None:
        raise RelpError("edges are drawn by their scores: circuit.plot(scores), those that it was selected from")
    if circuit.units.space in DRAWINGS:
        return circuit_figure(circuit, None if scores is None else scores.whole)
    masks = {kind: mask.flatten(2).sum(-1) if mask.ndim > 2 else mask for kind, mask in circuit.masks.items()}
    with themed(LIGHT):
        figure = new_figure(2.2 + 0.3 * len(circuit.labels), 1 + 2 * len(masks))
        grid = figure.subplots(len(masks), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (kind, counts) in zip(grid, masks.items(), strict=True):
            image = axes.imshow(counts.numpy().astype(int), cmap="Greys", vmin=0, aspect="auto", interpolation="none")
            axes.set_ylabel(f"{kind_title(kind)}\nlayer")
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            figure.colorbar(image, ax=axes, label="kept", ticks=MaxNLocator(integer=True))
        grid[-1].set_xticks(range(len(circuit.labels)), circuit.labels, rotation=90)
    return figure
