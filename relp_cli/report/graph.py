"""A circuit as a picture: nodes in the order of a forward pass from bottom to top, edges coloured by their sign."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from relp_cli.report.canvas import LIGHT, Theme, new_figure, one_line, themed
from relp_cli.report.names import SITE_TITLES
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.edges import KIND, edge_mask
from relp_cli.spaces.features import feature_nodes, sites_of
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.scores import Scores

MOST_EDGES = 300  # the strongest; more are a grey area
MOST_NAMES = 90  # nodes beyond which none is named
STYLES = {"q": (0, (4, 2)), "k": (0, (1, 1.5))}  # values, MLPs and logits: solid


@dataclass(frozen=True)
class Dot:
    """One node: place, name, and marker ("o", or "s" for error terms)."""

    x: float
    y: float
    name: str
    marker: str = "o"


@dataclass(frozen=True)
class Line:
    """One edge between dots, by number; style: a row of STYLES or "" for solid."""

    source: int
    target: int
    score: float
    style: str = ""


@dataclass(frozen=True)
class Drawing:
    """rows, columns: where what is labelled."""

    dots: Sequence[Dot]
    lines: Sequence[Line]
    rows: Mapping[float, str]
    columns: Mapping[float, str]


def circuit_figure(
    circuit: Circuit,
    scores: Scores | None = None,
    tokens: Mapping[str, str] | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """The circuit's nodes and its strongest edges; widths are proportional to |score|.

    Feature circuits: a column per position, a row per site, squares for error terms. Edge circuits: a row for the heads and
    one for the MLP of every layer; dashed into queries, dotted into keys; `scores`: what the edges were selected by.
    tokens: an example token per position label.
    """
    return _draw(DRAWINGS[circuit.units.space].draw(circuit, scores, tokens or {}), theme)


def feature_drawing(circuit: Circuit, _: Scores | None, tokens: Mapping[str, str]) -> Drawing:
    """Nodes of one site and position stand side by side; the metric is on top, at the last position."""
    nodes = feature_nodes(circuit)
    cells: dict[tuple[str, str], int] = {}
    order = []
    for node in nodes:
        cell = (node.position, node.site.name)
        order.append(cells.get(cell, 0))
        cells[cell] = order[-1] + 1
    used = [label for label in circuit.labels if any(position == label for position, _ in cells)]
    widths = {label: max(n for (position, _), n in cells.items() if position == label) for label in used}
    starts = dict(zip(used, np.cumsum([0.0, *(widths[label] + 1.0 for label in used)]), strict=False))
    middle = {label: starts[label] + (widths[label] - 1) / 2 for label in used}
    sites = list(sites_of(circuit.units).sites)
    rows = {float(i): SITE_TITLES[s.kind] + (f" {s.layer}" if s.layer >= 0 else "") for i, s in enumerate(sites)}
    dots = [
        Dot(
            middle[node.position] + i - (cells[node.position, node.site.name] - 1) / 2, float(sites.index(node.site)),
            "ε" if node.feature is None else str(node.feature), "s" if node.feature is None else "o",
        )
        for node, i in zip(nodes, order, strict=True)
    ]  # fmt: skip
    dots.append(Dot(middle[used[-1]] if used else 0.0, float(len(sites)), "metric", "D"))
    edges = circuit.edges
    lines = [] if edges is None else [
        Line(u, v, score) for (u, v), score in zip(edges.index.tolist(), edges.mean.tolist(), strict=True)
    ]  # fmt: skip
    columns = {
        middle[label]: ""
        if label == "*"
        else one_line(label) + (f"\n{one_line(tokens[label], 12)}" if label in tokens else "")
        for label in used
    }
    return Drawing(dots, lines, rows, columns)


def edge_drawing(circuit: Circuit, scores: Scores | None, _: Mapping[str, str] | None = None) -> Drawing:
    """Heads side by side, each layer's MLP above them; edges kept at several positions are added up."""
    assert scores is not None
    graph: Graph = circuit.units.structure
    mask = edge_mask(circuit)
    kept, mean = mask.any(0), graph.dense(scores.dense(scores.mean) * scores.shares[:, None])
    total = (mean * mask).sum(0) if circuit.labels == scores.labels else mean.sum(0)
    middle = (graph.n_heads - 1) / 2
    rows: dict[float, str] = {0.0: "input", 2.0 * graph.n_layers + 1: "logits"}
    dots = [Dot(middle, 0.0, "input", "s")]
    for layer in range(graph.n_layers):
        rows |= {2.0 * layer + 1: f"heads {layer}", 2.0 * layer + 2: f"MLP {layer}"}
        dots += [Dot(float(h), 2.0 * layer + 1, str(h)) for h in range(graph.n_heads)]
        dots.append(Dot(graph.n_heads + 0.5, 2.0 * layer + 2, "", "s"))  # beside the heads: no line runs through others
    dots.append(Dot(middle, 2.0 * graph.n_layers + 1, "logits", "D"))
    numbers = {**{name: i for i, name in enumerate(graph.writers)}, "logits": len(graph.writers)}
    lines = []
    for u, v in kept.nonzero().tolist():
        name, _, part = graph.readers[v].partition("<")
        lines.append(Line(u, numbers[name], float(total[u, v]), part.rstrip(">")))
    return Drawing(dots, lines, rows, {})


@dataclass(frozen=True)
class DrawingRow:
    """How circuits of a space are drawn. count: how many edges there are to draw; None: nothing."""

    draw: Callable[[Circuit, Scores | None, Mapping[str, str]], Drawing]
    count: Callable[[Circuit, Scores], int | None]
    caption: str


SIGNS = "Blue: negative scores, red: positive; widths are proportional to |score|."
DRAWINGS = {
    "features": DrawingRow(
        feature_drawing,
        lambda circuit, _: None if circuit.edges is None else len(circuit.edges),
        f"{SIGNS} Squares (ε): error terms.",
    ),
    "edges": DrawingRow(
        edge_drawing,
        lambda circuit, scores: circuit.n_nodes if KIND in scores else None,
        f"{SIGNS} Dashed: into queries; dotted: into keys; solid: into values, MLPs and logits.",
    ),
}


def _color(line: Line, theme: Theme) -> str:
    return theme.diverging[1 if line.score < 0 else -2]


def _draw(drawing: Drawing, theme: Theme) -> Figure:
    lines = sorted(drawing.lines, key=lambda line: -abs(line.score))[:MOST_EDGES]
    xs, top = [dot.x for dot in drawing.dots], max(dot.y for dot in drawing.dots)
    width = float(np.clip(0.3 * (max(xs) - min(xs) + 2) + 1.4, 3.5, 12))
    height = float(np.clip(0.4 * (top + 1) + 0.8, 2.5, 14))
    used = {n for line in lines for n in (line.source, line.target)} if lines else set(range(len(drawing.dots)))
    with themed(theme):
        figure = new_figure(width, height)
        axes = figure.subplots()
        largest = max((abs(line.score) for line in lines), default=0.0) or 1.0
        ends = [[(d.x, d.y) for d in (drawing.dots[line.source], drawing.dots[line.target])] for line in lines]
        shares = [abs(line.score) / largest for line in lines]
        alphas = [0.25 + 0.65 * share**0.5 for share in shares]
        axes.add_collection(
            LineCollection(
                ends[::-1],
                colors=[to_rgba(_color(line, theme), a) for line, a in zip(lines, alphas, strict=True)][::-1],
                linewidths=[0.3 + 3.2 * share for share in shares][::-1],
                linestyles=[STYLES.get(line.style, "-") for line in lines][::-1],
                capstyle="round",
                zorder=1,
            )
        )
        for marker in ("o", "s", "D"):
            for shown, color in ((True, theme.ink), (False, theme.line)):
                at = [d for i, d in enumerate(drawing.dots) if d.marker == marker and (i in used) == shown]
                axes.scatter(
                    [d.x for d in at], [d.y for d in at], s=26, marker=marker, color=color, zorder=2, linewidths=0
                )
        halo = [withStroke(linewidth=2, foreground=theme.face)]
        for i, dot in enumerate(drawing.dots if len(drawing.dots) <= MOST_NAMES else drawing.dots[-1:]):
            color = theme.ink if i in used or len(drawing.dots) > MOST_NAMES else theme.soft
            axes.annotate(
                dot.name, (dot.x, dot.y), (0, 4.5), textcoords="offset points", ha="center", fontsize=6.5, color=color,
                path_effects=halo, zorder=3,
            )  # fmt: skip
        axes.set_yticks(list(drawing.rows), list(drawing.rows.values()))
        axes.set_xticks(list(drawing.columns), list(drawing.columns.values()))
        axes.set(xlim=(min(xs) - 1, max(xs) + 1), ylim=(-0.7, top + 0.7))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(axis="y", linewidth=0.4, zorder=0)
        axes.set_axisbelow(True)
    return figure
