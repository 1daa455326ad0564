"""How large an effect can a scoring have missed? AtP*'s diagnostic (Kramár et al. 2024): patched subsets, Welch's test.

1. Nodes that were verified (patched exactly, or in the circuit) are set aside; the others may hide a missed effect.
2. Random subsets of the others are patched, all nodes of a subset in one run: c(S), averaged over the pairs.
3. For each node n, mean c(S | n ∈ S) − mean c(S | n ∉ S) estimates its effect; Welch's standard error says how well.
4. "No unverified node has |effect| ≥ θ" is refuted by a single node, so it is accepted only if every node's own test
   rejects |effect| ≥ θ (no correction for many tests is needed): θ = max over n of |difference| + t·standard error.

What is bounded is a node's mean effect in the company of random others; it is its effect alone where effects add up. The
bound covers the largest effect alone at the stated confidence only then, whatever the share. Where effects saturate it covers
less, and the less the larger the share: in a simulation (tests/evaluation/test_missed.py: tanh of the sum of 40 effects, one
of them large, 95 % asked) 82 % of the time at share 0.05, 65 % at 0.1 and 36 % at 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError
from relp_cli.methods.patching import every_pair, patch_sets
from relp_cli.methods.request import Request
from relp_cli.methods.room import Room, fitting
from relp_cli.methods.score import position_axis
from relp_cli.methods.setup import Passes
from relp_cli.models.model import Model
from relp_cli.nodes.access import units
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.tasks.pairs import PairBatch, in_batches
from relp_cli.tasks.parts import parts_of


@dataclass(frozen=True)
class Missed:
    """bound: the smallest |effect| that can be excluded for every unverified node at `confidence` (0 if there are none).

    difference, error, upper: kind → Float[layer, pos, *unit]: each node's estimated effect, its standard error, and the
    one-sided upper limit of its |effect|; NaN for verified nodes. worst: (kind, index) of the largest `upper`.
    subset_sd: standard deviation of c(S), what more subsets would average out.
    company: how many other nodes a node was patched together with, on average.
    """

    bound: float
    confidence: float
    difference: dict[str, Tensor]
    error: dict[str, Tensor]
    upper: dict[str, Tensor]
    worst: tuple[str, tuple[int, ...]] | None
    n_unverified: int
    n_subsets: int
    subset_sd: float
    company: float


def missed_effects(
    model: Model,
    pairs: Sequence[PairBatch],
    verified: Mapping[str, Tensor],
    metric: str = "logit_diff",
    direction: str = "noising",
    subsets: int = 256,
    share: float = 0.1,
    confidence: float = 0.95,
    seed: int = 0,
) -> Missed:
    """Bound what is left in nodes that nobody verified.

    verified: kind → Bool[layer, pos, *unit] on the position axis that `score` gives for these pairs; all nodes of its
    kinds that are False are sampled. `subsets` forward passes over the pairs.
    Raises: RelpError for masks of another shape, and for too few subsets to see every node in and out at least twice.
    """
    if not 0 < share < 1 or not 0.5 < confidence < 1 or subsets < 4:
        raise RelpError("missed effects: expected 0 < share < 1, 0.5 < confidence < 1 and at least 4 subsets")
    _, labels = position_axis(parts_of(pairs))
    open_ = {kind: ~mask for kind, mask in verified.items()}
    for kind, mask in verified.items():
        k = NODE_KINDS[kind]
        want = (model.shape.n_layers, len(labels), *([] if k.split == "vector" else [units(model, k)]))
        if tuple(mask.shape) != want:
            raise RelpError(f"missed effects: verified {kind} nodes have shape {tuple(mask.shape)}, expected {want}")
    n_open = sum(int(m.sum()) for m in open_.values())
    nan = {kind: torch.full(mask.shape, float("nan"), dtype=torch.float64) for kind, mask in verified.items()}
    if n_open == 0:
        return Missed(0.0, confidence, nan, nan, nan, None, 0, 0, 0.0, 0.0)
    member = torch.rand(subsets, n_open, generator=torch.Generator().manual_seed(seed)) < share
    if ((member.sum(0) < 2) | ((~member).sum(0) < 2)).any():
        raise RelpError(
            f"missed effects: {subsets} subsets with share {share:g} leave some node in (or out of) fewer than two of "
            "them; more subsets are needed"
        )
    effects = _subset_effects(model, pairs, labels, _as_masks(member, open_), metric, direction)
    difference, error, upper = _welch(effects, member.double(), confidence)
    found = {name: _fill(values, open_) for name, values in (("d", difference), ("e", error), ("u", upper))}
    kind = max(open_, key=lambda k: found["u"][k].nan_to_num(-1.0).max().item())
    top = int(found["u"][kind].nan_to_num(-1.0).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(top), found["u"][kind].shape))
    return Missed(
        bound=upper.max().item(),
        confidence=confidence,
        difference=found["d"],
        error=found["e"],
        upper=found["u"],
        worst=(kind, index),
        n_unverified=n_open,
        n_subsets=subsets,
        subset_sd=effects.std().item(),
        company=share * (n_open - 1),
    )


def _welch(effects: Tensor, member: Tensor, confidence: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per node: difference of means with and without it, its standard error, and the upper limit of its size."""
    inside, outside = (_moments(effects, m) for m in (member, 1 - member))
    difference = inside[0] - outside[0]
    parts = [variance / n for _, variance, n in (inside, outside)]
    error = (parts[0] + parts[1]).sqrt()
    freedom = (parts[0] + parts[1]).square() / (
        parts[0].square() / (inside[2] - 1) + parts[1].square() / (outside[2] - 1)
    ).clamp_min(1e-300)
    quantile = torch.from_numpy(stats.t.ppf(confidence, freedom.clamp(1, 1e9).numpy()))
    return difference, error, difference.abs() + quantile * error


def _moments(effects: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = member.sum(0)
    mean = (effects[:, None] * member).sum(0) / n
    return mean, ((effects[:, None] - mean).square() * member).sum(0) / (n - 1), n


def _as_masks(member: Tensor, open_: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bool[subset, node] → kind → Bool[subset, layer, pos, *unit]."""
    masks, at = {}, 0
    for kind, mask in open_.items():
        masks[kind] = torch.zeros(len(member), *mask.shape, dtype=torch.bool)
        masks[kind][:, mask] = member[:, at : at + int(mask.sum())]
        at += int(mask.sum())
    return masks


def _fill(values: Tensor, open_: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out, at = {}, 0
    for kind, mask in open_.items():
        out[kind] = torch.full(mask.shape, float("nan"), dtype=torch.float64)
        out[kind][mask] = values[at : at + int(mask.sum())]
        at += int(mask.sum())
    return out


def _subset_effects(
    model: Model,
    pairs: Sequence[PairBatch],
    labels: tuple[str, ...],
    masks: Mapping[str, Tensor],
    metric: str,
    direction: str,
) -> Tensor:
    """c(S) of every subset, averaged over pairs: Float64[subset]."""
    n = len(next(iter(masks.values())))
    total, n_pairs = torch.zeros(n, dtype=torch.float64), sum(len(b) for b in pairs)
    request, kinds = Request(metric, direction), tuple(NODE_KINDS[k] for k in masks)
    for chunk in in_batches(parts_of(pairs), BATCH_SIZE, model.device):
        setup = request.setup(model, chunk, kinds, Passes())
        source = setup.source_activations()
        at = chunk.index(labels)
        here = {
            (kind.name, layer): masks[kind.name][:, layer, at].view(n, len(at), -1).to(model.device)
            for kind in setup.kinds
            for layer in range(model.shape.n_layers)
        }
        size = fitting(setup.run.numel(), Room.on(model.device).patched)
        for part in torch.arange(n).split(size):
            sets = {where: mask[part] for where, mask in here.items()}
            total[part] += patch_sets(setup, source, sets, every_pair(setup, len(part))).sum(1).double().cpu()
    return total / n_pairs
