"""Scores as a table of units: the largest, all, or those of a circuit."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import space_of
from relp_cli.spaces.units import ANY_POSITION

COLUMNS = ["kind", "layer", "position", "unit", "score", "se", "n"]


def top_units(scores: Any, k: int = 10) -> pd.DataFrame:
    """The k units with the largest |mean score|: kind, layer (of features: the site), position, unit (missing for vector
    nodes and error terms), score, se (standard error over the pairs that have the position), n. Edges are named where nodes
    have a position, and stand under their reader's layer (logits: the number of layers).
    """
    scores = scores.whole  # of a view too
    table = unit_table(scores, _strongest_first(scores)[:k])
    named = table.unit.map(lambda unit: isinstance(unit, str)).to_numpy(dtype=bool)
    where = table.unit.where(table.position == "*", table.unit.astype(str) + " @ " + table.position)
    table["position"] = table.position.where(~named, where)
    table["unit"] = table.unit.where(~named, None)
    return table.astype({"unit": "Int64"})


def unit_table(scores: Scores, columns: Int[Tensor, " column"] | None = None) -> pd.DataFrame:
    """A row per column of the scores (all of them, in the order of cells): as `top_units`, but `unit` of an edge is its name.
    Cells without a column, which are 0 in every example (of features), have no row.
    """
    units, space = scores.units, space_of(scores.units)
    columns = torch.arange(len(scores.mean)) if columns is None else columns
    cells = scores.cells[columns]
    at, which = cells // len(units), (cells % len(units)).tolist()
    known = {unit: space.row(units, unit, "") for unit in set(which)}
    n = scores.n[at]
    error = (scores.variance[columns].double() / n).sqrt().masked_fill(n < 2, torch.nan)
    return pd.DataFrame(
        {
            **{name: [known[unit][name] for unit in which] for name in ("kind", "layer")},
            "position": [scores.labels[i] for i in at.tolist()],
            "unit": pd.Series([known[unit]["unit"] for unit in which], dtype=object),
            "score": scores.mean[columns].double().numpy(),
            "se": error.numpy(),
            "n": n.numpy(),
        },
        columns=COLUMNS,
    )


def in_circuit(scores: Scores, circuit: Circuit) -> Bool[Tensor, " column"]:
    """Which columns of the scores a circuit keeps that was selected from them, or from some of their kinds.

    Raises: RelpError for a circuit of other positions.
    """
    if circuit.labels not in (scores.labels, ANY_POSITION):
        raise RelpError(
            f"the circuit's positions are {', '.join(circuit.labels)}, the scores' {', '.join(scores.labels)}"
        )
    units, start = scores.units, dict(zip(scores.units.blocks, scores.units.starts, strict=False))
    kept = torch.zeros(len(scores.labels), len(units), dtype=torch.bool)
    for block, at in zip(circuit.units.blocks, circuit.units.starts, strict=False):
        kept[:, start[block] : start[block] + block.size] = circuit.mask[:, at : at + block.size]
    return kept.flatten()[scores.cells]


def circuit_table(scores: Scores, circuit: Circuit) -> pd.DataFrame:
    """The kept units, strongest first, as `unit_table`; of a circuit without positions a row per unit, whose score is the sum
    over positions (as it was selected) and has no standard error.
    """
    kept, order = in_circuit(scores, circuit), _strongest_first(scores)
    table = unit_table(scores, order[kept[order]])
    if circuit.labels == scores.labels:
        return table
    share = dict(zip(scores.labels, scores.shares.tolist(), strict=True))
    table["score"] *= table.position.map(share).astype(float)
    summed = table.groupby(["kind", "layer", "unit"], sort=False, dropna=False, as_index=False)
    table = summed.agg(score=("score", "sum"), n=("n", "max")).assign(position="*", se=float("nan"))
    table["unit"] = pd.Series([None if unit != unit else unit for unit in table.unit.tolist()], dtype=object)
    if not table.unit.map(lambda unit: isinstance(unit, str)).any():
        table = table.astype({"unit": "Int64"})
    return table.sort_values("score", key=abs, ascending=False, kind="stable", ignore_index=True)[COLUMNS]


def strongest(scores: Scores, n: int) -> pd.DataFrame:
    """The first n rows of `unit_table` by |score|. Raises RelpError unless n is from 1 up."""
    return unit_table(scores, _strongest_first(scores)[: _count(n)])


def strongest_kept(circuit: Circuit, scores: Any, n: int) -> pd.DataFrame:
    """The first n rows of `circuit_table`. Raises RelpError for scores of other positions, and unless n is from 1 up."""
    return circuit_table(scores.whole, circuit).head(_count(n))


def kept_units(circuit: Circuit) -> pd.DataFrame:
    """A row per kept unit and position, in the order of positions: kind, layer, position, unit (as `unit_table`)."""
    space = space_of(circuit.units)
    rows = [space.row(circuit.units, unit, circuit.labels[at]) for at, unit in circuit.mask.nonzero().tolist()]
    columns = {name: pd.Series([row[name] for row in rows], dtype=object) for name in COLUMNS[:4]}
    return pd.DataFrame(columns)


def _count(n: Any) -> int:
    if not isinstance(n, int) or n < 1:
        raise RelpError(f"expected a number of units from 1 up, got {n!r}")
    return n


def _strongest_first(scores: Scores) -> Int[Tensor, " column"]:
    """Columns by |mean score|; of those that tie, the first in the order of cells."""
    sizes, units = scores.mean.double().abs().nan_to_num(0), scores.units
    by_place = units.rank(scores.positions, scores.cells % len(units), len(scores.labels)).argsort()
    return by_place[sizes[by_place].argsort(descending=True, stable=True)]
