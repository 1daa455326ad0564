"""`EdgeCircuit`: which edges are kept, and one readable JSON file of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from pydantic import Field, PositiveInt
from torch import Tensor

from relp_cli.circuits.circuit import ANY_POSITION, SCHEMA, Circuit, Strict, finite, read_file, with_tau
from relp_cli.edges.graph import Graph
from relp_cli.edges.scores import KIND
from relp_cli.errors import RelpError
from relp_cli.files import read_json, write_atomically

TYPE = "relp edge circuit"


@dataclass(frozen=True)
class EdgeCircuit:
    """A set of edges of one graph.

    mask:   Bool[pos, writer, reader], True = in the circuit; one position for a circuit that is the same at all.
    labels: one label per position; ("*",) means that an edge is in at every position or at none.
    meta:   how it was selected (τ, …), and the model, task and scores that it came from.
    """

    graph: Graph
    mask: Bool[Tensor, "pos writer reader"]
    labels: tuple[str, ...] = ANY_POSITION
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels):
            raise RelpError("edge circuit: position labels must be distinct")
        want = (len(self.labels), *self.graph.mask.shape)
        if self.mask.dtype != torch.bool or tuple(self.mask.shape) != want:
            raise RelpError(
                f"edge circuit: expected a boolean mask [pos, writer, reader] = {list(want)}, "
                f"got {self.mask.dtype} of shape {list(self.mask.shape)}"
            )
        wrong = (self.mask & ~self.graph.mask).nonzero()
        if len(wrong):
            raise RelpError(
                f"edge circuit: {self.graph.name(*wrong[0, 1:].tolist())} is no edge (reads before it is written)"
            )

    @classmethod
    def from_mask(cls, graph: Graph, mask: Tensor, labels: Sequence[str] = ANY_POSITION, **meta: Any) -> EdgeCircuit:
        """A circuit from anywhere: Bool[writer, reader] or Bool[pos, writer, reader] with labels."""
        mask = torch.as_tensor(mask)
        return cls(graph, mask[None] if mask.ndim == 2 else mask, tuple(labels), meta)

    @classmethod
    def from_names(cls, graph: Graph, edges: Sequence[str], **meta: Any) -> EdgeCircuit:
        """A circuit from edge names (`a0.h3->a1.h0<q>`). Raises RelpError for names that are no edges."""
        mask = torch.zeros_like(graph.mask)
        for name in edges:
            writer, arrow, reader = name.partition("->")
            if not arrow:
                raise RelpError(f"edge '{name}': expected writer->reader, for example input->a0.h0<q>")
            mask[graph.writer(writer), graph.reader(reader)] = True
        return cls.from_mask(graph, mask, **meta)

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())

    @property
    def n_nodes(self) -> int:
        """What tables count: edges."""
        return self.n_edges

    @property
    def n_possible(self) -> int:
        return self.graph.n_edges * len(self.labels)

    @property
    def masks(self) -> dict[str, Bool[Tensor, "layer pos unit"]]:
        """For tables that count per layer: the edges into each layer's readers, the logits last. Not what is possible."""
        size = 3 * self.graph.n_heads + 1
        logits = torch.zeros_like(self.mask[..., :size])
        logits[..., 0] = self.mask[..., -1]
        layers = [self.mask[..., self.graph.readers_of(n)] for n in range(self.graph.n_layers)]
        return {KIND: torch.stack([*layers, logits]).flatten(2)}

    def edge_names(self) -> list[str]:
        """Kept edges; at any position, where there are several."""
        return [self.graph.name(u, v) for u, v in self.mask.any(0).nonzero().tolist()]

    def complement(self) -> EdgeCircuit:
        return replace(self, mask=self.graph.mask & ~self.mask)

    def random_like(self, seed: int, from_layer: int = 0) -> EdgeCircuit:
        """As many edges, drawn uniformly from those into readers at or above `from_layer`; lower ones stay."""
        counted = counted_edges(self.graph, from_layer)[None].expand_as(self.mask)
        order = torch.randperm(int(counted.sum()), generator=torch.Generator().manual_seed(seed))
        drawn = torch.zeros(len(order), dtype=torch.bool)
        drawn[order[: int(self.mask[counted].sum())]] = True
        mask = self.mask.clone()
        mask[counted] = drawn
        return replace(self, mask=mask, meta={**self.meta, "method": "random circuit", "selection": {"seed": seed}})

    def prune(self, from_input: bool = False) -> EdgeCircuit:
        """Without the edges that lead nowhere.

        Edges into nodes that do not reach the logits within the circuit change nothing, whatever the ablation, and go.
        from_input: edges out of nodes that `input` does not reach go too. This leaves the circuit's behaviour as it is
        only under counterfactual ablation, where such a node computes its patch value anyway; under zero or mean
        ablation a node that reads nothing but ablated values is not itself ablated, and its edges count.
        Over several positions a head connects any position to any other, and under post-norms the heads of a layer share
        a scale, so that what one of them reads matters to all: fewer edges are pruned, never more.
        """
        mask = self.mask & _leads_out(self.graph, self.mask)
        if from_input:
            mask = mask & _comes_in(self.graph, mask)
            mask = mask & _leads_out(self.graph, mask)
        selection = {**self.meta.get("selection", {}), "pruned": "from_input" if from_input else "dangling"}
        return replace(self, mask=mask, meta={**self.meta, "selection": selection})

    def save(self, path: str | Path) -> None:
        """One JSON file: the graph's size and the kept edges as columns."""
        pos, writers, readers = self.mask.nonzero().T.tolist()
        edges: dict[str, list[str]] = {
            "writer": [self.graph.writers[u] for u in writers],
            "reader": [self.graph.readers[v] for v in readers],
        }
        if self.labels != ANY_POSITION:
            edges["pos"] = [self.labels[p] for p in pos]
        content = {
            "schema": SCHEMA, "type": TYPE, "meta": finite(dict(self.meta)), "graph": asdict(self.graph),
            "labels": list(self.labels), "n_edges": self.n_edges, "edges": edges,
        }  # fmt: skip
        write_atomically(Path(path), json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EdgeCircuit:
        """Read what `save` wrote. Raises RelpError for what is no edge circuit."""
        file = read_file(path, _File, TYPE)
        graph, labels, edges = Graph(**file.graph.model_dump()), tuple(file.labels), file.edges
        lengths = {len(column) for column in (edges.writer, edges.reader, edges.pos) if column is not None}
        fits = set(edges.pos or ()) <= set(labels) and (edges.pos is None) == (labels == ANY_POSITION)
        if len(lengths) != 1 or not fits:
            raise RelpError(f"circuit file {path}: edges need columns of equal length, at positions among the labels")
        mask = torch.zeros(len(labels), *graph.mask.shape, dtype=torch.bool)
        at = [0] * len(edges.writer) if edges.pos is None else [labels.index(p) for p in edges.pos]
        try:
            mask[at, [graph.writer(n) for n in edges.writer], [graph.reader(n) for n in edges.reader]] = True
            circuit = cls(graph, mask, labels, with_tau(file.meta))
        except RelpError as error:
            raise RelpError(f"circuit file {path}: {error}") from error
        if circuit.n_edges != file.n_edges:
            raise RelpError(f"circuit file {path}: n_edges says {file.n_edges}, but there are {circuit.n_edges}")
        return circuit


class _Graph(Strict):
    n_layers: PositiveInt
    n_heads: PositiveInt
    parallel: bool = False
    post_norm: bool = False


class _Columns(Strict):
    writer: list[str]
    reader: list[str]
    pos: list[str] | None = None


class _File(Strict):
    schema_: int = Field(alias="schema")
    type: str
    meta: dict[str, Any]
    graph: _Graph
    labels: list[str]
    n_edges: int
    edges: _Columns


def load_circuit(path: str | Path) -> Circuit | EdgeCircuit:
    """A circuit file of either sort."""
    content = read_json(path, "circuit file")
    edges = isinstance(content, dict) and content.get("type") == TYPE
    return EdgeCircuit.load(path) if edges else Circuit.load(path)


def counted_edges(graph: Graph, from_layer: int) -> Bool[Tensor, "writer reader"]:
    """The edges into readers of layers ≥ `from_layer` and into the logits."""
    mask = graph.mask.clone()
    mask[:, : from_layer * (3 * graph.n_heads + 1)] = False
    return mask


def _leads_out(graph: Graph, mask: Tensor) -> Bool[Tensor, " reader"]:
    """Readers whose node reaches the logits over edges of the mask at any position (heads move between positions)."""
    edges = mask.any(0)
    useful = torch.zeros(len(graph.readers), dtype=torch.bool)
    useful[-1] = True
    for rows in reversed(graph.together):  # a node's readers all stand before those of its own output
        if (edges[rows] & useful).any():
            useful[[reader for row in rows for reader in graph.nodes[row]]] = True
    return useful


def _comes_in(graph: Graph, mask: Tensor) -> Bool[Tensor, "writer 1"]:
    """Writers that the input reaches over edges of the mask at any position."""
    edges = mask.any(0)
    reached = torch.zeros(len(graph.writers), dtype=torch.bool)
    reached[0] = True
    for rows in graph.together:
        columns = [reader for row in rows for reader in graph.nodes[row]]
        reached[rows] = bool((edges[:, columns] & reached[:, None]).any())
    return reached[:, None]
