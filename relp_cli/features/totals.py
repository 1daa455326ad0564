"""Sums over examples of feature scores: dense per site while batches come in, sparse when they are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.features.scores import Examples, FeatureScores
from relp_cli.features.sites import Site
from relp_cli.methods.score import KEEP_LIMIT


class Totals:
    """Sums over examples in float64, aligned on the common labels; single examples are kept as `keep` says, and where it is
    None as long as there are at most KEEP_LIMIT numbers.
    """

    def __init__(
        self, sites: Sequence[Site], sizes: Sequence[int], labels: tuple[str, ...], keep: bool | None = None
    ) -> None:
        self.sites, self.sizes, self.labels = tuple(sites), tuple(sizes), labels
        # [sum, sum of squares] per site: features Float[pos, feature], errors Float[pos]
        self.features = [[torch.zeros(len(labels), size, dtype=torch.float64) for _ in range(2)] for size in sizes]
        self.errors = [[torch.zeros(len(labels), dtype=torch.float64) for _ in range(2)] for _ in sizes]
        self.n = torch.zeros(len(labels), dtype=torch.long)
        self.keep = keep is not False
        self.limit = KEEP_LIMIT if keep is None else None
        self.count = self.entries = 0
        # per batch and site: (example, pos, feature) of what is not 0, and its value; per batch: errors, positions
        self.kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sizes]
        self.kept_errors: list[Tensor] = []
        self.present: list[Tensor] = []

    def add(self, features: Sequence[Tensor], errors: Sequence[Tensor], labels: Sequence[str]) -> None:
        """Per site Float[batch, slot, feature] and Float[batch, slot], whose slots carry `labels`."""
        index = torch.tensor([self.labels.index(label) for label in labels])
        for totals, values in ((self.features, features), (self.errors, errors)):
            for (plain, squares), value in zip(totals, values, strict=True):
                if not torch.isfinite(value).all():
                    raise RelpError("feature scores are not finite (dtype too narrow?)")
                value = value.detach().double()
                plain.index_add_(0, index, value.sum(0).cpu())
                squares.index_add_(0, index, value.square().sum(0).cpu())
        self.n.index_add_(0, index, torch.full((len(index),), len(errors[0])))
        if self.keep:
            self._keep(features, errors, index)

    def _keep(self, features: Sequence[Tensor], errors: Sequence[Tensor], index: Tensor) -> None:
        for kept, value in zip(self.kept, features, strict=True):
            value = value.detach().to(torch.get_default_dtype()).cpu()
            at = value.nonzero()
            where = torch.stack([at[:, 0] + self.count, index[at[:, 1]], at[:, 2]], 1)
            kept.append((where, value[tuple(at.T)]))
            self.entries += len(at)
        batch = len(errors[0])
        row = torch.zeros(batch, len(self.sites), len(self.labels))
        self.kept_errors.append(
            row.index_copy_(2, index, torch.stack(list(errors), 1).detach().to(torch.get_default_dtype()).cpu())
        )
        self.present.append(torch.zeros(batch, len(self.labels), dtype=torch.bool).index_fill_(1, index, True))
        self.count += batch
        if self.limit is not None and self.entries > self.limit:
            self.keep, self.kept, self.kept_errors, self.present = False, [], [], []

    def finish(self, axis: str, meta: Mapping[str, Any]) -> FeatureScores:
        rows, means, variances = [], [], []
        for number, (plain, squares) in enumerate(self.features):
            at = (squares > 0).nonzero()
            mean, variance = moments(plain, squares, self.n[:, None])
            rows.append(torch.cat([torch.full((len(at), 1), number), at], 1))
            means.append(mean[at[:, 0], at[:, 1]])
            variances.append(variance[at[:, 0], at[:, 1]])
        errors = [moments(plain, squares, self.n) for plain, squares in self.errors]
        return FeatureScores(
            self.sites, self.sizes, torch.cat(rows), torch.cat(means), torch.cat(variances),
            torch.stack([m for m, _ in errors]), torch.stack([v for _, v in errors]), self.n, self.labels, axis, meta,
            self._examples() if self.keep else None,
        )  # fmt: skip

    def _examples(self) -> Examples:
        index, values, first = [], [], 0
        for kept, (_, squares) in zip(self.kept, self.features, strict=True):
            row = torch.full(squares.shape, -1)
            at = (squares > 0).nonzero()
            row[tuple(at.T)] = first + torch.arange(len(at))
            first += len(at)
            where = torch.cat([w for w, _ in kept])
            index.append(torch.stack([where[:, 0], row[where[:, 1], where[:, 2]]], 1))
            values.append(torch.cat([v for _, v in kept]))
        return Examples(torch.cat(index), torch.cat(values), torch.cat(self.kept_errors), torch.cat(self.present))


def moments(plain: Tensor, squares: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance from a sum and a sum of squares over n examples."""
    mean = plain / n
    return mean, (squares - n * mean.square()).clamp(min=0) / (n - 1)
