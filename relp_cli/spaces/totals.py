"""Sums over examples, while a method works through its batches, of units of any space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.spaces.clusters import ClusterSums
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import space_of
from relp_cli.spaces.units import Units

KEEP_LIMIT = 1 << 26  # single examples are kept up to this many numbers, unless asked for


def singles(total: int, cells: int, keep: bool | None) -> int:
    """How many numbers are kept of single examples, of so many examples with so many scores each."""
    return total * cells if keep or (keep is None and total * cells <= KEEP_LIMIT) else 0


class Totals:
    """Sums in float64, aligned on the common labels.

    keep: whether single examples are kept; None: where there are at most KEEP_LIMIT numbers. Where most units are 0 in most
    examples (`Space.sparse`), single examples are kept, and scores stored, where they are not.
    prompts, order: of the examples as they are added, which prompt each has, and which it is of all (None, None: each has its own
    prompt, and they come in order).
    """

    def __init__(
        self,
        units: Units,
        labels: tuple[str, ...],
        total: int,
        keep: bool | None,
        prompts: Int[np.ndarray, " example"] | None = None,
        order: Int[np.ndarray, " example"] | None = None,
    ) -> None:
        self.units, self.labels, self.total = units, labels, total
        self.sparse = sparse = space_of(units).sparse
        self.sum, self.squares = (torch.zeros(len(labels), len(units), dtype=torch.float64) for _ in range(2))
        self.n = torch.zeros(len(labels), dtype=torch.long)
        self.limit = KEEP_LIMIT if keep is None else None
        self.keep = keep is not False and (sparse or self.limit is None or total * self.sum.numel() <= self.limit)
        self.present = torch.zeros(total, len(labels), dtype=torch.bool)
        self.examples = torch.zeros(total, *self.sum.shape) if self.keep and not sparse else None
        self.entries: list[tuple[Tensor, Tensor]] = []  # (example, cell) of what is not 0, and its value
        self.count = self.row = 0
        self.order = torch.arange(total) if order is None else torch.from_numpy(order)
        self.clusters = None if prompts is None else ClusterSums(prompts, *self.sum.shape)

    def add(self, blocks: Sequence[Float[Tensor, "batch slot _"]], labels: Sequence[str]) -> None:
        """One batch: per block of units its scores, whose slots carry `labels`. Raises RelpError for what is not finite."""
        index = torch.tensor([self.labels.index(label) for label in labels])
        batch = len(blocks[0])
        rows = self.order[self.row : self.row + batch]
        for values, block, start in zip(blocks, self.units.blocks, self.units.starts, strict=False):
            if not torch.isfinite(values).all():
                raise RelpError(f"{block.kind} scores are not finite (dtype too narrow?)")
            span = slice(start, start + block.size)
            values = values.detach().cpu()
            for example in values:  # one at a time: scores of edges by position are as large as activations
                wide = example.double()
                self.sum[:, span].index_add_(0, index, wide)
                self.squares[:, span].index_add_(0, index, wide.square())
            if self.examples is not None:
                self.examples[rows, :, span] = torch.zeros(batch, len(self.labels), block.size).index_copy_(
                    1, index, values.to(self.examples.dtype)
                )
            elif self.keep:
                self._keep(values.to(torch.get_default_dtype()), index, start)
        for i in range(batch if self.clusters else 0):
            parts = ((slice(at, at + v.shape[-1]), v[i]) for v, at in zip(blocks, self.units.starts, strict=False))
            self.clusters.add(index, ((span, v.detach().cpu().double()) for span, v in parts))  # type: ignore[union-attr]
        self.n.index_add_(0, index, torch.full((len(index),), batch))
        self.present[rows] = torch.zeros(batch, len(self.labels), dtype=torch.bool).index_fill_(1, index, True)
        self.row += batch

    def _keep(self, values: Tensor, index: Tensor, start: int) -> None:
        at = values.nonzero()
        example, slot, unit = at.unbind(1)
        where = torch.stack([self.order[example + self.row], index[slot] * len(self.units) + start + unit], 1)
        self.entries.append((where, values[tuple(at.T)]))
        self.count += len(at)
        if self.limit is not None and self.count > self.limit:
            self.keep, self.entries = False, []

    def finish(self, axis: str, meta: dict[str, Any]) -> Scores:
        mean, variance = moments(self.sum, self.squares, self.n[:, None])
        if self.clusters:
            variance = torch.maximum(variance, self.clusters.variance(mean, self.n[:, None]))
        columns = examples = None
        mean, variance = mean.flatten(), variance.flatten()
        if self.sparse:
            columns = self.squares.flatten().nonzero()[:, 0]
            mean, variance = mean[columns], variance[columns]
        if self.examples is not None:
            examples = self.examples.flatten(1)
        elif self.keep and columns is not None and (self.limit is None or self.total * len(columns) <= self.limit):
            where, values = (torch.cat(parts) for parts in zip(*self.entries, strict=True))
            examples = torch.zeros(self.total, len(columns))
            examples[where[:, 0], torch.searchsorted(columns, where[:, 1].contiguous())] = values
        present = None if examples is None else self.present
        return Scores(self.units, self.labels, axis, self.n, mean, variance, columns, examples, present, meta)


def moments(plain: Tensor, squares: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance from a sum and a sum of squares over n examples."""
    mean = plain / n
    return mean, (squares - n * mean.square()).clamp(min=0) / (n - 1)
