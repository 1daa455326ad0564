"""The nodes of the interactive graph, in each space's own rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from relp_cli.report.graph_places import BAR, Mark
from relp_cli.report.names import SITE_TITLES, kind_title
from relp_cli.spaces.features import ERROR, sites_of
from relp_cli.spaces.graph import QKV, Graph
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.sites import parse_site
from relp_cli.spaces.units import ANY_POSITION

SHAPES = {
    "resid_pre": "diamond", "resid_dim": "diamond", "mlp_out": "square", "mlp_neuron": "square", "mlp_dim": "square",
    "mlp": "square", "query": "up", "key": "down", "value": "hexagon", "feature_error": "hollow", "metric": "diamond",
    "input": "bar", "logits": "bar",
}  # fmt: skip
TITLES = {"feature_error": "error terms", "metric": "the metric", "mlp": "MLPs", "input": "input", "logits": "logits"}
RISES = {"resid_pre": -0.28, "attn_out": 0.0, "mlp_out": 0.28}  # in the order in which a layer forms them
ALIGNED = 32  # units of a kind that get a column each, where circuits have no positions


@dataclass(frozen=True)
class Grid:
    """marks, of all nodes. rows, columns: their labels. ends: of units that are edges, (source, target, part) of each."""

    marks: list[Mark]
    rows: list[str]
    columns: list[str]
    ends: list[tuple[int, int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Ranked:
    """The units in the page, strongest first. at, unit: position and unit of each. complete: how many of them are the
    strongest of all scores; the others are the circuit's. kept: in the circuit. below: |score| of the strongest not there.
    """

    at: list[int]
    unit: list[int]
    complete: int
    kept: np.ndarray
    below: float
    labels: tuple[str, ...]


def node_grid(scores: Scores, ranked: Ranked) -> Grid:
    """A row per layer; a column per position, or per kind (and head) where there are no positions."""
    units = scores.units
    blocks = [units.block_of(unit) for unit in ranked.unit]
    n_rows = 1 + max(block.layer for block in units.blocks)
    sizes = {block.kind: block.size for block in units.blocks}
    kinds = list(sizes)
    columns: dict[tuple[str, int], int] = {}
    names = list(ranked.labels)
    if ranked.labels == ANY_POSITION:
        spread = [(k, u) for k in kinds for u in (range(sizes[k]) if 1 < sizes[k] <= ALIGNED else (-1,))]
        columns = {key: i for i, key in enumerate(spread)}
        names = [kind_title(k) if u < 0 else f"{k} {u}" for k, u in spread]
    marks = []
    for at, (block, number) in zip(ranked.at, blocks, strict=True):
        alone = block.size == 1
        kind, label = block.kind, ranked.labels[at]
        column = columns.get((kind, number), columns.get((kind, -1), at))
        name = f"{kind}.{block.layer}" + ("" if alone else f".{number}") + ("" if label == "*" else f" @ {label}")
        order = kinds.index(kind) * 10**7 + number
        marks.append(
            Mark(
                name,
                block.layer,
                column,
                kind,
                "" if alone else str(number),
                order,
                rise=RISES.get(kind, 0.0) if alone else 0.0,
            )
        )
    return Grid(marks, [f"layer {i}" for i in range(n_rows)], names)


def feature_grid(scores: Scores, ranked: Ranked) -> Grid:
    """A row per site, a column per position; error terms apart, the metric on top at the last position."""
    sites = list(sites_of(scores.units).sites)
    marks = []
    for at, unit in zip(ranked.at, ranked.unit, strict=True):
        block, number = scores.units.block_of(unit)
        site, label = parse_site(block.name), ranked.labels[at]
        assert site is not None
        error = block.kind == ERROR
        name = f"{block.name}/{'error' if error else number}"
        where = "" if label == "*" else f"@{label}"
        marks.append(
            Mark(
                name + where, sites.index(site), at, block.kind, "ε" if error else str(number), number, error, unit=name
            )
        )
    marks.append(Mark("metric", len(sites), len(ranked.labels) - 1, "metric"))
    rows = [SITE_TITLES[s.kind] + (f" {s.layer}" if s.layer >= 0 else "") for s in sites]
    return Grid(marks, [*rows, "metric"], list(ranked.labels))


def edge_grid(scores: Scores, ranked: Ranked) -> Grid:
    """A row per layer, its MLP above its heads; a column per head and one for MLPs, or per position."""
    graph: Graph = scores.units.structure
    heads, apart = graph.n_heads, ranked.labels == ANY_POSITION
    middle = (heads + 1) // 2
    writer, reader = graph.mask.nonzero().unbind(1)
    numbers: dict[tuple[str, int], int] = {}
    marks: list[Mark] = []

    def node(name: str, at: int) -> int:
        if (name, at) not in numbers:
            numbers[name, at] = len(marks)
            marks.append(_component(name, at, graph, middle if apart else -1, ranked.labels[at]))
        return numbers[name, at]

    ends = []
    for at, unit in zip(ranked.at, ranked.unit, strict=True):
        name, _, part = graph.readers[int(reader[unit])].partition("<")
        assert not part or part[0] in QKV
        ends.append((node(graph.writers[int(writer[unit])], at), node(name, at), part[:1]))
    rows = ["input", *(f"layer {n}" for n in range(graph.n_layers)), "logits"]
    columns = [f"head {h}" for h in range(heads)]
    columns.insert(middle, "MLP")
    return Grid(marks, rows, columns if apart else list(ranked.labels), ends)


def _component(name: str, at: int, graph: Graph, middle: int, label: str) -> Mark:
    """A writer or reader; middle: the MLPs' column, or −1 where columns are positions."""
    full = name if middle >= 0 else f"{name} @ {label}"
    if name in ("input", "logits"):
        row = 0 if name == "input" else graph.n_layers + 1
        return Mark(full, row, BAR if middle >= 0 else at, name, name if middle >= 0 else "", unit=name)
    if name.startswith("m"):
        column = middle if middle >= 0 else at
        return Mark(full, int(name[1:]) + 1, column, "mlp", "m", apart=middle < 0, rise=0.3, unit=name)
    layer, _, head = name[1:].partition(".h")
    column = int(head) + (int(head) >= middle) if middle >= 0 else at
    return Mark(full, int(layer) + 1, column, "head", head, int(head), rise=-0.12, unit=name)


GRIDS: Mapping[str, Callable[[Scores, Ranked], Grid]] = {
    "nodes": node_grid, "edges": edge_grid, "features": feature_grid,
}  # fmt: skip
