"""MIB's measures of a ranking of edges, nodes or neurons (Mueller et al. 2025).

1. Units are ranked twice by their scores, summed over positions: from support to opposition, and by size.
2. Circuits: the first ⌊p·n⌋ of a ranking, p from MIB_FRACTIONS; of edges without those that lead nowhere.
3. m(C): the metric with everything outside C replaced by its value on the pair's patch prompt, in every layer; ∅: all of it.
4. f = (m(C) − m(∅)) / (m(M) − m(∅)) of means over pairs. CPR: ∫ f dp of the first ranking, CMD: ∫ |1 − f| dp of the
   second, acc-AUC: accuracy of the first, its mean over ln p. Trapezoids over the ten p; what lies below the first counts 0.
CPR rewards a circuit that overshoots the model (f > 1); acc-AUC does not, and weighs small circuits as much as large ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError
from relp_cli.evaluation.areas import MIB_FRACTIONS
from relp_cli.evaluation.evaluate import Ablating, ablator, check_circuit
from relp_cli.methods.request import Progress
from relp_cli.models.model import Model
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.units import ANY_POSITION
from relp_cli.statistics import interval, resample_counts
from relp_cli.tasks.counted import distinct
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.shared import prompts_of

SPACES_OF_MIB = ("edges", "nodes")
RANKINGS = ("signed", "absolute")


@dataclass(frozen=True)
class Curve:
    """What the circuits of one ranking do. asked: ⌊p·n⌋; kept: what pruning leaves of them, per fraction.

    values, correct: [fraction][pair], the metric, and 1.0 where the answer beats the foil.
    """

    ranking: str
    asked: list[int]
    kept: list[int]
    values: list[list[float]]
    correct: list[list[float]]


@dataclass(frozen=True)
class MibValues:
    """What MIB's measures of one method are made of, pair by pair. full, empty: m(M), m(∅); correct: of M; n_units: n.

    curves: of both rankings; of scores without sign the one by size, which serves both. prompts: each pair's original prompt, by
    which pairs are resampled (None: each has its own, or a file of an older version).
    """

    fractions: list[float]
    n_units: int
    full: list[float]
    empty: list[float]
    correct: list[float]
    curves: list[Curve]
    prompts: list[int] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> MibValues:
        return cls(**{**content, "curves": [Curve(**curve) for curve in content["curves"]]})


def without_positions(scores: Scores) -> Scores:
    """Scores of units at all positions together: the mean over all pairs of the sum over positions. Without variances."""
    if scores.labels == ANY_POSITION:
        return scores
    pairs, total = int(scores.meta.get("n_pairs", scores.n.max())), scores.summed(scores.mean)
    return Scores(
        scores.units,
        ANY_POSITION,
        "all",
        torch.tensor([pairs]),
        total,
        torch.full_like(total, torch.nan),
        meta=scores.meta,
    )


def mib_circuits(scores: Scores, fractions: Sequence[float] = MIB_FRACTIONS) -> dict[str, list[Circuit]]:
    """Ranking → its circuits, one per fraction. Raises RelpError for features."""
    if scores.units.space not in SPACES_OF_MIB:
        raise RelpError(f"MIB measures {' and '.join(SPACES_OF_MIB)}, not {scores.units.space}")
    summed = without_positions(scores)
    more: dict[str, Any] = (
        {"prune": "from_input"} if summed.units.space == "edges" else {}
    )  # nodes do not say what they read
    return {
        ranking: [select(summed, top_k=int(p * len(summed.units)), sign=ranking, **more) for p in fractions]
        for ranking in (RANKINGS if scores.meta.get("signed", True) else RANKINGS[1:])
    }


def mib_values(
    model: Model,
    pairs: Sequence[PairBatch],
    scores: Scores,
    metric: str = "logit_diff",
    fractions: Sequence[float] = MIB_FRACTIONS,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> MibValues:
    """Run the circuits of both rankings on the pairs. A circuit of several rankings or fractions runs once, the whole model
    and the empty circuit are m(M) and m(∅).

    Raises: RelpError for scores of features or of another model, and for pairs without patch prompts.
    """
    if any(batch.several for batch in pairs):
        raise RelpError("MIB's metric and accuracy read single tokens; of answers of several tokens use relp.evaluate")
    rankings = mib_circuits(scores, fractions)
    circuits = [circuit for ranking in rankings.values() for circuit in ranking]
    for circuit in circuits:
        check_circuit(model, circuit, circuits[0])
    run = ablator(model, pairs, circuits, Ablating("counterfactual", 0, batch_size=batch_size))
    row, right = METRICS[metric], METRICS["accuracy"]
    different = {_key(c): c for c in circuits if c.mask.any() and not c.mask.all()}
    found: dict[str, list[Float[Tensor, "2 batch"]]] = {key: [] for key in ("all", "none", *different)}
    done, total, batches = 0, sum(map(len, pairs)), list[PairBatch]()
    for batch, ablated in run.batches():
        with torch.no_grad():
            plain = model.logits(batch.original)

            def outcome(logits: Tensor, batch: PairBatch = batch, plain: Tensor = plain) -> Tensor:
                value = row.fn(logits, batch.answer, batch.foil, plain)
                return torch.stack([value.double(), right.fn(logits, batch.answer, batch.foil).double()]).cpu()

            found["all"].append(outcome(plain))
            found["none"].append(outcome(run.logits(batch, None, ablated)))
            for key, circuit in different.items():
                found[key].append(outcome(run.logits(batch, circuit.mask[circuit.slots(batch)], ablated)))
        done += len(batch)
        if progress:
            progress(done, total, "MIB's circuits")
        batches.append(batch)
    values = {key: torch.cat(parts, 1).tolist() for key, parts in found.items()}
    curves = [
        Curve(
            ranking,
            [int(p * len(scores.units)) for p in fractions],
            [c.n_nodes for c in chosen],
            [values[_key(c)][0] for c in chosen],
            [values[_key(c)][1] for c in chosen],
        )
        for ranking, chosen in rankings.items()
    ]
    (full, correct), (empty, _) = values["all"], values["none"]
    return MibValues(list(fractions), len(scores.units), full, empty, correct, curves, prompts_of(batches).tolist())


def _key(circuit: Circuit) -> str:
    if circuit.mask.all():
        return "all"
    return hashlib.sha256(circuit.mask.numpy().tobytes()).hexdigest() if circuit.mask.any() else "none"


def mib_measures(values: MibValues, seed: int = 0, bootstrap: int = 1000) -> tuple[dict[str, Any], pd.DataFrame]:
    """CPR, CMD, acc_auc with `_lo`, `_hi` (95 % bootstrap over pairs), F_M, F_empty, accuracy (the model's), n_pairs, note;
    and the curves: a row per ranking and fraction. Ratios are NaN where m(M) = m(∅).
    """
    full, empty = np.array(values.full), np.array(values.empty)
    n, p, prompts = len(full), np.array(values.fractions), np.array(values.prompts or range(len(full)))
    draws = np.vstack([np.ones(n), resample_counts(n, bootstrap, seed, prompts)])
    draws = draws / draws.sum(1, keepdims=True)  # the first is the pairs as they are
    gaps, note = draws @ (full - empty), ""
    if abs(gaps[0]) <= 1e-6 * max(abs(full.mean()), abs(empty.mean()), 1e-12):
        gaps, note = np.full_like(gaps, np.nan), "ill-posed: m(M) = m(∅)"
    elif np.prod(interval(gaps[1:])) <= 0:
        note = "m(M) − m(∅) is not distinguishable from 0"
    rows, ratios, accuracies = [], {}, {}
    for curve in values.curves:
        with np.errstate(divide="ignore", invalid="ignore"):
            f = (draws @ (np.array(curve.values) - empty).T) / gaps[:, None]
        share = draws @ np.array(curve.correct).T
        ratios[curve.ranking], accuracies[curve.ranking] = f, share
        low, high = _interval(f)
        rows += [
            {
                "ranking": curve.ranking, "fraction": p[i], "n_asked": curve.asked[i], "n_kept": curve.kept[i],
                "n_possible": values.n_units, "F_C": float(np.mean(curve.values[i])), "faithfulness": f[0, i],
                "faithfulness_lo": low[i], "faithfulness_hi": high[i], "accuracy": float(np.mean(curve.correct[i])),
            }
            for i in range(len(p))
        ]  # fmt: skip
    by_support, by_size = (values.curves[i].ranking for i in (0, -1))
    measures = {
        "CPR": np.trapezoid(ratios[by_support], p),
        "CMD": np.trapezoid(np.abs(1 - ratios[by_size]), p),
        "acc_auc": np.trapezoid(accuracies[by_support], np.log(p)) / np.log(p[-1] / p[0]),
    }
    summary: dict[str, Any] = {}
    for name, drawn in measures.items():
        low, high = _interval(drawn)
        summary |= {name: float(drawn[0]), f"{name}_lo": float(low), f"{name}_hi": float(high)}
    summary |= {"F_M": full.mean(), "F_empty": empty.mean(), "accuracy": np.mean(values.correct), "n_pairs": n}
    summary["n_prompts"] = distinct(prompts)
    return summary | {"note": note}, pd.DataFrame(rows)


def _interval(drawn: np.ndarray) -> np.ndarray:
    """(low, high) of what was drawn; the first row is no draw. NaN where all is."""
    if np.isnan(drawn).all():
        return np.full((2, *drawn.shape[1:]), np.nan)
    return interval(drawn[1:])


def mib(
    model: Model, pairs: Sequence[PairBatch], scores: Any, seed: int = 0, bootstrap: int = 1000, **options: Any
) -> tuple[dict[str, Any], pd.DataFrame]:
    """`mib_measures` of scores (or a view of them) on held-out pairs; options: as `mib_values`."""
    return mib_measures(mib_values(model, pairs, scores.whole, **options), seed, bootstrap)
