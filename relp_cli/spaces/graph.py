"""The edge graph as data: who writes to the residual stream, who reads it, and which pairs are edges.

Writers, in the order in which they write: `input` (the token embedding), and per layer its heads `a{l}.h{h}` and its MLP
`m{l}`. Readers: per layer the heads' queries, keys and values `a{l}.h{h}<q|k|v>` (all q, then all k, then all v) and the
MLP, and last `logits`. An edge u→v exists where u writes before v reads; in parallel blocks the MLP does not read its own
layer's heads. Both orders are those of EAP-IG's score matrices (Hanna et al. 2024). Positional embeddings and the biases
of attention outputs are constants and belong to no writer; an MLP's output bias belongs to the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from relp_cli.errors import RelpError, unknown
from relp_cli.models.model import Shape

QKV = ("q", "k", "v")
MOST_EDGES = 1 << 31  # GPT-3 has 1.3e8; files may say anything


@dataclass(frozen=True)
class Graph:
    """Every edge of a model with `n_layers` blocks of `n_heads` (query) heads. Under grouped-query attention, the keys and
    values of a group are read once per query head, each with its own share.

    post_norm: a norm after attention scales all heads of a layer together, so that each depends on what the others read.
    """

    n_layers: int
    n_heads: int
    parallel: bool = False
    post_norm: bool = False

    def __post_init__(self) -> None:
        if self.n_edges > MOST_EDGES:
            raise RelpError(
                f"a graph of {self.n_layers} layers of {self.n_heads} heads is no model's: {self.n_edges} edges"
            )

    @classmethod
    def of(cls, shape: Shape) -> Graph:
        return cls(shape.n_layers, shape.n_heads, shape.parallel, shape.post_norm)

    @cached_property
    def writers(self) -> tuple[str, ...]:
        layers = [[*(f"a{n}.h{h}" for h in range(self.n_heads)), f"m{n}"] for n in range(self.n_layers)]
        return ("input", *(name for layer in layers for name in layer))

    @cached_property
    def readers(self) -> tuple[str, ...]:
        heads = [[f"a{n}.h{h}<{part}>" for part in QKV for h in range(self.n_heads)] for n in range(self.n_layers)]
        return (*(name for n, layer in enumerate(heads) for name in (*layer, f"m{n}")), "logits")

    def written_before(self, layer: int, what: str) -> int:
        """How many writers (a prefix of `writers`) a layer's "attention" or "mlp" reads; `layer` = n_layers: the logits."""
        before = 1 + layer * (self.n_heads + 1)
        return before + self.n_heads if what == "mlp" and not self.parallel else before

    def heads_of(self, layer: int) -> slice:
        """A layer's heads among the writers; the MLP follows them."""
        start = 1 + layer * (self.n_heads + 1)
        return slice(start, start + self.n_heads)

    def readers_of(self, layer: int) -> slice:
        """A layer's readers: its heads' q, k and v, then its MLP."""
        size = 3 * self.n_heads + 1
        return slice(layer * size, (layer + 1) * size)

    @cached_property
    def mask(self) -> Bool[Tensor, "writer reader"]:
        """True where there is an edge."""
        mask = torch.zeros(len(self.writers), len(self.readers), dtype=torch.bool)
        for layer in range(self.n_layers):
            columns = self.readers_of(layer)
            mask[: self.written_before(layer, "attention"), columns.start : columns.stop - 1] = True
            mask[: self.written_before(layer, "mlp"), columns.stop - 1] = True
        mask[:, -1] = True
        return mask

    @cached_property
    def n_edges(self) -> int:
        layers, heads = self.n_layers, self.n_heads
        before = layers + (heads + 1) * layers * (layers - 1) // 2  # writers before a layer, summed over layers
        own = 0 if self.parallel else layers * heads
        return before * (3 * heads + 1) + own + 1 + layers * (heads + 1)

    def each_edge(self) -> Iterator[str]:
        """`input->a0.h0<q>`, …, reader by reader, one at a time: a file may name a large graph."""
        for layer in range(self.n_layers):
            names = self.readers[self.readers_of(layer)]
            for what, readers in (("attention", names[:-1]), ("mlp", names[-1:])):
                yield from (f"{u}->{v}" for v in readers for u in self.writers[: self.written_before(layer, what)])
        yield from (f"{u}->logits" for u in self.writers)

    @cached_property
    def layers(self) -> Int[Tensor, " edge"]:
        """Every edge's layer: its reader's (the logits': n_layers), in row-major order."""
        return self.mask.nonzero()[:, 1] // (3 * self.n_heads + 1)

    def dense(self, values: Shaped[Tensor, "*batch edge"]) -> Shaped[Tensor, "*batch writer reader"]:
        """Values per edge, in row-major order, as matrices with 0 where there is no edge."""
        out = values.new_zeros(*values.shape[:-1], *self.mask.shape)
        out[..., self.mask] = values
        return out

    def edge_names(self) -> list[str]:
        """`input->a0.h0<q>`, …, in row-major order."""
        return list(self._edge_names)

    @cached_property
    def _edge_names(self) -> tuple[str, ...]:
        return tuple(self.name(u, v) for u, v in self.mask.nonzero().tolist())

    @cached_property
    def _positions(self) -> tuple[dict[str, int], dict[str, int]]:
        return {n: i for i, n in enumerate(self.writers)}, {n: i for i, n in enumerate(self.readers)}

    def writer(self, name: str) -> int:
        """A writer's row. Raises RelpError for a name that is none."""
        if name not in self._positions[0]:
            raise unknown("writer", name, self.writers)
        return self._positions[0][name]

    def reader(self, name: str) -> int:
        """A reader's column. Raises RelpError for a name that is none."""
        if name not in self._positions[1]:
            raise unknown("reader", name, self.readers)
        return self._positions[1][name]

    def name(self, writer: int, reader: int) -> str:
        """`a0.h3->a1.h0<q>`."""
        return f"{self.writers[writer]}->{self.readers[reader]}"

    @cached_property
    def nodes(self) -> dict[int, list[int]]:
        """What both reads and writes, in order: its row among the writers → its columns among the readers. The logits
        are −1.
        """
        columns: dict[int, list[int]] = {}
        for reader, name in enumerate(self.readers):
            columns.setdefault(self._positions[0].get(name.partition("<")[0], -1), []).append(reader)
        return dict(sorted(columns.items()))

    @cached_property
    def together(self) -> list[list[int]]:
        """Writers in the order of writing; those that a post-norm joins are one entry."""
        if not self.post_norm:
            return [[row] for row in range(1, len(self.writers))]
        layers = [self.heads_of(layer) for layer in range(self.n_layers)]
        return [rows for heads in layers for rows in (list(range(heads.start, heads.stop)), [heads.stop])]
