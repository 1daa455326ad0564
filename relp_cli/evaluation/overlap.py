"""Comparing circuits: overlap with another or with a published one, correlation of scores, stability over prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relp_cli.circuits.circuit import ANY_POSITION
from relp_cli.errors import RelpError
from relp_cli.evaluation.evaluate import AnyCircuit
from relp_cli.features.circuit import FeatureCircuit
from relp_cli.features.kinds import SCORED
from relp_cli.methods.scores import NodeScores
from relp_cli.selection import select


def overlap(circuit: AnyCircuit, reference: AnyCircuit) -> dict[str, Any]:
    """Jaccard, precision and recall of `circuit` against `reference`, over the node kinds that both have.

    Where one of them is not per position, both are compared without positions (in anywhere = in).
    Raises: RelpError for circuits of different models, shapes or positions, and without a common kind.
    """
    kinds = [k for k in reference.masks if k in circuit.masks]
    features = isinstance(circuit, FeatureCircuit)
    if features != isinstance(reference, FeatureCircuit):
        raise RelpError("a circuit of features and one of other nodes have no node in common")
    if not kinds:
        raise RelpError(f"no node kind in common: {', '.join(circuit.masks)} and {', '.join(reference.masks)}")
    for what, name in (("model", "models"), ("dictionary_hash", "dictionaries")):
        named = {c.meta[what] for c in (circuit, reference) if c.meta.get(what)}
        if len(named) > 1:
            raise RelpError(f"circuits of different {name}: {' and '.join(sorted(named))}")
    anywhere = ANY_POSITION in (circuit.labels, reference.labels)
    if not anywhere and circuit.labels != reference.labels:
        raise RelpError("circuits of different positions cannot be compared node by node")
    mine, theirs = (_flat(c, kinds, anywhere) for c in (circuit, reference))
    if mine.shape != theirs.shape:
        raise RelpError(f"circuits of different shapes: {len(mine)} and {len(theirs)} possible nodes")
    both, either = int((mine & theirs).sum()), int((mine | theirs).sum())
    return {
        "kinds": SCORED if features else "+".join(kinds),
        "positions": "any" if anywhere else "each",
        "n": int(mine.sum()),
        "n_reference": int(theirs.sum()),
        "common": both,
        "jaccard": both / either if either else float("nan"),
        "precision": both / int(mine.sum()) if mine.any() else float("nan"),
        "recall": both / int(theirs.sum()) if theirs.any() else float("nan"),
    }


def _flat(circuit: AnyCircuit, kinds: list[str], anywhere: bool) -> Tensor:
    masks = [circuit.masks[k].any(1) if anywhere else circuit.masks[k] for k in kinds]
    return torch.cat([m.flatten() for m in masks])


def stability(
    scores: Mapping[str, NodeScores], samples: int = 100, seed: int = 0, **selection: Any
) -> tuple[float, dict[str, Tensor]]:
    """Select again from bootstrap resamples of the pairs.

    Returns the mean Jaccard overlap with the full circuit, and per kind the share of resamples that keep each node.
    Raises: RelpError for scores without per-example values.
    """
    if any(s.examples is None for s in scores.values()):
        raise RelpError("stability needs per-example scores; score again with --per-example")
    full = select(scores, **selection)
    n = len(next(iter(scores.values())).present)  # type: ignore[arg-type]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)
    kept = {kind: torch.zeros_like(mask, dtype=torch.float64) for kind, mask in full.masks.items()}
    jaccards = []
    for draw in draws:
        weights = torch.as_tensor(draw, dtype=torch.float32)
        mine = {
            k: _resampled(s, weights) if isinstance(s, NodeScores) else s.resampled(weights) for k, s in scores.items()
        }
        again = select(mine, **selection)
        jaccards.append(overlap(again, full)["jaccard"])
        for kind, mask in again.masks.items():
            kept[kind] += mask / samples
    return float(np.nanmean(jaccards)), kept


def _resampled(scores: NodeScores, weights: Tensor) -> NodeScores:
    assert scores.examples is not None
    assert scores.present is not None
    count = (weights[:, None] * scores.present).sum(0).clamp(min=1)
    total = torch.einsum("n,nlp...->lp...", weights, scores.examples)
    drawn = weights > 0  # what a union over examples looks at
    mean = (total / count.view(1, -1, *([1] * (total.ndim - 2)))).double()
    return replace(scores, mean=mean, examples=scores.examples[drawn], present=scores.present[drawn])
