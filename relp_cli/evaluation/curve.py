"""Faithfulness of edge circuits at MIB's fractions of edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from relp_cli.evaluation.areas import MIB_FRACTIONS, areas
from relp_cli.evaluation.evaluate import evaluate
from relp_cli.models.model import Model
from relp_cli.selection import select
from relp_cli.spaces.edges import EdgeScores
from relp_cli.tasks.pairs import PairBatch


def edge_curve(
    model: Model,
    pairs: Sequence[PairBatch],
    scores: EdgeScores,
    fractions: Sequence[float] = MIB_FRACTIONS,
    greedy: bool = False,
    prune: str = "none",
    **options: Any,
) -> tuple[pd.DataFrame, float, float]:
    """Faithfulness of the ⌊fraction · edges⌋ first edges, and MIB's (CPR, CMD) over the fractions asked for: CPR of the
    edges ranked from support to opposition, CMD of those ranked by |score|.

    greedy, prune: as `relp.select`; options: as `relp.evaluate`. The table gets two first columns, `ranking` ("signed",
    "absolute"; only the latter for scores without sign, which serves both) and `fraction`.
    """
    rankings = ("signed", "absolute") if scores.meta.get("signed", True) else ("absolute",)
    points = [(sign, f) for sign in rankings for f in fractions]
    circuits = []
    for sign, f in points:
        circuit = select(scores, top_k=int(f * scores.n_edges), greedy=greedy, prune=prune, sign=sign)
        circuits.append(replace(circuit, meta={**circuit.meta, "fraction": f}))
    table = evaluate(model, pairs, circuits, **options)
    table.insert(0, "fraction", [f for _, f in points])
    table.insert(0, "ranking", [sign for sign, _ in points])
    faithful = [table[table.ranking == sign].faithfulness.tolist() for sign in (rankings[0], rankings[-1])]
    return table, areas(list(fractions), faithful[0])[0], areas(list(fractions), faithful[1])[1]
