"""Several mechanisms in one data set: pairs whose scores point in different directions get circuits of their own.

1. A pair's scores are summed over positions: a mechanism is which units matter, wherever a prompt has its words.
2. `clustering.groups_of` says how many groups there are.
3. One circuit per group, without positions, from the mean scores of its pairs.
4. Cross-faithfulness: the circuit of each group's even pairs (0, 2, …) on the odd pairs of each group; where pairs share original
   prompts, of its even and odd prompts, so that no prompt is on both sides. Mechanisms that differ have circuits that serve
   their own pairs alone; rows that are alike say that the groups differ in something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError
from relp_cli.evaluation.evaluate import evaluate
from relp_cli.methods.request import Progress
from relp_cli.models.model import Model
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.tasks.pairs import PairBatch


def unit_scores(scores: Scores) -> Float[np.ndarray, "example unit"]:
    """Every pair's scores, summed over positions, of the units that are not 0 everywhere.

    Raises: RelpError for scores without single examples.
    """
    if scores.examples is None:
        raise RelpError("clusters need per-example scores; score again with --per-example")
    units, at = torch.unique(scores.cells % len(scores.units), return_inverse=True)
    out = torch.zeros(len(scores.examples), len(units), dtype=torch.float64)
    return out.index_add_(1, at, scores.examples.double()).numpy()


def circuits_of_groups(
    scores: Scores, labels: Int[np.ndarray, " example"], how: Mapping[str, Any], even: bool = False
) -> list[Circuit]:
    """Each group's circuit, without positions, from its pairs (even: of its even prompts alone). how: keywords of `select`."""
    circuits = []
    for group in range(int(labels.max()) + 1):
        kept = torch.zeros(len(labels), dtype=torch.bool)
        kept[members_of(scores, labels, group, 0 if even else None)] = True
        circuits.append(select(scores.among(kept), aggregate="sum", **how))
    return circuits


def members_of(
    scores: Scores, labels: Int[np.ndarray, " example"], group: int, half: int | None = None
) -> Int[np.ndarray, " member"]:
    """The pairs of a group. half: those of its even (0) or odd (1) prompts alone."""
    members: np.ndarray = np.flatnonzero(labels == group)
    if half is None:
        return members
    prompts = members if scores.prompts is None else scores.prompts[members]
    return members[np.unique(prompts, return_inverse=True)[1] % 2 == half]


def checked_sizes(scores: Scores, labels: Int[np.ndarray, " example"]) -> Int[np.ndarray, " group"]:
    """How many pairs each group has. Raises: RelpError for one of a single pair, or of a single prompt."""
    sizes: np.ndarray = np.bincount(labels)
    for group in range(len(sizes)):
        if not len(members_of(scores, labels, group, 1)):
            of = "pair" if sizes[group] == 1 else "prompt"
            raise RelpError(f"a cluster of one {of} leaves none to evaluate its circuit on; ask for fewer clusters")
    return sizes


def cross_faithfulness(
    model: Model,
    pairs: Sequence[PairBatch],
    scores: Scores,
    labels: Int[np.ndarray, " example"],
    how: Mapping[str, Any],
    metric: str | None = None,
    dictionary: Any = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """One row per circuit and group of pairs: `circuit`, `pairs` (numbers of groups, from 1), and `evaluate`'s columns.

    pairs: those that were scored, in the order of the scores' examples.
    Raises: RelpError for groups of fewer than two pairs or prompts: none would be left to evaluate on.
    """
    sizes = checked_sizes(scores, labels)
    circuits = circuits_of_groups(scores, labels, how, even=True)
    tables = []
    for group in range(len(sizes)):
        own = batches_of(pairs, members_of(scores, labels, group, 1))
        table = evaluate(
            model, own, circuits, metric=metric, dictionary=dictionary, batch_size=batch_size, progress=progress
        )
        table.insert(0, "pairs", group + 1)
        table.insert(0, "circuit", range(1, len(circuits) + 1))
        tables.append(table)
    return pd.concat(tables, ignore_index=True).sort_values(["circuit", "pairs"], ignore_index=True)


def batches_of(pairs: Sequence[PairBatch], rows: Int[np.ndarray, " row"]) -> list[PairBatch]:
    """The pairs of these numbers, counted through all batches."""
    out, start = [], 0
    for batch in pairs:
        own = rows[(rows >= start) & (rows < start + len(batch))] - start
        if len(own):
            out.append(batch.rows(torch.from_numpy(own)))
        start += len(batch)
    return out
