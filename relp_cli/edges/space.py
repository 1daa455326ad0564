"""The space of edges: (u(source) − u(run))·∂L/∂(input of v) for every writer u and reader v of `Graph`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from relp_cli.edges.check import check_once
from relp_cli.edges.edge_patch import Patcher
from relp_cli.edges.gradients import FINAL, Products, Readers, inputs, reader_gradients
from relp_cli.edges.reads import reads
from relp_cli.edges.run import edge_logits
from relp_cli.edges.stream import Recorder, Written, keeping, mean_written, ungrouped, written
from relp_cli.errors import RelpError, unknown
from relp_cli.methods.request import Progress, Request
from relp_cli.methods.room import Room
from relp_cli.methods.score import position_axis
from relp_cli.methods.setup import Passes, Setup
from relp_cli.methods.share import Streams
from relp_cli.methods.space import Batch, Place, Point, added, of_point, together
from relp_cli.methods.table import Result
from relp_cli.models.model import Model
from relp_cli.nodes.access import EMBEDDED
from relp_cli.spaces.edges import KIND, edge_units
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.units import ANY_POSITION, Units
from relp_cli.tasks.pairs import PairBatch

POSITIONS = ("sum", "keep")


class Edges:
    """Every edge of a model. See `space.Scorer`. Raises: RelpError for no pairs, and `positions` that are none."""

    def __init__(
        self, model: Model, pairs: Sequence[PairBatch], _: Sequence[str], request: Request, options: Mapping[str, Any]
    ) -> None:
        positions = options.get("positions") or "sum"
        if positions not in POSITIONS:
            raise unknown("positions", positions, POSITIONS)
        if not pairs:
            raise RelpError("no prompt pairs to score")
        self.model, self.request, self.positions = model, request, positions == "keep"
        self.axis, self.labels = position_axis(pairs) if self.positions else ("all", ANY_POSITION)
        self.graph = Graph.of(model.shape)
        self.units = edge_units(self.graph)
        self.held = 0
        self.about = {"positions": positions, "n_edges": self.graph.n_edges, "d_model": model.shape.d_model}
        self.means: tuple[Written, tuple[str, ...]] | None = None

    def prepare(self, chunks: Sequence[PairBatch], passes: Passes) -> None:
        """What every writer writes on average over all originals, per position label; and that edges know this model."""
        if self.request.baseline == "mean":
            _, labels = position_axis(chunks)
            runs = ((written(self.model, c.original)[0], c.index(labels).to(self.model.device)) for c in chunks)
            self.means = mean_written(runs, len(labels)), labels
            passes.forward += len(chunks)
        check_once(self.model, chunks[0])

    def batch(self, chunk: PairBatch, passes: Passes, room: Room | None, tick: Progress | None) -> EdgeBatch:
        means = None
        if self.means is not None:
            index = chunk.index(self.means[1]).to(self.model.device)
            means = self.means[0].map(lambda t: t[index])
        setup = self.request.setup(self.model, chunk, (), passes, {} if means else None)
        return EdgeBatch(setup, self.graph, self.positions, means, room, tick)

    def blocks(self, scores: Mapping[str, Tensor]) -> list[Tensor]:
        """From Float[batch, writer, reader] or, with positions, Float[batch, slot, writer, reader]."""
        values = scores[KIND]
        return [values.reshape(len(values), -1, *self.graph.mask.shape)[..., self.graph.mask.to(values.device)]]


class EdgeBatch(Batch):
    """What every writer writes, and the gradient at every reader's input.

    positions: one score per edge and position. means: for baseline "mean", what writers write on average per label, at this
    batch's positions: Float[pos, width].
    """

    def __init__(
        self, setup: Setup, graph: Graph, positions: bool = False, means: Written | None = None,
        room: Room | None = None, tick: Progress | None = None,
    ) -> None:  # fmt: skip
        super().__init__(setup, room, tick)
        self.graph, self.positions, self.means = graph, positions, means

    @property
    def labels(self) -> tuple[str, ...]:
        return self.setup.labels if self.positions else ANY_POSITION

    def read_source(self) -> Written:
        """u(source) for every writer. 1 forward pass; with a zero baseline the run's, with a mean none."""
        if self.means is not None:
            return self.means.map(lambda t: t.expand(len(self), -1, -1))
        if self.setup.baseline == "zero":
            return self.run.map(torch.zeros_like)
        return self._written("source")

    def read_run(self) -> Written:
        return self._written("run")

    def read_at(self, points: Sequence[Point]) -> list[Written]:
        (moved, _), k, recorder = together(points), len(points), Recorder(self.model)
        with torch.no_grad(), self.model.hooks([*added(moved), *recorder.hooks()]):
            self.model.logits(self.setup.run.repeat(k, 1))
        self.setup.passes.forward += k
        written = recorder.written()
        return [written.map(lambda rows, i=i: of_point(rows, i, k)) for i in range(k)]  # type: ignore[misc]

    def _written(self, prompt: str) -> Written:
        recorder = Recorder(self.model)
        with torch.no_grad(), self.model.hooks(recorder.hooks()):
            logits = self.model.logits(getattr(self.setup, prompt))
        self.setup.seen[prompt] = self.setup.value(logits)
        self.setup.passes.forward += 1
        return recorder.written()

    @property
    def embedding_change(self) -> Tensor:
        change: Tensor = (self.source - self.run).input
        return change

    def gradients(self, points: Sequence[Point]) -> list[Readers]:
        return reader_gradients(self.setup, points)

    def places(self, exact: Any) -> Iterator[Place]:
        """One writing site at a time (the input, a layer's heads jointly, a layer's MLP), for its own edges.

        EAP-IG's code (`ig_activations`) averages the gradients of *all* edges over the moved runs of all sites instead.
        """
        if exact:
            raise RelpError("ig_activations moves all heads of a layer jointly; 'exact' is not for edges")
        delta, total = self.source - self.run, 2 * self.graph.n_layers + 1
        yield Place(EMBEDDED, delta.input, slice(0, 1))
        for layer in range(self.graph.n_layers):
            self.tick(2 * layer + 1, total, "writing sites")
            heads = self.graph.heads_of(layer)
            yield Place(f"blocks.{layer}.hook_attn_out", delta.heads_out(self.model, layer).sum(0), heads)
            self.tick(2 * layer + 2, total, "writing sites")
            yield Place(f"blocks.{layer}.hook_mlp_out", delta.mlps[layer], slice(heads.stop, heads.stop + 1))
        self.tick(total, total, "writing sites")

    def product(self, start: Written, end: Written, at: Readers) -> Mapping[str, Tensor]:
        return self.result(Products(self.model, self.graph, end - start, self.positions).scores(at)).scores

    def as_scored(self) -> AbstractContextManager[None]:
        return ungrouped(self.model)

    def read_streams(self) -> Streams:
        """What every reader reads."""
        read = [p for layer in range(self.model.shape.n_layers) for p in inputs(self.model, layer)]
        return Streams(self.setup, [*read, FINAL])

    def attribute(self, points: Iterable[Point]) -> Result:
        products = None
        total, applied = torch.zeros(()), {}
        for group in self.groups(points):
            moved = bool(group[0].moved)
            if products is None and moved:  # before a graph stands
                products = self._products()
            found = reader_gradients(self.setup, group, values=products is None)
            if products is None:
                self._read.setdefault("run", found[0].values)
                products = self._products()
            for point, at in zip(group, found, strict=True):
                weighed = at.weighed(point) if isinstance(point.weight, Tensor) else at
                factor = 1.0 if weighed is not at else point.weight
                streams = None if point.part == "whole" else self.streams
                scores = products.scores(weighed, point.of or slice(None), point.part, streams)
                total, applied = total + factor * scores, at.applied
            del found, at, weighed  # before the next pass, not during it
        return self.result(total, applied)

    def _products(self) -> Products:
        """Of source − run; neither is held beside their difference."""
        products = Products(self.model, self.graph, self.source - self.run, self.positions)
        for prompt in ("source", "run"):
            self._read.pop(prompt)
        return products

    def result(self, scores: Tensor, applied: dict[str, int] | None = None) -> Result:
        """Scores Float[batch, writer, reader] or, with positions, Float[batch, pos, writer, reader], on the slot axis."""
        slots = self.setup.to_slots(scores[:, None])[:, 0] if self.positions else scores
        return Result({KIND: slots}, applied or {}, self.meta)

    learning_steps: ClassVar[int] = 5000

    @cached_property
    def units(self) -> Units:
        return edge_units(self.graph)

    def changed(self) -> Bool[Tensor, "slot unit"]:
        """An edge is its writer's, with every reader alike."""
        source, run = self.source, self.read_run()
        writers = [(source.input != run.input).any(-1).any(0)[None]]
        for layer in range(self.graph.n_layers):
            heads = (source.heads[layer] != run.heads[layer]).any(0).unflatten(-1, (self.graph.n_heads, -1)).any(-1)
            writers += [heads.T, (source.mlps[layer] != run.mlps[layer]).any(-1).any(0)[None]]
        of_edges = torch.cat(writers)[self.graph.mask.nonzero()[:, 0].to(writers[0].device)].T  # [pos, edge]
        return self.setup.any_of_slots(of_edges) if self.positions else of_edges.any(0, keepdim=True)

    def masked(self, keep: Float[Tensor, "slot unit"]) -> Float[Tensor, " batch"]:
        at = keep[self.setup.slots.to(keep.device)] if self.positions else keep
        excluded = self.graph.dense(1 - at).to(self.model.device, self.model.dtype)
        self.setup.passes.forward += 1
        return self.setup.value(edge_logits(self.model, self.graph, self.setup.run, excluded, self.source))

    def of_units(self, values: Float[Tensor, "slot unit"]) -> dict[str, Tensor]:
        dense = self.graph.dense(values) if self.positions else self.graph.dense(values[0])
        return {KIND: dense.expand(len(self), *dense.shape)}

    def patch(self) -> Result:
        """All positions are patched jointly (an EAP score is the sum over them), or one label at a time."""
        source = self.source
        with keeping(self.model, [reads(self.model, n).stream for n in range(self.graph.n_layers)]) as streams:
            products = Products(self.model, self.graph, source - self.read_run())
        setup, deltas = self.setup, torch.cat([products.deltas(rows) for rows in products.parts], 1)
        slots = torch.ones(1, setup.batch.n_pos, dtype=torch.bool, device=self.model.device)
        if self.positions:
            slots = setup.slots[None] == torch.arange(len(setup.labels), device=self.model.device)[:, None]
        patcher = Patcher(setup, self.graph, self.room.patched, deltas, streams, slots)
        for reader in range(len(self.graph.readers)):
            patcher.reader(reader)
            self.tick(reader + 1, len(self.graph.readers), "edge_patch readers")
        return Result({KIND: patcher.out if self.positions else patcher.out[:, 0]})
