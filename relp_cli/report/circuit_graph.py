"""The circuit as an interactive graph: what the page's script draws of scores, circuit and evaluation, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from relp_cli.report.digest import of_all_kinds
from relp_cli.report.graph_grids import GRIDS, SHAPES, TITLES, Grid, Ranked
from relp_cli.report.graph_places import as_columns, layout, placed
from relp_cli.report.names import kind_title
from relp_cli.report.page import render
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import SPACES
from relp_cli.spaces.top import in_circuit
from relp_cli.spaces.units import ANY_POSITION

SCRIPTS = ("graph_draw", "graph_card", "graph_steer")  # each uses those before it
MOST, MOST_LINES = 10_000, 2_000  # units in the page, where these are nodes and where they are edges
Examples = Mapping[str, Sequence[Sequence[str | None]]]


def graph_section(
    scores: Mapping[str, Scores],
    circuit: Circuit | None = None,
    evaluation: pd.DataFrame | None = None,
    examples: Examples | None = None,
    meanings: pd.DataFrame | None = None,
    sweep: pd.DataFrame | None = None,
) -> str:
    """The graph's part of a page: markup, style, data and script, of its own; "" for scores without a unit.

    scores: method → Scores; the first is what is drawn and cut, a node's card has the others' beside it.
    examples: position label → up to a few (clean token, corrupted token). meanings: node (without position) and meaning.
    sweep: of the scores, beside an evaluation that is of the circuit.
    """
    data = graph_data(scores, circuit, evaluation, examples, meanings, sweep)
    if not data["units"]["score"]:
        return ""
    across = "positions" if data["positions"] else "heads and kinds"
    return render("circuit_graph.html.j2", data, SCRIPTS, noun=data["noun"], across=across)


def graph_data(
    scores: Mapping[str, Scores],
    circuit: Circuit | None = None,
    evaluation: pd.DataFrame | None = None,
    examples: Examples | None = None,
    meanings: pd.DataFrame | None = None,
    sweep: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """Plain data for JSON. Units are strongest first: nodes, or the edges between them.

    units:   score, se (None where it is not known), n, kept; of edges, u, v (nodes) and part ("q", "k", "v" or ""). of: how many
             units there are; complete: the first so many are all with |score| > below.
    layouts: where nodes stand, with all of them and, at positions, with the circuit's alone.
    nodes:   names and kinds; of units that are nodes the first ones are the units, in their order.
    links:   edges between units that are nodes, where the circuit has some: u, v, score, se, n.
    methods: the other methods' scores of the same units. curve: evaluated circuits, each with how many units have |score| > τ.
    """
    own = next(iter(scores.values()))
    tables = [evaluation] if sweep is None or sweep is evaluation else [evaluation, sweep]
    mean, variance, n = _dense(own, circuit)
    labels = own.labels if len(mean) == len(own.labels) else ANY_POSITION
    ranked = _ranked(own, mean, labels, circuit, MOST_LINES if own.units.space == "edges" else MOST)
    grid = GRIDS[own.units.space](own, ranked)
    links = _links(circuit, grid)
    kinds = list(dict.fromkeys(mark.kind for mark in grid.marks))
    layouts = {"all": layout(placed(grid.marks, len(grid.rows), len(grid.columns)))}
    if labels != ANY_POSITION and ranked.kept.any():
        layouts["circuit"] = layout(
            placed(grid.marks, len(grid.rows), len(grid.columns), _inside(grid, ranked), empty=0.5)
        )
    where = (torch.tensor(ranked.at, dtype=torch.long), torch.tensor(ranked.unit, dtype=torch.long))
    return {
        "noun": SPACES[own.units.space].noun,
        "edges": own.units.space == "edges",
        "positions": labels != ANY_POSITION,
        "of": mean.numel(),
        "complete": ranked.complete,
        "below": _short(ranked.below),
        "rows": grid.rows,
        "columns": [
            {"label": "" if label == "*" else label, "tokens": list((examples or {}).get(label, ()))} for label in grid.columns
        ],
        "layouts": layouts,
        "kinds": [{"name": k, "title": TITLES.get(k) or kind_title(k), "shape": SHAPES.get(k, "circle")} for k in kinds],
        "nodes": as_columns(grid.marks, kinds),
        "units": {
            "score": _numbers(mean[where]),
            "se": _errors(variance, n, where),
            "n": n[where[0]].tolist(),
            "kept": [int(v) for v in ranked.kept],
            **{name: [end[i] for end in grid.ends] for i, name in enumerate(("u", "v", "part")) if grid.ends},
        },
        "links": links,
        "methods": [_method(name, other, own, circuit, where) for name, other in [*scores.items()][1:]],
        "own": next(iter(scores)),
        "curve": [row for t in tables for row in _curve(t, own, mean if labels == own.labels else None, circuit)],
        "circuit": _circuit(circuit, ranked),
        "meanings": _meanings(meanings, grid),
        "direction": str(own.meta.get("direction", "noising")),
        "metric": str(own.meta.get("metric", "the metric")),
        "signed": bool(own.meta.get("signed", True)),
    }  # fmt: skip


def _dense(scores: Scores, circuit: Circuit | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """mean[pos, unit], variance (None: not known) and n[pos]; added up over positions where the circuit has none."""
    mean = scores.dense(scores.mean.double()).nan_to_num(0.0)
    if circuit is None or circuit.labels == scores.labels:
        return mean, scores.dense(scores.variance.double()), scores.n
    return scores.summed(scores.mean.nan_to_num(0.0))[None], None, scores.n.max()[None]


def _ranked(scores: Scores, mean: Tensor, labels: tuple[str, ...], circuit: Circuit | None, most: int) -> Ranked:
    strengths = mean.abs().flatten()
    kept = torch.zeros_like(strengths, dtype=torch.bool)
    if circuit is not None:
        per_cell = torch.zeros(scores.n_nodes, dtype=torch.bool)
        per_cell[scores.cells[in_circuit(scores, circuit)]] = True
        per_cell = per_cell.unflatten(0, (len(scores.labels), len(scores.units)))
        kept = (per_cell if len(mean) == len(scores.labels) else per_cell.any(0, keepdim=True)).flatten()
    order = strengths.argsort(descending=True, stable=True)
    order = order[(strengths[order] > 0) | kept[order]]
    complete = min(most, int((strengths > 0).sum()))
    rest = order[complete:]
    chosen = torch.cat([order[:complete], rest[kept[rest]][:most]])
    below = float(strengths[rest].max()) if len(rest) else 0.0
    at, unit = chosen // len(scores.units), chosen % len(scores.units)
    return Ranked(at.tolist(), unit.tolist(), complete, kept[chosen].numpy(), below, labels)


def _inside(grid: Grid, ranked: Ranked) -> list[int]:
    """The circuit's nodes, in the order of strength; of edges those at their ends, else its units and what is no unit."""
    if grid.ends:
        return sorted({node for end, kept in zip(grid.ends, ranked.kept, strict=True) if kept for node in end[:2]})
    return [i for i in range(len(grid.marks)) if i >= len(ranked.kept) or ranked.kept[i]]


def _links(circuit: Circuit | None, grid: Grid) -> dict[str, Any] | None:
    """A feature circuit's edges, between marks."""
    if circuit is None or circuit.edges is None:
        return None
    number = {mark.name: i for i, mark in enumerate(grid.marks)}
    edges = circuit.edges.strongest(len(circuit.edges))
    shown = torch.tensor([u in number and v in number for u, v in edges.names()], dtype=torch.bool)
    names = [(number[u], number[v]) for (u, v), here in zip(edges.names(), shown.tolist(), strict=True) if here]
    error = (edges.variance / edges.n).sqrt()
    return {
        "u": [u for u, _ in names], "v": [v for _, v in names], "score": _numbers(edges.mean[shown]),
        "se": _numbers(error[shown], 4), "n": edges.n[shown].tolist(), "of": len(edges),
        "threshold": _short(float(edges.meta.get("threshold", 0.0))),
    }  # fmt: skip


def _method(name: str, other: Scores, own: Scores, circuit: Circuit | None, where: Any) -> dict[str, Any]:
    """Another method's scores of the same units; null where it has none (another kind, other positions)."""
    blocks = dict(zip(other.units.blocks, other.units.starts, strict=False))
    mean, variance, n = _dense(other, circuit)
    unit = torch.full((len(own.units),), -1)
    for block, start in zip(own.units.blocks, own.units.starts, strict=False):
        if block in blocks:
            unit[start : start + block.size] = torch.arange(blocks[block], blocks[block] + block.size)
    same = other.labels == own.labels
    at, theirs = where[0], unit[where[1]]
    known = (theirs >= 0) & same
    cell = (at.where(known, torch.zeros_like(at)), theirs.clamp(min=0))
    score, error = _numbers(mean[cell]), _errors(variance, n, cell)
    return {
        "name": name,
        "score": [v if k else None for v, k in zip(score, known.tolist(), strict=True)],
        "se": None if error is None else [v if k else None for v, k in zip(error, known.tolist(), strict=True)],
    }


def _curve(
    table: pd.DataFrame | None, scores: Scores, mean: Tensor | None, circuit: Circuit | None
) -> list[dict[str, Any]]:
    """Evaluated circuits, largest τ first. kept: how many units have |score| > τ; None where that is not what was evaluated (a
    circuit, some kinds alone, other positions, ties that a count cut, error terms that were removed).

    own: whether the row is of the run's circuit, which a table says that is of one.
    """
    names = ("tau", "n_nodes", "n_possible", "faithfulness", "faithfulness_lo", "faithfulness_hi", "completeness",
             "completeness_lo", "completeness_hi", "n_pairs", "n_prompts", "exclude_layers")  # fmt: skip
    if table is None or not {"n_nodes", "n_possible", "faithfulness", "completeness"} <= {*table.columns}:
        return []
    strengths = None if mean is None or "circuit" in table or not of_all_kinds(table, scores.units) else mean.abs()
    rows = []
    for row in table.to_dict("records"):
        entry: dict[str, Any] = {name: _plain(row.get(name)) for name in names}
        entry["ablation"] = str(row.get("ablation", ""))
        entry["own"] = circuit is not None and row.get("circuit") == circuit.hash
        entry["kept"] = None
        if strengths is not None and entry["tau"] is not None:
            above = strengths > float(row["tau"])
            if int(above[:, scores.units.counted(int(entry["exclude_layers"] or 0))].sum()) == entry["n_nodes"]:
                entry["kept"] = int(above.sum())
        rows.append(entry)
    return sorted(rows, key=lambda r: -(r["tau"] or 0))


def _circuit(circuit: Circuit | None, ranked: Ranked) -> dict[str, Any] | None:
    if circuit is None:
        return None
    selection = circuit.meta.get("selection") or {}
    how = {
        k: v
        for k, v in selection.items()
        if v not in (None, False, "none", 0, "absolute") and k not in ("tau", "errors")
    }
    return {
        "n": circuit.n_nodes, "of": circuit.n_possible, "shown": int(ranked.kept.sum()),
        "selection": ", ".join(f"{k} = {v:g}" if isinstance(v, float) else f"{k} = {v}" for k, v in how.items()),
    }  # fmt: skip


def _meanings(table: pd.DataFrame | None, grid: Grid) -> dict[int, str]:
    if table is None:
        return {}
    said = dict(zip(table["node"], table["meaning"], strict=True))
    return {i: said[mark.unit] for i, mark in enumerate(grid.marks) if mark.unit in said}


def _numbers(values: Tensor, digits: int = 9) -> list[float | None]:
    return [_short(value, digits) if math.isfinite(value) else None for value in values.double().tolist()]


def _errors(variance: Tensor | None, n: Tensor, where: Any) -> list[float | None] | None:
    """Standard errors; None where one pair alone was scored."""
    if variance is None:
        return None
    of = n[where[0]]
    return _numbers((variance[where] / of).sqrt().masked_fill(of < 2, math.nan), 4)


def _plain(value: Any) -> float | int | None:
    if value is None or value is pd.NA or value != value:
        return None
    return _short(float(value)) if isinstance(value, float) else int(value)


def _short(value: float, digits: int = 9) -> float:
    return float(f"{value:.{digits}g}")
