"""`FeatureScores`: scores of the features and error terms of all sites, stored sparsely (most features never change)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.features.sites import Site, parse_site
from relp_cli.methods.score import KEEP_LIMIT
from relp_cli.methods.scores import NodeScores, expect

KIND = "feature"
_TENSORS = ("index", "mean", "variance", "error_mean", "error_variance", "n")
_EXAMPLES = "example_"


@dataclass(frozen=True)
class Examples:
    """Scores of single examples, sparse like their means.

    index:   Int[entry, 2], (example, row of the scores' `index`) of what is not 0; values: Float[entry].
    errors:  Float[example, site, pos]. present: Bool[example, pos], which examples have which positions.
    """

    index: Int[Tensor, "entry 2"]
    values: Float[Tensor, " entry"]
    errors: Float[Tensor, "example site pos"]
    present: Bool[Tensor, "example pos"]

    def weighed(self, scores: FeatureScores, weights: Float[Tensor, " example"]) -> FeatureScores:
        """`FeatureScores.resampled`."""
        weights = weights.double()
        count = (weights[:, None] * self.present).sum(0).clamp(min=1)
        total = torch.zeros(len(scores.index), dtype=torch.float64)
        total.index_add_(0, self.index[:, 1], weights[self.index[:, 0]] * self.values)
        errors = torch.einsum("n,nsp->sp", weights, self.errors.double()) / count
        drawn = weights > 0  # what a union over examples looks at
        kept = drawn[self.index[:, 0]]
        examples = replace(
            self, index=self.index[kept], values=self.values[kept], errors=self.errors * drawn[:, None, None]
        )
        return replace(scores, mean=total / count[scores.index[:, 1]], error_mean=errors, examples=examples)

    def strongest(self, scores: FeatureScores, sign: str, aggregate: str) -> FeatureScores:
        """Scores whose mean is each node's strongest example of that sign, where there is one (and else 0): what a union
        over examples ranks. aggregate "sum": of each example's sum over positions, which then stands at the first.
        """
        rows, errors = scores.index[self.index[:, 1]], self.errors
        if aggregate == "sum":
            rows = rows * torch.tensor([1, 0, 1])
            errors = torch.zeros_like(errors).index_copy_(2, torch.tensor([0]), errors.sum(2, keepdim=True))
        each, place = torch.cat([self.index[:, :1], rows], 1).unique(dim=0, return_inverse=True)
        values = torch.zeros(len(each), dtype=torch.float64).index_add_(0, place, self.values.double())
        index, place = each[:, 1:].unique(dim=0, return_inverse=True)
        signs: dict[str, Callable[[Tensor], Tensor]] = {
            "absolute": torch.abs,
            "positive": torch.clone,
            "negative": torch.neg,
        }
        strength = signs[sign]
        best = torch.zeros(len(index), dtype=torch.float64).scatter_reduce(0, place, strength(values), "amax")
        back = -1 if sign == "negative" else 1
        worst = strength(errors.double()).amax(0).clamp(min=0)
        return replace(scores, index=index, mean=back * best, variance=best * float("nan"), error_mean=back * worst)


@dataclass(frozen=True)
class FeatureScores:
    """Scores of every feature and of every site's error term, at every position.

    sites, sizes:   the sites in the order of a forward pass, and how many features each one's dictionary has.
    index:          Int[nonzero, 3], (site, pos, feature) of the features whose score is not 0 in every example.
    mean, variance: Float[nonzero] over examples (variance unbiased; NaN where n = 1). All other features: 0.
    error_mean, error_variance: Float[site, pos], of the error terms ε = x − x̂.
    n:              Int[pos], how many examples have the position. labels, axis: as in NodeScores.
    examples:       what `mean` averages, or None where it was not kept.
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
    examples: Examples | None = None

    @property
    def kind(self) -> str:
        return KIND

    @property
    def n_nodes(self) -> int:
        """Features and error terms, at all positions."""
        return len(self.labels) * (sum(self.sizes) + len(self.sites))

    @property
    def ranked(self) -> tuple[Tensor, ...]:
        """As NodeScores'."""
        return self.index, self.mean, self.error_mean

    @property
    def present(self) -> Bool[Tensor, "example pos"] | None:
        """Which examples have which positions, where scores were kept per example."""
        return None if self.examples is None else self.examples.present

    def resampled(self, weights: Float[Tensor, " example"]) -> FeatureScores:
        """With each example counted `weights` times; without variances. Needs per-example scores."""
        assert self.examples is not None
        return self.examples.weighed(self, weights)

    def flat(self) -> NodeScores:
        """The same numbers as scores of one layer whose units are each site's features and error term, zeros included."""

        def joined(what: str, errors: Tensor) -> Tensor:
            parts = [torch.cat([self.dense(s, what), e[:, None]], 1) for s, e in zip(self.sites, errors, strict=True)]
            return torch.cat(parts, 1)[None]

        mean, variance = joined("mean", self.error_mean), joined("variance", self.error_variance)
        scores = NodeScores(KIND, mean, variance, self.n, self.labels, self.axis, meta=self.meta)
        if self.examples is None or len(self.examples.present) * mean.numel() > KEEP_LIMIT:
            return scores
        start = torch.tensor([0, *self.sizes]).cumsum(0) + torch.arange(len(self.sizes) + 1)  # an error term per site
        dense = self.examples.values.new_zeros(len(self.examples.present), *mean.shape)
        site, pos, unit = self.index[self.examples.index[:, 1]].unbind(1)
        dense[self.examples.index[:, 0], 0, pos, start[site] + unit] = self.examples.values
        dense[:, 0, :, start[1:] - 1] = self.examples.errors.transpose(1, 2)
        return replace(scores, examples=dense, present=self.examples.present)

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
        if self.examples is not None:
            tensors |= {f"{_EXAMPLES}{name}": value for name, value in vars(self.examples).items()}
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
        """What `parts` gave. Raises ValueError for tensors that do not fit together, or are not finite."""
        nodes, at = len(tensors["index"]), (len(header["sites"]), len(header["labels"]))
        entries = tensors.get(f"{_EXAMPLES}values", tensors["mean"]).shape[0]
        expect(tensors, index=(None, 3), mean=(nodes,), variance=(nodes,), n=at[1:], error_mean=at, error_variance=at,
               example_index=(entries, 2), example_values=(entries,), example_errors=(None, *at),
               example_present=(None, at[1]))  # fmt: skip
        sites = [parse_site(name) for name in header["sites"]]
        kept = {n.removeprefix(_EXAMPLES): t for n, t in tensors.items() if n.startswith(_EXAMPLES)}
        return cls(
            tuple(s for s in sites if s), tuple(header["sizes"]), **{n: tensors[n] for n in _TENSORS},
            labels=tuple(header["labels"]), axis=header["axis"], meta=meta,
            examples=Examples(**kept) if kept else None,
        )  # fmt: skip
