"""Nodes and edges of a feature circuit as data: `FeatureNode`, `FeatureEdges`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeFloat, PositiveInt
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.spaces.sites import Site, parse_site
from relp_cli.spaces.units import ANY_POSITION

METRIC = "metric"
COLUMNS = ("source", "target", "score", "se", "n")


@dataclass(frozen=True)
class FeatureNode:
    """One feature of a site's dictionary, or the site's error term (feature None), at one position label ("*": at all)."""

    site: Site
    position: str
    feature: int | None

    @property
    def name(self) -> str:
        """`mlp_out_layer2/17@verb`, `resid_out_layer1/error@verb`; without a position where it is at all."""
        unit = "error" if self.feature is None else str(self.feature)
        return f"{self.site.name}/{unit}" + (f"@{self.position}" if self.position != ANY_POSITION[0] else "")


def parse_node(name: str) -> FeatureNode:
    """What `FeatureNode.name` wrote. Raises RelpError for any other text."""
    where, _, rest = name.partition("/")
    unit, at, position = rest.partition("@")
    site = parse_site(where)
    if site is None or not (unit == "error" or unit.isdigit()):
        raise RelpError(
            f"unknown node '{name}'; expected for example resid_out_layer1/17@verb or resid_out_layer1/error"
        )
    return FeatureNode(site, position if at else ANY_POSITION[0], None if unit == "error" else int(unit))


@dataclass(frozen=True)
class FeatureEdges:
    """Edges between nodes of a feature circuit, and from its nodes to the metric.

    nodes:  in the order of a forward pass.
    index:  Int[edge, 2], the numbers in `nodes` of the edge's source and target; len(nodes) stands for the metric.
    mean, variance: Float[edge] over examples (variance unbiased; NaN where n = 1), in units and with the sign of node scores.
    n:      Int[edge], how many examples have both positions.
    meta:   method, rules, and what threshold was applied.
    """

    nodes: tuple[FeatureNode, ...]
    index: Int[Tensor, "edge 2"]
    mean: Float[Tensor, " edge"]
    variance: Float[Tensor, " edge"]
    n: Int[Tensor, " edge"]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.mean)

    def names(self) -> list[tuple[str, str]]:
        """(source, target) of every edge."""
        names = [*(node.name for node in self.nodes), METRIC]
        return [(names[u], names[v]) for u, v in self.index.tolist()]

    def above(self, threshold: float) -> FeatureEdges:
        """Only the edges with |score| > threshold (Marks et al.'s T_E)."""
        kept = self._only(self.mean.abs() > threshold)
        return replace(kept, meta={**self.meta, "threshold": threshold, "n_scored": len(self)})

    def strongest(self, k: int) -> FeatureEdges:
        """The k edges with the largest |score|, in that order."""
        return self._only(self.mean.abs().argsort(descending=True, stable=True)[:k])

    def _only(self, chosen: Tensor) -> FeatureEdges:
        return replace(
            self, index=self.index[chosen], mean=self.mean[chosen], variance=self.variance[chosen], n=self.n[chosen]
        )

    def reaching(self) -> set[int]:
        """Numbers of the nodes from which a path of these edges leads to the metric."""
        found = {len(self.nodes)}
        for u, v in sorted(self.index.tolist(), reverse=True):  # sources in the reverse order of a forward pass
            if v in found:
                found.add(u)
        return found - {len(self.nodes)}

    def table(self) -> pd.DataFrame:
        """source, target (names), score, se (standard error), n; the largest |score| first."""
        ordered = self.strongest(len(self))
        pairs = ordered.names()
        errors = (ordered.variance / ordered.n).sqrt()
        columns = (
            [s for s, _ in pairs],
            [t for _, t in pairs],
            ordered.mean.tolist(),
            errors.tolist(),
            ordered.n.tolist(),
        )
        return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))

    def columns(self) -> dict[str, Any]:
        """As a circuit file holds them."""
        pairs = self.names()
        return {
            "meta": dict(self.meta), "source": [s for s, _ in pairs], "target": [t for _, t in pairs],
            "score": self.mean.tolist(), "variance": [None if v != v else v for v in self.variance.tolist()],
            "n": self.n.tolist(),
        }  # fmt: skip


class EdgeColumns(BaseModel):
    """Edges in a circuit file, as `FeatureEdges.columns` writes them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    meta: dict[str, Any]
    source: list[str]
    target: list[str]
    score: list[FiniteFloat]
    variance: list[NonNegativeFloat | None]
    n: list[PositiveInt]

    def edges(self, nodes: tuple[FeatureNode, ...]) -> FeatureEdges:
        """Among the nodes of the circuit. Raises RelpError for columns of several lengths, edges of other nodes, and edges
        that do not lead onwards.
        """
        if len({len(column) for column in (self.source, self.target, self.score, self.variance, self.n)}) != 1:
            raise RelpError("edges: columns of different lengths")
        number = {node.name: i for i, node in enumerate(nodes)} | {METRIC: len(nodes)}
        ends = []
        for names in zip(self.source, self.target, strict=True):
            if missing := [name for name in names if name not in number]:
                raise RelpError(f"edges: '{missing[0]}' is no node of the circuit")
            u, v = (number[name] for name in names)
            if u == len(nodes) or (v < len(nodes) and not nodes[u].site < nodes[v].site):
                raise RelpError(f"edges: {names[0]} → {names[1]} does not lead to a later site")
            ends.append((u, v))
        if len(set(ends)) < len(ends):
            raise RelpError("edges: some are there twice")
        variance = [math.nan if v is None else v for v in self.variance]
        return FeatureEdges(
            nodes, torch.tensor(ends, dtype=torch.long).view(-1, 2), torch.tensor(self.score, dtype=torch.float64),
            torch.tensor(variance, dtype=torch.float64), torch.tensor(self.n, dtype=torch.long), self.meta,
        )  # fmt: skip
