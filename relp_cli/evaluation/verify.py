"""Exact patching of a cheap method's top candidates: what AP costs for neurons when it is spent where it matters.

1. The candidates are the nodes with the largest |cheap score|, over one or several cheap methods.
2. Each candidate is patched exactly (RelP eq. 1) on every pair.
3. The others are not patched and have score 0, which the metadata says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError
from relp_cli.evaluation.agreement import top
from relp_cli.features.load import Dictionaries
from relp_cli.methods.patching import patch_nodes
from relp_cli.methods.request import Progress, Request
from relp_cli.methods.score import position_axis, score_units, summed
from relp_cli.methods.setup import Passes, Setup
from relp_cli.models.model import Model
from relp_cli.nodes.access import Activations
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.features import sites_of, with_errors
from relp_cli.spaces.nodes import node_blocks, units_of
from relp_cli.spaces.scores import KindScores, Scores
from relp_cli.spaces.totals import Totals
from relp_cli.tasks.pairs import PairBatch, in_batches
from relp_cli.tasks.parts import parts_of
from relp_cli.tasks.shared import PROMPT_OF, about_prompts, prompts_of, together


def candidates(cheap: Sequence[KindScores], k: int) -> Tensor:
    """Bool[layer, pos, *unit]: the union of each method's k largest |mean|."""
    mask = torch.zeros(cheap[0].mean.numel(), dtype=torch.bool)
    for scores in cheap:
        mask[top(scores.mean.numpy().ravel(), k)] = True
    return mask.view(cheap[0].mean.shape)


def rescore(
    model: Model,
    pairs: Sequence[PairBatch],
    cheap: Sequence[Mapping[str, KindScores]],
    k: int,
    progress: Progress | None = None,
    batch_size: int = BATCH_SIZE,
) -> Scores:
    """Exact scores of the top-k candidates per kind (union over the `cheap` results), 0 elsewhere.

    Metric and direction are those of the cheap scores. Raises RelpError where these disagree, or used a baseline.
    """
    meta = next(iter(cheap[0].values())).meta
    for other in cheap:
        theirs = next(iter(other.values())).meta
        different = [key for key in ("metric", "direction", "model", "revision") if theirs.get(key) != meta.get(key)]
        if different or theirs["baseline"] != "patch":
            raise RelpError(f"cheap scores to verify differ in {', '.join(different) or 'baseline'}")
    masks = {name: candidates([c[name] for c in cheap], k) for name in cheap[0]}
    return exact_scores(model, pairs, masks, {**meta, "params": {"candidates": k}}, progress, batch_size)


def exact_scores(
    model: Model,
    pairs: Sequence[PairBatch],
    masks: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    progress: Progress | None = None,
    batch_size: int = BATCH_SIZE,
) -> Scores:
    """Exact scores of the masked nodes (kind → Bool[layer, pos, *unit]), 0 elsewhere; `meta` has metric and direction."""
    axis, labels = position_axis(parts_of(pairs))
    kinds = tuple(NODE_KINDS[name] for name in masks)
    request, prompts = Request(meta["metric"], meta["direction"]), prompts_of(pairs)
    pairs, order = together(pairs)
    shared = None if order is None else prompts[order]
    chunks = in_batches(pairs, batch_size, model.device)
    totals = Totals(units_of(model, list(masks)), labels, sum(map(len, chunks)), None, shared, order)
    done = 0
    for chunk in chunks:
        found = []
        for part in parts_of([chunk]):
            setup = request.setup(model, part, kinds, Passes())
            source = setup.source_activations()
            effects = {k.name: _effects(setup, k, masks[k.name], labels, source) for k in kinds}
            found.append((setup.labels, node_blocks(effects, list(masks))))
        totals.add(*summed(found))
        done += len(chunk)
        if progress:
            progress(done, totals.total, "exact patching of candidates")
    n_candidates = sum(int(mask.sum()) for mask in masks.values())
    about = {**meta, "method": "act_patch", "rules": {}, "signed": True, "n_candidates": n_candidates}
    about |= {"n_pairs": totals.total}  # `meta` may be of some of the pairs (`relp+auto`)
    return totals.finish(axis, {k: v for k, v in about.items() if k != PROMPT_OF} | about_prompts(prompts))


def confirmed(
    model: Model,
    pairs: Sequence[PairBatch],
    circuit: Circuit,
    tau: float,
    meta: Mapping[str, Any],
    dictionary: Dictionaries | None = None,
    progress: Progress | None = None,
) -> Circuit:
    """The nodes of a circuit whose |exact effect| is > tau; `meta` has the scores' metric and direction.

    dictionary: of a feature circuit.
    Raises: RelpError for scores of nodes with a baseline other than the patch prompts.
    """
    note = {**circuit.meta, "verified": {"method": "act_patch", "confirm": tau}}
    if circuit.units.space == "features":
        request = Request(meta["metric"], meta["direction"], meta["baseline"], keep_examples=False, progress=progress)
        options: dict[str, Any] = {"only": circuit, "dictionary": dictionary}
        exact = score_units(model, pairs, "act_patch", ["feature"], request, **options)
        exact = with_errors(exact, sites_of(circuit.units).removed)
    else:
        if meta["baseline"] != "patch":
            raise RelpError(
                f"nodes are verified with the patch prompts' values; these scores have baseline '{meta['baseline']}'"
            )
        exact = exact_scores(model, pairs, circuit.masks, meta, progress)
    at = torch.tensor([exact.labels.index(label) for label in circuit.labels])
    confirmed_ = exact.dense(exact.mean)[at].abs() > tau
    return replace(circuit, mask=circuit.mask & confirmed_, edges=None, meta=note)


def _effects(setup: Setup, kind: NodeKind, mask: Tensor, labels: tuple[str, ...], source: Activations) -> Tensor:
    """Float[batch, layer, slot, *unit]: exact effects of the candidates at this batch's positions, 0 elsewhere."""
    here = mask[:, [labels.index(label) for label in setup.labels]]
    here = here[..., None] if kind.split == "vector" else here
    wanted = {(kind.name, layer): nodes.expand(len(setup.batch), *nodes.shape) for layer, nodes in enumerate(here)}
    effects = torch.stack(list(patch_nodes(setup, source, wanted).values()), 1)
    return effects[..., 0] if kind.split == "vector" else effects
