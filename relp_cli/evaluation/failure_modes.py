"""The three ways in which a gradient misjudges a node (AtP*, EAP-IG), measured on a model and its prompt pairs.

saturation     attention patterns where the softmax is flat, though the source's pattern is another one
cancellation   components whose direct effect and effects through later layers offset each other
flat gradients the metric's gradient at the run against its size along the straight path to the source
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.methods.atp_star import layer_drop_gradients
from relp_cli.methods.core import differences, products
from relp_cli.methods.nodes import NodeBatch
from relp_cli.methods.points import embeddings
from relp_cli.methods.score import position_axis
from relp_cli.methods.setup import Setup
from relp_cli.models.model import Model
from relp_cli.nodes.attention import attention_scores, scores_with, softmax
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.spaces.nodes import node_blocks, units_of
from relp_cli.spaces.scores import KindScores
from relp_cli.spaces.totals import Totals
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.pairs import PairBatch, in_batches

WRITERS = ("attn_out", "mlp_out")


@dataclass(frozen=True)
class Saturation:
    """Per layer, query role and head, means over pairs, all Float64[layer, pos, head].

    entropy_*: of the attention pattern in nats; max_*: its largest probability; on the run and on the source.
    moved: ½ Σ|P_source − P_run|, the share of attention that the patch prompt moves; moved_by_query: the same where only
    the source's query is put into the run, which is what patching a query node does.
    """

    entropy_run: Tensor
    entropy_source: Tensor
    max_run: Tensor
    max_source: Tensor
    moved: Tensor
    moved_by_query: Tensor


@dataclass(frozen=True)
class Cancellation:
    """Per component (attn_out or mlp_out), all [layer, pos], means over pairs.

    total: δ·gradient. direct: the same with all layers held constant (residual and final norm only).
    The parts of a component are its direct effect and, for each later layer (for attention: its own, through the MLP,
    too), what goes through it: total − δ·gradient with that layer held constant; some paths go through several.
    offset: E[min(Σ positive parts, −Σ negative parts)], what cancels. share: 2·offset / E[Σ |parts|]: 0 nothing, 1 all.
    main, opponent: the part of the largest size and the largest of the other sign: a layer, DIRECT, or NONE.
    """

    direct: Tensor
    total: Tensor
    offset: Tensor
    share: Tensor
    main: Tensor
    opponent: Tensor


DIRECT, NONE = -1, -2


@dataclass(frozen=True)
class FlatGradients:
    """Gradient norms along the path of embeddings from run (α = 0) to source (α = 1).

    alphas: Float[point]; norms: Float64[point, layer, pair] of ∂L/∂resid_pre, all positions; metric: L, [point, pair].
    """

    alphas: np.ndarray
    norms: Tensor
    metric: Tensor

    @property
    def relative(self) -> Tensor:
        """Norm at the run ÷ mean norm along the path: Float64[layer, pair]; ≪ 1 where the run lies in a flat region."""
        return self.norms[0] / self.norms.mean(0).clamp_min(1e-300)


def setups(
    model: Model, pairs: Sequence[PairBatch], metric: str, direction: str, kinds: Sequence[str], size: int = BATCH_SIZE
) -> Iterator[Setup]:
    """The pairs in chunks, ready for scoring."""
    for chunk in in_batches(pairs, size, model.device):
        yield Setup(model, chunk, METRICS[metric], tuple(NODE_KINDS[k] for k in kinds), direction)  # type: ignore[arg-type]


def saturation(model: Model, pairs: Sequence[PairBatch], metric: str, direction: str) -> Saturation:
    """3 forward passes."""
    names = ("entropy_run", "entropy_source", "max_run", "max_source", "moved", "moved_by_query")
    means = _Means(model, pairs, dict.fromkeys(names, "query"))
    for setup in setups(model, pairs, metric, direction, ("query", "key")):
        with attention_scores(model) as run_scores:
            at_run = setup.run_activations()
        with attention_scores(model) as source_scores:
            at_source = setup.source_activations()
        by_query = scores_with(model, setup.run, at_run | {"query": at_source["query"]})
        setup.passes.forward += 1
        run, source, moved = (
            softmax(torch.stack(scores, 1)).transpose(2, 3)  # [batch, layer, query, head, key]
            for scores in (run_scores, source_scores, by_query)
        )
        entropy = [-torch.xlogy(p, p).sum(-1) for p in (run, source)]
        shares = [0.5 * (p - run).abs().sum(-1) for p in (source, moved)]
        for name, value in zip(names, (*entropy, run.amax(-1), source.amax(-1), *shares), strict=True):
            means.add(name, setup, value, average=True)
    return Saturation(**{name: means.finish(name).mean for name in names})


def cancellation(model: Model, pairs: Sequence[PairBatch], metric: str, direction: str) -> dict[str, Cancellation]:
    """2 forward + (layers + 2) backward passes; kind → Cancellation."""
    n = model.shape.n_layers
    every = frozenset(range(n))
    names = ("direct", "total", "offset", "size", *map(str, range(n)))
    means = {kind: _Means(model, pairs, dict.fromkeys(names, kind)) for kind in WRITERS}
    for setup in setups(model, pairs, metric, direction, WRITERS):
        source = setup.source_activations()
        runs = layer_drop_gradients(setup, [frozenset(), every, *(frozenset([layer]) for layer in range(n))])
        deltas = differences(source, runs[0].values)
        total, direct, *without = (products(setup, deltas, at.grads) for at in runs)
        for kind in WRITERS:
            parts = torch.stack([direct[kind], *(total[kind] - w[kind] for w in without)])
            up, down = parts.clamp_min(0).sum(0), -parts.clamp_max(0).sum(0)
            values = (direct[kind], total[kind], torch.minimum(up, down), up + down, *parts[1:])
            for name, value in zip(names, values, strict=True):
                means[kind].add(name, setup, value)
    return {kind: _cancelled({name: means[kind].finish(name).mean for name in names}, n) for kind in WRITERS}


def _cancelled(at: dict[str, Tensor], n_layers: int) -> Cancellation:
    parts = torch.stack([at["direct"], *(at[str(layer)] for layer in range(n_layers))])  # [part, layer, pos]
    main = parts.abs().max(0)
    against = (-parts * parts.gather(0, main.indices[None])[0].sign()).max(0)
    none = torch.full_like(main.indices, NONE)
    return Cancellation(
        direct=at["direct"],
        total=at["total"],
        offset=at["offset"],
        share=2 * at["offset"] / at["size"].clamp_min(1e-300),
        main=torch.where(main.values > 0, main.indices + DIRECT, none),
        opponent=torch.where(against.values > 0, against.indices + DIRECT, none),
    )


def flat_gradients(
    model: Model, pairs: Sequence[PairBatch], metric: str, direction: str, points: int = 11
) -> FlatGradients:
    """`points` forward + backward passes, and 2 forward."""
    alphas = np.linspace(0, 1, points)
    norms, values = [], []
    for setup in setups(model, pairs, metric, direction, ("resid_pre",)):
        on = NodeBatch(setup)
        path = [at for _, at in on.passes(embeddings(on, alphas, np.ones(points)))]
        here = [torch.stack([g.flatten(1).norm(dim=-1) for g in at.grads["resid_pre"]]) for at in path]
        norms.append(torch.stack(here).double().cpu())
        values.append(torch.stack([at.metric for at in path]).double().cpu())
    return FlatGradients(alphas, torch.cat(norms, -1), torch.cat(values, -1))


def attention_table(attention: Saturation, labels: Sequence[str]) -> pd.DataFrame:
    """A row per layer, head and query."""
    at = np.unravel_index(np.arange(attention.moved.numel()), attention.moved.shape)
    columns = {"layer": at[0], "head": at[2], "query": np.array(labels)[at[1]]}
    values = {name: getattr(attention, name).numpy().ravel() for name in
              ("entropy_run", "entropy_source", "max_run", "max_source", "moved", "moved_by_query")}  # fmt: skip
    return pd.DataFrame(columns | values)


def cancelling_table(cancelling: Mapping[str, Cancellation], labels: Sequence[str]) -> pd.DataFrame:
    """A row per component; main and opponent in words."""
    parts = []
    for kind, c in cancelling.items():
        at = np.unravel_index(np.arange(c.total.numel()), c.total.shape)
        numbers = {name: getattr(c, name).numpy().ravel() for name in ("direct", "total", "offset", "share")}
        numbers["indirect"] = numbers["total"] - numbers["direct"]
        through = {name: [_part(int(n)) for n in getattr(c, name).ravel()] for name in ("main", "opponent")}
        place = {"kind": kind, "layer": at[0], "position": np.array(labels)[at[1]]}
        parts.append(pd.DataFrame(place | numbers | through))
    return pd.concat(parts, ignore_index=True)


def _part(code: int) -> str:
    return {DIRECT: "direct", NONE: ""}.get(code, f"layer {code}")


def gradient_table(gradient: FlatGradients) -> pd.DataFrame:
    """A row per point of the path: metric, and per layer the norm relative to its mean along the path, means over pairs."""
    relative = (gradient.norms / gradient.norms.mean(0).clamp_min(1e-300)).mean(-1)
    table = pd.DataFrame(relative.numpy(), columns=[f"layer {n}" for n in range(relative.shape[1])])
    table.insert(0, "alpha", gradient.alphas)
    table.insert(1, "metric", gradient.metric.mean(-1).numpy())
    return table


class _Means:
    """Means over pairs of several quantities on the common position axis."""

    def __init__(self, model: Model, pairs: Sequence[PairBatch], names: dict[str, str]) -> None:
        self.axis, labels = position_axis(pairs)
        total = sum(len(b) for b in pairs)
        self.running = {
            name: (kind, Totals(units_of(model, [kind]), labels, total, keep=False)) for name, kind in names.items()
        }

    def add(self, name: str, setup: Setup, value: Tensor, average: bool = False) -> None:
        """value: Float[batch, layer, pos or slot, *unit]; average: over positions that share a label (else as it is)."""
        if average:
            counts = torch.bincount(setup.slots, minlength=len(setup.labels)).to(value)
            value = setup.to_slots(value) / counts.view(1, 1, -1, *[1] * (value.ndim - 3))
        kind, totals = self.running[name]
        totals.add(node_blocks({kind: value}, [kind]), setup.labels)

    def finish(self, name: str) -> KindScores:
        kind, totals = self.running[name]
        scores: KindScores = totals.finish(self.axis, {})[kind]
        return scores
