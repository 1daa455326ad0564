"""`EdgeScores`: what every edge method returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relp_cli.edges.graph import Graph
from relp_cli.methods.scores import NodeScores, expect

KIND = "edges"
EVERYWHERE = ("*",)


@dataclass(frozen=True)
class EdgeScores:
    """Scores of every edge.

    graph:          the writers and readers, and where there are edges.
    mean, variance: Float[writer, reader] over examples, summed over positions; Float[pos, writer, reader] where positions
                    were kept (variance unbiased; NaN where n = 1). 0 where there is no edge.
    n:              Int[1] or Int[pos], how many examples.
    labels:         ("*",) or one label per position; axis: "all", "position" or "role" (see NodeScores).
    examples:       Float[example, pos | 1, edge], edges in row-major order of the mask, or None.
    present:        Bool[example, pos | 1], where `examples` is defined.
    """

    graph: Graph
    mean: Float[Tensor, "*pos writer reader"]
    variance: Float[Tensor, "*pos writer reader"]
    n: Int[Tensor, " pos"]
    labels: tuple[str, ...] = EVERYWHERE
    axis: str = "all"
    examples: Float[Tensor, "example pos edge"] | None = None
    present: Bool[Tensor, "example pos"] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return KIND

    @property
    def writers(self) -> tuple[str, ...]:
        """`input`, `a0.h3`, `m2`, …"""
        return self.graph.writers

    @property
    def readers(self) -> tuple[str, ...]:
        """`a1.h0<q>`, `m2`, `logits`, …"""
        return self.graph.readers

    @property
    def mask(self) -> Bool[Tensor, "writer reader"]:
        """True where an edge exists."""
        return self.graph.mask

    @property
    def n_edges(self) -> int:
        """Edges, times positions where these were kept."""
        return int(self.mask.sum()) * len(self.labels)

    @property
    def n_nodes(self) -> int:
        return self.n_edges

    @property
    def ranked(self) -> tuple[Tensor, ...]:
        """As NodeScores'."""
        return (self.mean,)

    def flat(self) -> NodeScores:
        """The same numbers as scores of one layer whose units are the edges, for everything that ranks or correlates."""

        def edges(t: Tensor) -> Tensor:
            return t.reshape(1, len(self.labels), *self.mask.shape)[..., self.mask]

        examples = None if self.examples is None else self.examples[:, None]
        return NodeScores(
            KIND,
            edges(self.mean),
            edges(self.variance),
            self.n,
            self.labels,
            self.axis,
            examples,
            self.present,
            self.meta,
        )

    def edge_names(self) -> list[str]:
        """`input->a0.h0<q>`, …, in the order of `flat()`'s units."""
        return [f"{self.writers[u]}->{self.readers[v]}" for u, v in self.mask.nonzero().tolist()]

    def dense(self, values: Float[Tensor, "... edge"]) -> Float[Tensor, "... writer reader"]:
        """Values per edge as matrices with 0 where there is no edge."""
        out = values.new_zeros(*values.shape[:-1], *self.mask.shape)
        out[..., self.mask] = values
        return out

    def resampled(self, weights: Float[Tensor, " example"]) -> EdgeScores:
        """With each example counted `weights` times; without variances. Needs per-example scores."""
        assert self.examples is not None
        assert self.present is not None
        count = (weights[:, None] * self.present).sum(0).clamp(min=1)
        mean = torch.einsum("n,npe->pe", weights, self.examples) / count[:, None]
        drawn = weights > 0  # what a union over examples looks at
        dense = self.dense(mean.double()).reshape(self.mean.shape)
        return replace(self, mean=dense, examples=self.examples[drawn], present=self.present[drawn])

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of one entry of a score file."""
        tensors = {n: getattr(self, n) for n in ("mean", "variance", "n", "examples", "present")}
        header = {"labels": list(self.labels), "axis": self.axis, "graph": asdict(self.graph)}
        return {n: t for n, t in tensors.items() if t is not None}, header

    @classmethod
    def from_parts(
        cls, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> EdgeScores:
        """What `parts` gave; `kind` is "edges". Raises ValueError for tensors that do not fit together, or are not finite."""
        assert kind == KIND
        graph, labels = Graph(**header["graph"]), len(header["labels"])
        shape = (*tensors["mean"].shape[:-2], *graph.mask.shape)
        expect(tensors, mean=shape, variance=shape, n=(labels,), present=(None, labels),
               examples=(None, labels, int(graph.mask.sum())))  # fmt: skip
        return cls(graph, labels=tuple(header["labels"]), axis=header["axis"], meta=meta, **tensors)
