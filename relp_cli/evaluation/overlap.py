"""Comparing circuits: overlap with another or with a published one, correlation of scores, stability over prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import SPACES
from relp_cli.spaces.units import ANY_POSITION
from relp_cli.statistics import resample_counts


def overlap(circuit: Circuit, reference: Circuit) -> dict[str, Any]:
    """Jaccard, precision and recall of `circuit` against `reference`, over the node kinds that both have.

    Where one of them is not per position, both are compared without positions (in anywhere = in).
    Raises: RelpError for circuits of different models, shapes or positions, and without a common kind.
    """
    if circuit.units.space != reference.units.space:
        raise RelpError(f"a circuit of {circuit.units.space} and one of {reference.units.space} have no node in common")
    masks, reference_masks = circuit.masks, reference.masks
    kinds = [k for k in reference_masks if k in masks]
    if not kinds:
        raise RelpError(f"no node kind in common: {', '.join(masks)} and {', '.join(reference_masks)}")
    for what, name in (("model", "models"), ("dictionary_hash", "dictionaries")):
        named = {c.meta[what] for c in (circuit, reference) if c.meta.get(what)}
        if len(named) > 1:
            raise RelpError(f"circuits of different {name}: {' and '.join(sorted(named))}")
    anywhere = ANY_POSITION in (circuit.labels, reference.labels)
    if not anywhere and circuit.labels != reference.labels:
        raise RelpError("circuits of different positions cannot be compared node by node")
    mine, theirs = (_flat(m, kinds, anywhere) for m in (masks, reference_masks))
    if mine.shape != theirs.shape:
        raise RelpError(f"circuits of different shapes: {len(mine)} and {len(theirs)} possible nodes")
    both, either = int((mine & theirs).sum()), int((mine | theirs).sum())
    return {
        "kinds": SPACES[circuit.units.space].called(kinds),
        "positions": "any" if anywhere else "each",
        "n": int(mine.sum()),
        "n_reference": int(theirs.sum()),
        "common": both,
        "jaccard": both / either if either else float("nan"),
        "precision": both / int(mine.sum()) if mine.any() else float("nan"),
        "recall": both / int(theirs.sum()) if theirs.any() else float("nan"),
    }


def _flat(masks: Mapping[str, Tensor], kinds: list[str], anywhere: bool) -> Tensor:
    return torch.cat([(masks[k].any(1) if anywhere else masks[k]).flatten() for k in kinds])


def stability(scores: Scores, samples: int = 100, seed: int = 0, **selection: Any) -> tuple[float, dict[str, Tensor]]:
    """Select again from bootstrap resamples of the pairs.

    Returns the mean Jaccard overlap with the full circuit, and per kind the share of resamples that keep each node.
    Raises: RelpError for scores without per-example values.
    """
    if scores.examples is None or scores.present is None:
        raise RelpError("stability needs per-example scores; score again with --per-example")
    full = select(scores, **selection)
    n = len(scores.present)
    draws = resample_counts(n, samples, seed, scores.prompts)
    kept = {kind: torch.zeros_like(mask, dtype=torch.float64) for kind, mask in full.masks.items()}
    jaccards = []
    for draw in draws:
        again = select(scores.weighed(torch.as_tensor(draw, dtype=torch.float32)), **selection)
        jaccards.append(overlap(again, full)["jaccard"])
        for kind, mask in again.masks.items():
            kept[kind] += mask / samples
    return float(np.nanmean(jaccards)), kept
