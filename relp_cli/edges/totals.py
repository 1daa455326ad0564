"""Sums over examples of edge scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from relp_cli.edges.graph import Graph
from relp_cli.edges.scores import KIND, EdgeScores
from relp_cli.errors import RelpError
from relp_cli.methods.score import KEEP_LIMIT


class Totals:
    """Sums over examples in float64, aligned on the common labels."""

    def __init__(self, graph: Graph, labels: tuple[str, ...], n: int, keep: bool | None) -> None:
        self.graph, self.labels = graph, labels
        shape = (len(labels), graph.n_edges)
        self.sum, self.squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self.n = torch.zeros(len(labels), dtype=torch.long)
        keep = n * self.sum.numel() <= KEEP_LIMIT if keep is None else keep
        self.examples = torch.zeros(n, *shape) if keep else None
        self.present = torch.zeros(n, len(labels), dtype=torch.bool) if keep else None
        self.row = 0

    def add(self, found: Mapping[str, Tensor], labels: Sequence[str]) -> None:
        """Add Float[batch, writer, reader] or, with positions, Float[batch, slot, writer, reader]."""
        scores = found[KIND]
        if not torch.isfinite(scores).all():
            raise RelpError("edge scores are not finite (dtype too narrow?)")
        index = torch.tensor([self.labels.index(label) for label in labels])
        values = scores.reshape(len(scores), len(labels), *self.graph.mask.shape).cpu()[..., self.graph.mask]
        for one in values:  # one at a time: with positions, a batch of scores is as large as the activations
            self.sum.index_add_(0, index, one.double())
            self.squares.index_add_(0, index, one.double().square())
        self.n.index_add_(0, index, torch.full((len(index),), len(values)))
        if self.examples is not None and self.present is not None:
            rows = slice(self.row, self.row + len(values))
            self.examples[rows] = torch.zeros_like(self.examples[rows]).index_copy(
                1, index, values.to(self.examples.dtype)
            )
            self.present[rows] = torch.zeros_like(self.present[rows]).index_fill(1, index, True)
        self.row += len(values)

    def finish(self, axis: str, meta: dict[str, Any]) -> dict[str, Any]:
        n = self.n[:, None].double()
        mean = self.sum / n
        variance = (self.squares - n * mean.square()).clamp(min=0) / (n - 1)

        def dense(values: Tensor) -> Tensor:
            out = values.new_zeros(len(self.labels), *self.graph.mask.shape)
            out[..., self.graph.mask] = values
            return out[0] if axis == "all" else out

        parts = (dense(mean), dense(variance), self.n, self.labels, axis, self.examples, self.present, meta)
        return {KIND: EdgeScores(self.graph, *parts)}
