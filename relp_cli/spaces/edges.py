"""Edges of the residual stream's graph (`spaces.graph`), in row-major order of writers × readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from relp_cli.errors import RelpError, unknown
from relp_cli.models.model import Model
from relp_cli.spaces import pruning
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.connected import connected as strongest_connected
from relp_cli.spaces.files import expect, validated
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.paths import graph_path
from relp_cli.spaces.scores import KindScores, Scores
from relp_cli.spaces.select import choose, circuit_of
from relp_cli.spaces.shown import ShownView
from relp_cli.spaces.table import Entries
from relp_cli.spaces.units import ANY_POSITION, Block, Units

KIND = "edges"
PRUNING = ("none", "dangling", "from_input")


def edge_units(graph: Graph) -> Units:
    """All edges of a graph."""
    return Units("edges", (Block(KIND, 0, graph.n_edges),), graph)


def edge_circuit(
    graph: Graph, mask: Bool[Tensor, "*pos writer reader"], labels: Sequence[str] = ANY_POSITION, **meta: Any
) -> Circuit:
    """A circuit from anywhere: Bool[writer, reader], or Bool[pos, writer, reader] with labels. Raises RelpError for masks
    of another shape and where there is no edge.
    """
    mask = torch.as_tensor(mask)
    mask = mask[None] if mask.ndim == 2 else mask
    want = (len(labels), *graph.mask.shape)
    if mask.dtype != torch.bool or tuple(mask.shape) != want:
        raise RelpError(
            f"edge circuit: expected a boolean mask [pos, writer, reader] = {list(want)}, got {mask.dtype} of shape "
            f"{list(mask.shape)}"
        )
    wrong = (mask & ~graph.mask).nonzero()
    if len(wrong):
        raise RelpError(f"edge circuit: {graph.name(*wrong[0, 1:].tolist())} is no edge (reads before it is written)")
    return Circuit(edge_units(graph), mask[:, graph.mask], tuple(labels), meta)


def circuit_of_names(graph: Graph, edges: Sequence[str], **meta: Any) -> Circuit:
    """A circuit from edge names (`a0.h3->a1.h0<q>`). Raises RelpError for names that are no edges."""
    mask = torch.zeros_like(graph.mask)
    for name in edges:
        writer, arrow, reader = name.partition("->")
        if not arrow:
            raise RelpError(f"edge '{name}': expected writer->reader, for example input->a0.h0<q>")
        mask[graph.writer(writer), graph.reader(reader)] = True
    return edge_circuit(graph, mask, **meta)


def edge_mask(circuit: Circuit) -> Bool[Tensor, "pos writer reader"]:
    """A circuit of edges as matrices."""
    graph: Graph = circuit.units.structure
    return graph.dense(circuit.mask)


@dataclass(frozen=True, repr=False)
class EdgeScores(ShownView):
    """Scores of every edge.

    graph:          the writers and readers, and where there are edges.
    mean, variance: Float[writer, reader] over examples, summed over positions; Float[pos, writer, reader] where positions
                    were kept (variance unbiased; NaN where n = 1). 0 where there is no edge.
    n:              Int[1] or Int[pos], how many examples.
    labels:         ("*",) or one label per position; axis: "all", "position" or "role" (see KindScores).
    examples:       Float[example, pos | 1, edge], edges in row-major order of the mask, or None.
    present:        Bool[example, pos | 1], where `examples` is defined.
    """

    graph: Graph
    mean: Float[Tensor, "*pos writer reader"]
    variance: Float[Tensor, "*pos writer reader"]
    n: Int[Tensor, " pos"]
    labels: tuple[str, ...] = ANY_POSITION
    axis: str = "all"
    examples: Float[Tensor, "example pos edge"] | None = None
    present: Bool[Tensor, "example pos"] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

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
        return self.graph.n_edges * len(self.labels)

    n_nodes = n_edges

    def edge_names(self) -> list[str]:
        """`input->a0.h0<q>`, …, in the order of `examples`."""
        return self.graph.edge_names()

    @property
    def whole(self) -> Scores:
        """The same numbers as scores of units."""

        def flat(values: Tensor) -> Tensor:
            return values.reshape(len(self.labels), *self.mask.shape)[:, self.mask].flatten()

        examples = None if self.examples is None else self.examples.flatten(1)
        return Scores(
            edge_units(self.graph), self.labels, self.axis, self.n, flat(self.mean), flat(self.variance),
            examples=examples, present=self.present, meta=self.meta,
        )  # fmt: skip


class EdgeCircuit:
    """Makers of circuits of edges: each gives a `Circuit`."""

    from_mask = staticmethod(edge_circuit)
    from_names = staticmethod(circuit_of_names)
    load = staticmethod(Circuit.load)


class _Edges:
    file_keys = frozenset({"graph", "n_edges", "edges"})
    count = "n_edges"
    sparse = False
    path = staticmethod(graph_path)

    def keys(self, units: Units) -> tuple[str, ...]:
        return units.kinds

    def view(self, scores: Scores, key: str) -> EdgeScores:
        graph: Graph = scores.units.structure

        def matrices(values: Tensor) -> Tensor:
            dense = graph.dense(scores.dense(values))
            return dense[0] if scores.axis == "all" else dense

        examples = None if scores.examples is None else scores.dense(scores.examples)
        return EdgeScores(
            graph, matrices(scores.mean), matrices(scores.variance), scores.n, scores.labels, scores.axis, examples,
            scores.present, scores.meta,
        )  # fmt: skip

    def table(self, scores: Scores, key: str) -> KindScores:
        def layer(values: Tensor | None) -> Any:
            return None if values is None else scores.dense(values).unsqueeze(-3)

        return KindScores(
            key, layer(scores.mean), layer(scores.variance), scores.n, scores.labels, scores.axis,
            layer(scores.examples), scores.present, scores.meta,
        )  # fmt: skip

    def masks(self, circuit: Circuit) -> dict[str, Tensor]:
        """The edges into each layer's readers, the logits last."""
        graph: Graph = circuit.units.structure
        mask, size = edge_mask(circuit), 3 * graph.n_heads + 1
        logits = torch.zeros_like(mask[..., :size])
        logits[..., 0] = mask[..., -1]
        layers = [mask[..., graph.readers_of(n)] for n in range(graph.n_layers)]
        return {KIND: torch.stack([*layers, logits]).flatten(2)}

    def names(self, units: Units, which: Sequence[int]) -> list[str]:
        names = units.structure.edge_names()
        return [names[unit] for unit in which]

    def columns(self, circuit: Circuit) -> dict[str, Any]:
        graph: Graph = circuit.units.structure
        pos, writers, readers = edge_mask(circuit).nonzero().T.tolist()
        edges: dict[str, list[str]] = {
            "writer": [graph.writers[u] for u in writers],
            "reader": [graph.readers[v] for v in readers],
        }
        if circuit.labels != ANY_POSITION:
            edges["pos"] = [circuit.labels[p] for p in pos]
        return {"graph": asdict(graph), "n_edges": circuit.n_nodes, "edges": edges}

    def read(self, content: Mapping[str, Any], labels: tuple[str, ...], meta: Mapping[str, Any]) -> Circuit:
        graph = Graph(**validated(_Graph, content["graph"], "graph").model_dump())
        edges = validated(_Columns, content["edges"], "edges")
        lengths = {len(column) for column in (edges.writer, edges.reader, edges.pos) if column is not None}
        fits = set(edges.pos or ()) <= set(labels) and (edges.pos is None) == (labels == ANY_POSITION)
        if len(lengths) != 1 or not fits:
            raise RelpError("edges need columns of equal length, at positions among the labels")
        mask = torch.zeros(len(labels), *graph.mask.shape, dtype=torch.bool)
        at = [0] * len(edges.writer) if edges.pos is None else [labels.index(p) for p in edges.pos]
        mask[at, [graph.writer(n) for n in edges.writer], [graph.reader(n) for n in edges.reader]] = True
        return edge_circuit(graph, mask, labels, **meta)

    def tensors(self, scores: Scores, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        view = self.view(scores, key)
        tensors = {n: getattr(view, n) for n in ("mean", "variance", "n", "examples", "present")}
        header = {"labels": list(view.labels), "axis": view.axis, "graph": asdict(view.graph)}
        return {n: t for n, t in tensors.items() if t is not None}, header

    def from_tensors(self, entries: Entries, meta: Mapping[str, Any]) -> Scores:
        ((tensors, header),) = entries.values()
        graph, labels = Graph(**header["graph"]), len(header["labels"])
        shape = (*tensors["mean"].shape[:-2], *graph.mask.shape)
        expect(tensors, mean=shape, variance=shape, n=(labels,), present=(None, labels),
               examples=(None, labels, graph.n_edges))  # fmt: skip
        return EdgeScores(graph, labels=tuple(header["labels"]), axis=header["axis"], meta=meta, **tensors).whole

    def hashed(self, scores: Scores) -> list[Tensor]:
        return [self.view(scores, KIND).mean]

    def select(
        self,
        scores: Scores,
        how: Mapping[str, float],
        options: Mapping[str, Any],
        greedy: bool = False,
        prune: str = "none",
        connected: bool = False,
        **more: Any,
    ) -> Circuit:
        """greedy: grow from the logits (`pruning.greedy`). connected: the best k that lie on paths (`spaces.connected`).
        prune: of PRUNING; edges that lead nowhere go (`pruning.prune`).
        """
        if more:
            raise RelpError(f"--{next(iter(more))} is not for edge circuits")
        if prune not in PRUNING:
            raise unknown("pruning", prune, PRUNING)
        chosen = choose(scores, how, **options)
        if greedy:
            kept = pruning.greedy(scores.units.structure, chosen.strengths, how, chosen.tau)
            chosen = replace(chosen, mask=kept, amounts={"tau": chosen.tau})  # it takes the first edge that it reaches
        about: dict[str, Any] = {"greedy": greedy}
        if connected:
            if greedy or "top_k" not in how:
                raise RelpError("connected selection takes top_k, and is not greedy")
            best = strongest_connected(scores.units.structure, chosen.strengths, int(how["top_k"]))
            chosen = replace(chosen, mask=best.mask[None], amounts={"tau": chosen.tau})
            about |= best.about
        circuit = circuit_of(scores, chosen, how, **options, **about)
        return circuit if prune == "none" else pruning.prune(circuit, prune == "from_input")

    def row(self, units: Units, unit: int, position: str) -> dict[str, Any]:
        (name,) = self.names(units, [unit])
        return {"kind": KIND, "layer": int(units.layer[unit]), "position": position, "unit": name}

    def scored(self, scores: Scores, from_layer: int) -> int:
        return int(scores.units.counted(from_layer).sum()) * len(scores.labels)

    def note(self, circuit: Circuit, ablation: str) -> str:
        pruned = circuit.meta.get("selection", {}).get("pruned") == "from_input"
        return "pruned for counterfactual ablation" if pruned and ablation != "counterfactual" else ""

    def about(self, circuits: Sequence[Circuit]) -> dict[str, list[Any]]:
        return {}

    def counts(self, circuit: Circuit) -> dict[str, tuple[Tensor, int]]:
        return {KIND: (self.masks(circuit)[KIND].sum(-1), circuit.n_possible)}

    def check(self, model: Model, circuit: Circuit) -> None:
        graph, theirs = Graph.of(model.shape), circuit.units.structure
        if replace(theirs, post_norm=graph.post_norm) != graph:  # imported circuits do not say the latter
            raise RelpError(f"this circuit's graph ({_size(theirs)}) is not that of {model.name} ({_size(graph)})")


def _size(graph: Graph) -> str:
    return f"{graph.n_layers} {'parallel ' if graph.parallel else ''}layers of {graph.n_heads} heads"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Graph(_Strict):
    n_layers: PositiveInt
    n_heads: PositiveInt
    parallel: bool = False
    post_norm: bool = False


class _Columns(_Strict):
    writer: list[str]
    reader: list[str]
    pos: list[str] | None = None


EDGES = _Edges()
