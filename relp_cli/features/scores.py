"""`FeatureScores`: scores of the features and error terms of all sites, stored sparsely (most features never change)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.features.sites import Site, parse_site
from relp_cli.methods.scores import NodeScores

KIND = "feature"


@dataclass(frozen=True)
class FeatureScores:
    """Scores of every feature and of every site's error term, at every position.

    sites, sizes:   the sites in the order of a forward pass, and how many features each one's dictionary has.
    index:          Int[nonzero, 3], (site, pos, feature) of the features whose score is not 0 in every example.
    mean, variance: Float[nonzero] over examples (variance unbiased; NaN where n = 1). All other features: 0.
    error_mean, error_variance: Float[site, pos], of the error terms ε = x − x̂.
    n:              Int[pos], how many examples have the position. labels, axis: as in NodeScores.
    """

    sites: tuple[Site, ...]
    sizes: tuple[int, ...]
    index: Int[Tensor, "nonzero 3"]
    mean: Float[Tensor, " nonzero"]
    variance: Float[Tensor, " nonzero"]
    error_mean: Float[Tensor, "site pos"]
    error_variance: Float[Tensor, "site pos"]
    n: Int[Tensor, " pos"]
    labels: tuple[str, ...]
    axis: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return KIND

    @property
    def n_nodes(self) -> int:
        """Features and error terms, at all positions."""
        return len(self.labels) * (sum(self.sizes) + len(self.sites))

    @property
    def examples(self) -> None:
        """Never kept: one example of all features would be as large as the dictionaries."""

    @property
    def present(self) -> None:
        """As `examples`."""

    def flat(self) -> NodeScores:
        """The same numbers as scores of one layer whose units are each site's features and error term, zeros included."""

        def joined(what: str, errors: Tensor) -> Tensor:
            parts = [torch.cat([self.dense(s, what), e[:, None]], 1) for s, e in zip(self.sites, errors, strict=True)]
            return torch.cat(parts, 1)[None]

        mean, variance = joined("mean", self.error_mean), joined("variance", self.error_variance)
        return NodeScores(KIND, mean, variance, self.n, self.labels, self.axis, meta=self.meta)

    def at(self, site: Site | str) -> int:
        """A site's number. Raises RelpError for a site that has no scores."""
        found = parse_site(site) if isinstance(site, str) else site
        if found not in self.sites:
            raise RelpError(f"no scores for site '{site}'; there are {', '.join(s.name for s in self.sites)}")
        return self.sites.index(found)

    def dense(self, site: Site | str, what: str = "mean") -> Float[Tensor, "pos feature"]:
        """`mean` or `variance` of one site's features at every position, zeros included."""
        number = self.at(site)
        out = torch.zeros(len(self.labels), self.sizes[number], dtype=self.mean.dtype)
        mine = self.index[:, 0] == number
        out[self.index[mine, 1], self.index[mine, 2]] = getattr(self, what)[mine]
        return out

    def total(self, site: Site | str) -> Float[Tensor, " pos"]:
        """Features and error term summed: for gradient scores, the score of the site's whole vector."""
        return self.dense(site).sum(1) + self.error_mean[self.at(site)]

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of one entry of a score file."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        header = {"labels": list(self.labels), "axis": self.axis, "sites": [s.name for s in self.sites],
                  "sizes": list(self.sizes)}  # fmt: skip
        return tensors, header

    @classmethod
    def from_parts(
        cls,
        kind: str,  # noqa: ARG003
        tensors: Mapping[str, Tensor],
        header: Mapping[str, Any],
        meta: Mapping[str, Any],
    ) -> FeatureScores:
        """What `parts` gave."""
        sites = [parse_site(name) for name in header["sites"]]
        return cls(
            tuple(s for s in sites if s), tuple(header["sizes"]), **{n: tensors[n] for n in _TENSORS},
            labels=tuple(header["labels"]), axis=header["axis"], meta=meta,
        )  # fmt: skip


_TENSORS = ("index", "mean", "variance", "error_mean", "error_variance", "n")


class Totals:
    """Sums over examples in float64, aligned on the common labels; dense per site until `finish`."""

    def __init__(self, sites: Sequence[Site], sizes: Sequence[int], labels: tuple[str, ...]) -> None:
        self.sites, self.sizes, self.labels = tuple(sites), tuple(sizes), labels
        # [sum, sum of squares] per site: features Float[pos, feature], errors Float[pos]
        self.features = [[torch.zeros(len(labels), size, dtype=torch.float64) for _ in range(2)] for size in sizes]
        self.errors = [[torch.zeros(len(labels), dtype=torch.float64) for _ in range(2)] for _ in sizes]
        self.n = torch.zeros(len(labels), dtype=torch.long)

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
        )  # fmt: skip


def moments(plain: Tensor, squares: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance from a sum and a sum of squares over n examples."""
    mean = plain / n
    return mean, (squares - n * mean.square()).clamp(min=0) / (n - 1)
