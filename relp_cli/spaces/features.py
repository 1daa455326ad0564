"""Features and error terms of sparse dictionaries, at sites of the residual stream (`spaces.sites`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relp_cli.errors import RelpError, unknown
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.feature_graph import FeatureNode
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.shown import ShownView
from relp_cli.spaces.sites import Site, parse_site
from relp_cli.spaces.units import Block, Units

KIND, ERROR = "feature", "feature_error"
# Which error terms are units (paper section 5.2); the others are ablated always, in a circuit's complement too.
ERRORS = {
    "all": "error terms of all sites are nodes",
    "residual": "those of attention and MLP are removed",
    "none": "all error terms are removed",
}


@dataclass(frozen=True)
class Sites:
    """sites, sizes: in the order of a forward pass, and how many features each one's dictionary has; removed: of ERRORS."""

    sites: tuple[Site, ...]
    sizes: tuple[int, ...]
    removed: str = "all"

    def has_error(self, site: Site) -> bool:
        """Whether the site's error terms are units at all."""
        return self.removed == "all" or (self.removed == "residual" and site.kind not in ("attn", "mlp"))

    def units(self) -> Units:
        features = [Block(KIND, s.layer, n, s.name) for s, n in zip(self.sites, self.sizes, strict=True)]
        errors = [Block(ERROR, s.layer, 1, s.name) for s in self.sites if self.has_error(s)]
        return Units("features", (*features, *errors), self)

    def at(self, site: Site | str) -> int:
        """A site's number. Raises RelpError for a site that is not there."""
        wanted = parse_site(site) if isinstance(site, str) else site
        if wanted not in self.sites:
            raise RelpError(f"no scores for site '{site}'; there are {', '.join(s.name for s in self.sites)}")
        return self.sites.index(wanted)


def sites_of(units: Units) -> Sites:
    """The sites of units of features."""
    sites: Sites = units.structure
    return sites


def spans_of(units: Units) -> dict[str, dict[str, slice]]:
    """Site's name → kind → its features' or its error term's place among the units (removed error terms have none)."""
    spans: dict[str, dict[str, slice]] = {}
    for block, start in zip(units.blocks, units.starts, strict=False):
        spans.setdefault(block.name, {})[block.kind] = slice(start, start + block.size)
    return spans


def feature_circuit(
    features: Mapping[Site, Bool[Tensor, "pos feature"]],
    errors: Mapping[Site, Bool[Tensor, " pos"]],
    labels: Sequence[str],
    removed: str = "all",
    meta: Mapping[str, Any] | None = None,
) -> Circuit:
    """A circuit from masks per site. Raises RelpError for sites and shapes that do not fit, and kept errors that are removed."""
    if removed not in ERRORS:
        raise unknown("choice of error terms", removed, ERRORS)
    if tuple(features) != tuple(errors) or tuple(features) != tuple(sorted(features)):
        raise RelpError("feature circuit: features and errors need the same sites, in the order of a forward pass")
    sites = Sites(tuple(features), tuple(mask.shape[-1] for mask in features.values()), removed)
    for site, mask in features.items():
        shapes = (mask.ndim, mask.shape[0], tuple(errors[site].shape), mask.dtype, errors[site].dtype)
        if shapes != (2, len(labels), (len(labels),), torch.bool, torch.bool):
            raise RelpError(f"feature circuit: {site.name} needs masks Bool[{len(labels)}, features] and Bool[pos]")
        if not sites.has_error(site) and errors[site].any():
            raise RelpError(f"feature circuit: the error term of {site.name} is removed and cannot be in it")
    kept = [errors[site][:, None] for site in sites.sites if sites.has_error(site)]
    return Circuit(sites.units(), torch.cat([*features.values(), *kept], 1), tuple(labels), meta or {})


def feature_masks(circuit: Circuit) -> dict[Site, tuple[Bool[Tensor, "pos feature"], Bool[Tensor, " pos"]]]:
    """Per site which features and which error terms are kept (of removed ones, none)."""
    sites, units = sites_of(circuit.units), circuit.units
    parts = dict(zip(units.blocks, circuit.mask.split([b.size for b in units.blocks], 1), strict=True))
    features = {b.name: part for b, part in parts.items() if b.kind == KIND}
    errors = {b.name: part[:, 0] for b, part in parts.items() if b.kind == ERROR}
    nothing = torch.zeros(len(circuit.labels), dtype=torch.bool)
    return {s: (features[s.name], errors.get(s.name, nothing)) for s in sites.sites}


def without_errors(circuit: Circuit, removed: str) -> Circuit:
    """The same circuit with fewer error terms: "residual" or "none" (a row of ERRORS)."""
    if removed not in ERRORS:
        raise unknown("choice of error terms", removed, ERRORS)
    sites, masks = sites_of(circuit.units), feature_masks(circuit)
    left = Sites(sites.sites, sites.sizes, removed)
    errors = {s: e & left.has_error(s) & sites.has_error(s) for s, (_, e) in masks.items()}
    return feature_circuit({s: f for s, (f, _) in masks.items()}, errors, circuit.labels, removed, circuit.meta)


def with_errors(scores: Scores, removed: str) -> Scores:
    """The scores of fewer error terms: a row of ERRORS. Raises RelpError for any other name."""
    if removed not in ERRORS:
        raise unknown("choice of error terms", removed, ERRORS)
    sites, units = sites_of(scores.units), scores.units
    fewer = replace(sites, removed=removed)
    wanted = [block.kind == KIND or fewer.has_error(parse_site(block.name)) for block in units.blocks]  # type: ignore[arg-type]
    kept = torch.tensor(wanted).repeat_interleave(torch.tensor([block.size for block in units.blocks]))
    return scores.restricted(fewer.units(), kept)


def counted_sites(sites: Sequence[Site], from_layer: int) -> list[Site]:
    """Sites that an evaluation which leaves out the first layers ablates and counts."""
    return [site for site in sites if from_layer == 0 or site.layer >= from_layer]


def must_count(sites: Sequence[Site], from_layer: int) -> None:
    """Raises RelpError where no site would be ablated or counted."""
    if not counted_sites(sites, from_layer):
        raise RelpError(
            f"no site with a dictionary lies in layer {from_layer} or above; exclude fewer (--exclude-layers 0)"
        )


def feature_nodes(circuit: Circuit) -> tuple[FeatureNode, ...]:
    """Its nodes in the order of a forward pass: per site features, then error terms."""
    nodes = []
    for site, (mask, errors) in feature_masks(circuit).items():
        nodes += [FeatureNode(site, circuit.labels[p], unit) for p, unit in mask.nonzero().tolist()]
        nodes += [FeatureNode(site, circuit.labels[p], None) for p in errors.nonzero()[:, 0].tolist()]
    return tuple(nodes)


@dataclass(frozen=True, repr=False)
class FeatureScores(ShownView):
    """Scores of the features and error terms of all sites. whole: the same as scores of units."""

    whole: Scores

    @property
    def sites(self) -> tuple[Site, ...]:
        return sites_of(self.whole.units).sites

    def __len__(self) -> int:
        return len(self.whole.mean)  # those that are not 0 in every pair

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many features each site's dictionary has."""
        return sites_of(self.whole.units).sizes

    @property
    def labels(self) -> tuple[str, ...]:
        return self.whole.labels

    @property
    def axis(self) -> str:
        return self.whole.axis

    @property
    def n(self) -> Int[Tensor, " pos"]:
        return self.whole.n

    @property
    def meta(self) -> Mapping[str, Any]:
        return self.whole.meta

    @property
    def present(self) -> Bool[Tensor, "example pos"] | None:
        return self.whole.present

    @property
    def n_nodes(self) -> int:
        """Features and error terms, at all positions."""
        return self.whole.n_nodes

    def at(self, site: Site | str) -> int:
        """A site's number. Raises RelpError for a site that has no scores."""
        return sites_of(self.whole.units).at(site)

    def dense(self, site: Site | str, what: str = "mean") -> Float[Tensor, "pos feature"]:
        """`mean` or `variance` of one site's features at every position, zeros included."""
        number, units = self.at(site), self.whole.units
        return self.whole.dense(getattr(self.whole, what))[:, units.starts[number] : units.starts[number + 1]]

    def errors(self, what: str = "mean") -> Float[Tensor, "site pos"]:
        """`mean` or `variance` of the error terms, 0 for those that are removed."""
        units, dense = self.whole.units, self.whole.dense(getattr(self.whole, what))
        at = {b.name: start for b, start in zip(units.blocks, units.starts, strict=False) if b.kind == ERROR}
        nothing = dense.new_zeros(len(dense))
        return torch.stack([dense[:, at[s.name]] if s.name in at else nothing for s in self.sites])

    @property
    def error_mean(self) -> Float[Tensor, "site pos"]:
        return self.errors()

    @property
    def error_variance(self) -> Float[Tensor, "site pos"]:
        return self.errors("variance")

    def total(self, site: Site | str) -> Float[Tensor, " pos"]:
        """Features and error term summed: for gradient scores, the score of the site's whole vector."""
        return self.dense(site).sum(1) + self.error_mean[self.at(site)]
