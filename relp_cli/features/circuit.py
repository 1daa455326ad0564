"""`FeatureCircuit`: which features and error terms are kept at each site, and one readable JSON file of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from relp_cli.circuits.circuit import SCHEMA, Strict, finite, positions_of, read_file, with_tau
from relp_cli.errors import RelpError, unknown
from relp_cli.features.graph import EdgeColumns, FeatureEdges, FeatureNode
from relp_cli.features.sites import Site, parse_site
from relp_cli.files import write_atomically
from relp_cli.tasks.pairs import PairBatch

TYPE = "relp feature circuit"
RANDOM = "random circuit"
# Which error terms a circuit may have (paper section 5.2); the others are ablated always, in a circuit's complement too.
ERRORS = {
    "all": "error terms of all sites are nodes",
    "residual": "those of attention and MLP are removed",
    "none": "all error terms are removed",
}


@dataclass(frozen=True)
class FeatureCircuit:
    """A set of features and error terms.

    features: site → Bool[pos, feature]; errors: site → Bool[pos]; True = in the circuit.
    labels:   one label per position; ("*",) means that a node is in at every position or at none.
    removed:  a row of ERRORS. Removed error terms are in no circuit and are not counted.
    edges:    between its nodes, where they were scored (`features.edges`); evaluation is of nodes alone.
    """

    features: Mapping[Site, Bool[Tensor, "pos feature"]]
    errors: Mapping[Site, Bool[Tensor, " pos"]]
    labels: tuple[str, ...]
    removed: str = "all"
    meta: Mapping[str, Any] = field(default_factory=dict)
    edges: FeatureEdges | None = None

    def __post_init__(self) -> None:
        if tuple(self.features) != tuple(self.errors) or tuple(self.features) != tuple(sorted(self.features)):
            raise RelpError("feature circuit: features and errors need the same sites, in the order of a forward pass")
        if len(set(self.labels)) < len(self.labels):
            raise RelpError("feature circuit: position labels must be distinct")
        for site, mask in self.features.items():
            shapes = (mask.ndim, mask.shape[0], tuple(self.errors[site].shape), mask.dtype, self.errors[site].dtype)
            if shapes != (2, len(self.labels), (len(self.labels),), torch.bool, torch.bool):
                raise RelpError(
                    f"feature circuit: {site.name} needs masks Bool[{len(self.labels)}, features] and Bool[pos]"
                )
            if not self.has_error(site) and self.errors[site].any():
                raise RelpError(f"feature circuit: the error term of {site.name} is removed and cannot be in it")

    def has_error(self, site: Site) -> bool:
        """Whether the site's error terms are nodes at all."""
        return self.removed == "all" or (self.removed == "residual" and site.kind not in ("attn", "mlp"))

    def counted(self, exclude: int = 0) -> int:
        """Nodes of the circuit at sites of layers ≥ `exclude` (the embedding counts as layer −1, in only if exclude is 0)."""
        sites = counted_sites(tuple(self.features), exclude)
        return sum(int(self.features[s].sum()) + int(self.errors[s].sum()) for s in sites)

    def possible(self, exclude: int = 0) -> int:
        """All nodes at those sites."""
        sites = counted_sites(tuple(self.features), exclude)
        return sum(self.features[s].numel() + (self.errors[s].numel() if self.has_error(s) else 0) for s in sites)

    @property
    def masks(self) -> dict[str, Bool[Tensor, "layer pos unit"]]:
        """As in node circuits: every site is a kind of one layer, and its error terms another of one unit."""
        features = {site.name: mask[None] for site, mask in self.features.items()}
        return features | {f"{site.name}/error": mask[None, :, None] for site, mask in self.errors.items()}

    def nodes(self) -> tuple[FeatureNode, ...]:
        """Its nodes in the order of a forward pass: per site features, then error terms."""
        found = []
        for site, mask in self.features.items():
            found += [FeatureNode(site, self.labels[p], unit) for p, unit in mask.nonzero().tolist()]
            found += [FeatureNode(site, self.labels[p], None) for p in self.errors[site].nonzero()[:, 0].tolist()]
        return tuple(found)

    def slots(self, batch: PairBatch) -> Int[Tensor, " pos"]:
        """Per position of a batch, which of the circuit's positions it is. Raises RelpError where it is none."""
        return torch.tensor(positions_of(self.labels, batch))

    @property
    def n_nodes(self) -> int:
        return self.counted()

    @property
    def n_possible(self) -> int:
        return self.possible()

    def without_errors(self, removed: str) -> FeatureCircuit:
        """The same circuit with fewer error terms: "residual" or "none" (a row of ERRORS)."""
        left = replace(
            self, removed=removed, edges=None, errors={s: torch.zeros_like(e) for s, e in self.errors.items()}
        )
        return replace(left, errors={s: e if left.has_error(s) else left.errors[s] for s, e in self.errors.items()})

    def complement(self) -> FeatureCircuit:
        errors = {s: ~e if self.has_error(s) else e for s, e in self.errors.items()}
        return replace(self, features={s: ~f for s, f in self.features.items()}, errors=errors, edges=None)

    def random_like(
        self, seed: int, exclude: int = 0, among: Mapping[Site, Bool[Tensor, "pos feature"]] | None = None
    ) -> FeatureCircuit:
        """As many features and as many error terms, drawn uniformly from the counted sites.

        among: the features that may be drawn; all of them, where they are fewer than the circuit has.
        """
        generator = torch.Generator().manual_seed(seed)
        features, errors = dict(self.features), dict(self.errors)
        sites = counted_sites(tuple(self.features), exclude)
        for masks, chosen in ((features, sites), (errors, [s for s in sites if self.has_error(s)])):
            flat = torch.cat([masks[s].flatten() for s in chosen]) if chosen else torch.zeros(0, dtype=torch.bool)
            drawn = torch.zeros_like(flat)
            pool = torch.arange(len(flat))
            if among is not None and masks is features:
                pool = torch.cat([among[s].flatten() for s in chosen]).nonzero()[:, 0]
            drawn[pool[torch.randperm(len(pool), generator=generator)[: int(flat.sum())]]] = True
            for site, part in zip(chosen, drawn.split([masks[s].numel() for s in chosen]), strict=True):
                masks[site] = part.view(masks[site].shape)
        meta = {**self.meta, "method": RANDOM}
        return replace(self, features=features, errors=errors, meta=meta, edges=None)

    def save(self, path: str | Path) -> None:
        """One JSON file: per site how many features there are, the kept ones as columns, and the kept errors' positions."""
        sites = {}
        for site, mask in self.features.items():
            pos, unit = mask.nonzero().T.tolist()
            errors = self.errors[site].nonzero()[:, 0].tolist()
            sites[site.name] = {"n_features": mask.shape[1], "pos": pos, "feature": unit, "error_pos": errors}
        content: dict[str, Any] = {"schema": SCHEMA, "type": TYPE, "meta": finite(dict(self.meta)), "labels": list(self.labels),
                   "errors": self.removed, "n_nodes": self.n_nodes, "sites": sites}  # fmt: skip
        if self.edges is not None:
            content["edges"] = finite(self.edges.columns())
        write_atomically(Path(path), json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> FeatureCircuit:
        """Read what `save` wrote. Raises RelpError for a file that is no feature circuit."""
        file = read_file(path, _File, TYPE)
        try:
            return file.circuit()
        except RelpError as error:
            raise RelpError(f"circuit file {path}: {error}") from error


class _SiteFile(Strict):
    """One site in a file: the kept features as columns (position, feature), and the kept errors' positions."""

    n_features: PositiveInt
    pos: list[NonNegativeInt]
    feature: list[NonNegativeInt]
    error_pos: list[NonNegativeInt]

    def masks(self, name: str, n_pos: int) -> tuple[Tensor, Tensor]:
        if len(self.pos) != len(self.feature):
            raise RelpError(f"sites.{name}: {len(self.pos)} positions for {len(self.feature)} features")
        if max((*self.pos, *self.error_pos), default=0) >= n_pos or max(self.feature, default=0) >= self.n_features:
            raise RelpError(f"sites.{name}: expected positions below {n_pos} and features below {self.n_features}")
        features = torch.zeros(n_pos, self.n_features, dtype=torch.bool)
        features[torch.tensor(self.pos, dtype=torch.long), torch.tensor(self.feature, dtype=torch.long)] = True
        errors = torch.zeros(n_pos, dtype=torch.bool)
        errors[torch.tensor(self.error_pos, dtype=torch.long)] = True
        return features, errors


class _File(Strict):
    """A circuit file, as `save` writes it."""

    schema_: int = Field(alias="schema")
    type: str
    meta: dict[str, Any]
    labels: list[str]
    errors: str
    n_nodes: int
    sites: dict[str, _SiteFile]
    edges: EdgeColumns | None = None

    def circuit(self) -> FeatureCircuit:
        if self.errors not in ERRORS:
            raise unknown("choice of error terms", self.errors, ERRORS)
        masks: dict[Site, tuple[Tensor, Tensor]] = {}
        for name, about in self.sites.items():
            site = parse_site(name)
            if site is None or site in masks:
                raise RelpError(f"sites: '{name}' is {'no site' if site is None else 'there twice'}")
            masks[site] = about.masks(name, len(self.labels))
        features, errors = ({s: pair[i] for s, pair in masks.items()} for i in (0, 1))
        circuit = FeatureCircuit(features, errors, tuple(self.labels), self.errors, with_tau(self.meta))
        if circuit.n_nodes != self.n_nodes:
            raise RelpError(f"n_nodes says {self.n_nodes}, but there are {circuit.n_nodes}")
        return circuit if self.edges is None else replace(circuit, edges=self.edges.edges(circuit.nodes()))


def counted_sites(sites: tuple[Site, ...], exclude: int) -> list[Site]:
    """Sites that an evaluation which excludes the first `exclude` layers ablates and counts."""
    return [site for site in sites if exclude == 0 or site.layer >= exclude]


def must_count(sites: tuple[Site, ...], exclude: int) -> None:
    """Raises RelpError where no site would be ablated or counted."""
    if not counted_sites(sites, exclude):
        raise RelpError(
            f"no site with a dictionary lies in layer {exclude} or above; exclude fewer (--exclude-layers 0)"
        )
