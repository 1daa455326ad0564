"""What a circuit depends on: the variance of faithfulness over a full grid of settings, and what all settings agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from relp_cli.errors import RelpError
from relp_cli.spaces.circuit import Circuit

REST = "interactions and rest"


def variance_table(values: np.ndarray, factors: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """How much of the variance of `values` each factor accounts for on its own (η² of a balanced analysis of variance).

    values: Float[level of factor 1, level of factor 2, …]. factors: name → its levels, in the order of the axes.
    One row per factor of several levels: levels, share = Σ (mean of level − mean)²·(settings of level) / Σ (value − mean)², the
    share that a factor without any effect has on average, (levels − 1)/(settings − 1), and the levels with the lowest and the
    highest mean. The last row is what no factor explains alone; shares add up to 1 (NaN where nothing varies).
    Raises: RelpError for settings without a value.
    """
    if not np.isfinite(values).all():
        raise RelpError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} settings have no faithfulness (F(M) = F(∅)): no variance table"
        )
    deviations = values - values.mean()
    total, rows, left = float((deviations**2).sum()), [], 1.0
    for axis, (name, levels) in enumerate(factors.items()):
        means = values.mean(axis=tuple(i for i in range(values.ndim) if i != axis))
        if len(levels) == 1:
            continue
        between = float(((means - values.mean()) ** 2).sum()) * values.size / len(levels)
        share = between / total if total > 0 else np.nan
        low, high = int(means.argmin()), int(means.argmax())
        rows.append(
            {"factor": name, "levels": len(levels), "share": share, "by_chance": (len(levels) - 1) / (values.size - 1),
             "lowest": levels[low], "lowest_mean": float(means[low]), "highest": levels[high], "highest_mean": float(means[high])}
        )  # fmt: skip
        left -= share
    table = pd.DataFrame([*rows, {"factor": REST, "share": left if total > 0 else np.nan}])
    return table.assign(levels=pd.Series([*(row["levels"] for row in rows), None], dtype=object))


def consensus(circuits: Sequence[Circuit], share: float, meta: Mapping[str, Any]) -> Circuit:
    """The units that at least this share of the circuits keep, of those that have the position at all.

    Its positions are all that the circuits have, in the order in which they come. Raises RelpError for circuits of different
    units.
    """
    units = circuits[0].units
    if any(c.units != units for c in circuits):
        raise RelpError("a consensus needs circuits of the same units")
    labels = tuple(dict.fromkeys(label for c in circuits for label in c.labels))
    kept = torch.zeros(len(labels), len(units))
    of = torch.zeros(len(labels), 1)
    for c in circuits:
        at = torch.tensor([labels.index(label) for label in c.labels])
        kept[at] += c.mask
        of[at] += 1
    mask = kept >= share * of - 1e-6
    selection = {"consensus": share, "circuits": len(circuits)}
    return replace(circuits[0], mask=mask, labels=labels, meta={**meta, "selection": selection}, edges=None)
