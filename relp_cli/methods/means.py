"""Means over prompts, per position label: what stands for a unit that is replaced by what it is on average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError
from relp_cli.methods.score import position_axis
from relp_cli.methods.setup import Means
from relp_cli.models.model import Model
from relp_cli.nodes.access import activations
from relp_cli.nodes.kinds import NodeKind
from relp_cli.tasks.pairs import PairBatch, in_batches

Runs = Iterable[tuple[Sequence[Float[Tensor, "batch pos _"]], Int[Tensor, " pos"]]]


def label_means(runs: Runs, n_labels: int) -> list[Float[Tensor, "label _"]]:
    """The mean of each tensor over prompts and positions of one label, accumulated in float64, in the tensor's dtype.

    runs: what a batch of prompts has, and the label of each of its positions.
    """
    counts, totals, dtypes = torch.zeros(0), list[Tensor](), list[torch.dtype]()
    for values, index in runs:
        if not totals:
            totals = [v.new_zeros(n_labels, v.shape[-1], dtype=torch.float64) for v in values]
            counts, dtypes = totals[0].new_zeros(n_labels), [v.dtype for v in values]
        counts.index_add_(0, index, counts.new_full((len(index),), len(values[0])))
        for total, value in zip(totals, values, strict=True):
            total.index_add_(0, index, value.double().sum(0))
    return [(total / counts[:, None]).to(dtype) for total, dtype in zip(totals, dtypes, strict=True)]


def prompts(chunk: PairBatch, which: Sequence[str]) -> Iterator[Tensor]:
    """Token ids of the prompts ("original", "patch") of a batch. Raises RelpError for patch prompts that are not there."""
    for name in which:
        if getattr(chunk, name) is None:
            raise RelpError("these prompts have no patch prompt to take means over")
        yield getattr(chunk, name)


@dataclass(frozen=True)
class MeanActivations:
    """Mean activation of every kind per label, over all given prompts: Float[label, width] per layer."""

    labels: tuple[str, ...]
    values: dict[str, list[Tensor]]

    def at(self, batch: PairBatch) -> Means:
        """The means at a batch's positions: Float[pos, width] per layer."""
        index = batch.index(self.labels)
        return {kind: [v[index.to(v.device)] for v in layers] for kind, layers in self.values.items()}


def mean_activations(
    model: Model,
    pairs: Sequence[PairBatch],
    kinds: Sequence[NodeKind],
    batch_size: int = BATCH_SIZE,
    which: Sequence[str] = ("original",),
) -> MeanActivations:
    """Mean over prompts (`which`: "original", "patch") per position label, accumulated in float64."""
    _, labels = position_axis(pairs)

    def runs() -> Iterator[tuple[list[Tensor], Tensor]]:
        for chunk in in_batches(pairs, batch_size, model.device):
            for tokens in prompts(chunk, which):
                seen = activations(model, tokens, kinds)
                yield [v for kind in kinds for v in seen[kind.name]], chunk.index(labels).to(model.device)

    found = iter(v.to(model.dtype) for v in label_means(runs(), len(labels)))
    return MeanActivations(labels, {kind.name: [next(found) for _ in range(model.shape.n_layers)] for kind in kinds})
