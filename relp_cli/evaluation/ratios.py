"""Faithfulness and completeness as ratios of means over pairs, with intervals that resample prompts, for circuits of any sort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from relp_cli.statistics import interval, resample_counts
from relp_cli.tasks.counted import distinct
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.parts import of_pairs
from relp_cli.tasks.shared import prompts_of

COLUMNS = (
    "tau", "n_nodes", "n_possible", "faithfulness", "faithfulness_lo", "faithfulness_hi",
    "completeness", "completeness_lo", "completeness_hi", "random_faithfulness", "random_completeness",
    "F_M", "F_C", "F_complement", "F_empty", "n_pairs", "n_prompts", "metric", "ablation", "exclude_layers", "note",
)  # fmt: skip


def ratio_table(
    values: Values, about: Sequence[Mapping[str, Any]], random_circuits: int, seed: int, bootstrap: int
) -> pd.DataFrame:
    """One row per circuit: its ratios, `about` it, and the mean ratios of its random circuits, which stand in `values`
    after all circuits, `random_circuits` each.
    """
    draws = resample_counts(values.n, bootstrap, seed, values.prompts)
    rows = []
    for i, more in enumerate(about):
        out = ratio_row(values, i, draws)
        note = "; ".join(n for n in (out["note"], more.get("note", "")) if n)
        if random_circuits:
            first = len(about) + i * random_circuits
            baseline = [ratio_row(values, first + j, draws[:1]) for j in range(random_circuits)]
            for name in ("faithfulness", "completeness"):
                out[f"random_{name}"] = float(np.mean([b[name] for b in baseline]))
        rows.append({**out, **more, "note": note})
    return pd.DataFrame(rows)[[c for c in COLUMNS if c in rows[0]]]


def tau_of(meta: Mapping[str, Any]) -> float | None:
    """The threshold that keeps a circuit's units and no others of these scores; None where there is none."""
    selection = meta.get("selection", {})
    by_count = selection.get("greedy") and selection.get("threshold") is None
    if "ties" in selection or selection.get("connected") or by_count:
        return None
    tau: float | None = selection.get("tau")
    return tau


def ties_note(meta: Mapping[str, Any]) -> str:
    """Why a circuit has no threshold, where units that were left out score as much as the last that was kept."""
    selection = meta.get("selection", {})
    if "ties" not in selection:
        return ""
    at = f" {selection['tied_at']:g}" if "tied_at" in selection else ""  # older files do not say it
    return f"no τ keeps just these: {selection['ties']} more score{at} too"


class Values:
    """Metric values per pair: F(M), F(∅) and, per circuit, F(C) and F(M∖C); each Float[n].

    prompts: Int[n], the pairs' original prompts, by which they are resampled (None: each has its own).
    """

    prompts: np.ndarray | None = None

    def __init__(self, n_circuits: int) -> None:
        self._parts: dict[str, list[list[Tensor]]] = {"full": [[]], "empty": [[]]}
        self._parts |= {name: [[] for _ in range(n_circuits)] for name in ("circuit", "complement")}

    def add(self, name: str, i: int, value: Tensor) -> None:
        self._parts[name][i].append(value.double().cpu())

    def get(self, name: str, i: int = 0) -> np.ndarray:
        return torch.cat(self._parts[name][i]).numpy()

    def of_pairs(self, parts: Sequence[PairBatch]) -> None:
        """All values added are of the rows of these parts, in order: from now on they are of pairs, whose prompts are known."""
        self.prompts = prompts_of(parts)
        self._parts = {
            name: [[of_pairs(torch.cat(rows), parts)] if rows else rows for rows in lists]
            for name, lists in self._parts.items()
        }

    def of_prompts(self) -> None:
        """From now on values are means over the pairs of each prompt: as they were, where no two pairs share one."""
        if self.prompts is None or self.n_prompts == self.n:
            return
        of, size = torch.from_numpy(self.prompts), torch.from_numpy(np.bincount(self.prompts))
        self._parts = {
            name: [
                [torch.cat(v).new_zeros(len(size)).index_add_(0, of, torch.cat(v)) / size] if v else v for v in lists
            ]
            for name, lists in self._parts.items()
        }
        self.prompts = None

    @property
    def n(self) -> int:
        return len(self.get("full"))

    @property
    def n_prompts(self) -> int:
        return self.n if self.prompts is None else distinct(self.prompts)


def ratio_row(values: Values, i: int, draws: np.ndarray) -> dict[str, Any]:
    """F(M), F(∅), F(C), F(M∖C) of circuit i and the two ratios; draws: how often each pair is in each resample."""
    full, empty = values.get("full"), values.get("empty")
    parts = {"faithfulness": values.get("circuit", i), "completeness": values.get("complement", i)}
    out: dict[str, Any] = {
        "F_M": full.mean(),
        "F_empty": empty.mean(),
        "F_C": parts["faithfulness"].mean(),
        "F_complement": parts["completeness"].mean(),
        "n_pairs": len(full),
        "n_prompts": values.n_prompts,
        "note": "",
    }
    gap = full.mean() - empty.mean()
    gaps = draws @ (full - empty) / len(full)
    if abs(gap) <= 1e-6 * max(abs(full.mean()), abs(empty.mean()), 1e-12):
        out["note"] = "ill-posed: F(M) = F(∅)"
        return out | {f"{n}{end}": float("nan") for n in parts for end in ("", "_lo", "_hi")}
    low, high = interval(gaps)
    if low <= 0 <= high:
        out["note"] = "F(M) − F(∅) is not distinguishable from 0"
    for name, part in parts.items():
        out[name] = (part.mean() - empty.mean()) / gap
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = (draws @ (part - empty) / len(full)) / gaps
        out[f"{name}_lo"], out[f"{name}_hi"] = map(float, interval(ratios))
    return out
