"""The space of nodes: sites of `NODE_KINDS`, by layer, position and unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.methods.core import Gradients, differences, gradients, products
from relp_cli.methods.means import mean_activations
from relp_cli.methods.patching import patch_nodes
from relp_cli.methods.request import Progress, Request
from relp_cli.methods.room import Room
from relp_cli.methods.score import position_axis
from relp_cli.methods.setup import Passes
from relp_cli.methods.space import Batch, Place, Point, added, of_part, of_point, together
from relp_cli.methods.table import Result
from relp_cli.models.model import Model
from relp_cli.nodes.access import Activations, capture, per_node, split, units
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind
from relp_cli.nodes.masked import keeping
from relp_cli.precision import wide
from relp_cli.spaces.nodes import node_blocks, units_of, without_unit_axis
from relp_cli.spaces.units import Units
from relp_cli.tasks.pairs import PairBatch


class Nodes:
    """The kinds that were asked for. See `space.Scorer`.

    Raises: RelpError for kinds that do not exist, and pairs that share no position axis.
    """

    def __init__(
        self, model: Model, pairs: Sequence[PairBatch], nodes: Sequence[str], request: Request, _: Mapping[str, Any]
    ) -> None:
        self.model, self.request = model, request
        self.about: dict[str, Any] = {}
        self.held = 0
        self.kinds = tuple(NODE_KINDS[name] for name in nodes)
        if not self.kinds or len(set(nodes)) != len(nodes):
            raise RelpError(f"expected node kinds, each once, got {list(nodes)}; known: {', '.join(NODE_KINDS)}")
        self.units = units_of(model, nodes)
        self.axis, self.labels = position_axis(pairs)
        self.means: Any = None

    def prepare(self, chunks: Sequence[PairBatch], passes: Passes) -> None:
        """The means of baseline "mean", and those of the embeddings, where paths end."""
        if self.request.baseline == "mean":
            kinds = tuple(dict.fromkeys((*self.kinds, NODE_KINDS["resid_pre"])))
            self.means = mean_activations(self.model, chunks, kinds, self.request.batch_size)
            passes.forward += len(chunks)

    def batch(self, chunk: PairBatch, passes: Passes, room: Room | None, tick: Progress | None) -> NodeBatch:
        means = None if self.means is None else self.means.at(chunk)
        return NodeBatch(self.request.setup(self.model, chunk, self.kinds, passes, means), room, tick)

    def blocks(self, scores: Mapping[str, Tensor]) -> list[Tensor]:
        """From kind → Float[batch, layer, slot, *unit]."""
        return node_blocks(scores, [kind.name for kind in self.kinds])


@dataclass(frozen=True)
class NodesAt:
    """Nodes of one layer and kind; mask: those that are meant, Bool[pos, unit] (None: all)."""

    kind: NodeKind
    layer: int
    mask: Bool[Tensor, "pos unit"] | None = None


class NodeBatch(Batch):
    """Activations of the node kinds; the features of a site (`features.space`) are read off the same."""

    parts_of_patch = True

    def read_source(self) -> Activations:
        return self.setup.source_activations()

    def read_run(self) -> Activations:
        return self.setup.run_activations()

    def read_at(self, points: Sequence[Point]) -> list[Activations]:
        (moved, _), k = together(points), len(points)
        with torch.no_grad(), self.model.hooks(added(moved)), capture(self.model, self.setup.kinds) as seen:
            self.model.logits(self.setup.run.repeat(k, 1))
        self.setup.passes.forward += k
        return [{kind: [of_point(v, i, k) for v in layers] for kind, layers in seen.items()} for i in range(k)]

    @property
    def embedding_change(self) -> Tensor:
        _ = self.source, self.run
        return wide(self.setup.inputs["source"]) - wide(self.setup.inputs["run"])

    def gradients(self, points: Sequence[Point]) -> Sequence[Gradients]:
        return gradients(self.setup, points)

    def places(self, exact: Any) -> Iterator[Place]:
        """Every kind's sites, all nodes of one jointly; the exact ones' one at a time, positions of a label together."""
        self.meta["interpolation"] = _interpolation(exact)
        slots = self.setup.slots[None] == torch.arange(len(self.setup.labels), device=self.model.device)[:, None]
        deltas = differences(self.source, self.run)
        for kind in self.setup.kinds:
            for layer, delta in enumerate(deltas[kind.name]):
                chosen, n_units = _chosen(self.model, kind, layer, exact), units(self.model, kind)
                if len(chosen) < n_units:
                    joint = torch.ones(len(slots[0]), n_units, dtype=torch.bool, device=self.model.device)
                    joint[:, chosen] = False
                    yield Place(kind.point(layer), delta, NodesAt(kind, layer, joint if chosen else None))
                for where in slots:
                    for unit in chosen:
                        mask = torch.zeros(len(where), n_units, dtype=torch.bool, device=self.model.device)
                        mask[:, unit] = where
                        yield Place(
                            kind.point(layer), _masked(self.model, kind, delta, mask), NodesAt(kind, layer, mask)
                        )

    def product(self, start: Activations, end: Activations, at: Gradients) -> dict[str, Tensor]:
        return products(self.setup, differences(end, start), at.grads)

    def attribute(self, points: Iterable[Point]) -> Result:
        scores: dict[str, Tensor] = {}

        def add(point: Point, name: str, layer: int, run: Tensor, grad: Tensor) -> None:
            kind, delta, grad = NODE_KINDS[name], wide(self.source[name][layer]) - wide(run), point.weigh(wide(grad))
            if point.part != "whole":
                grad = of_part(point.part, self.streams.shares(kind, layer, delta)) * grad
            product = per_node(self.model, kind, delta * grad)
            if name not in scores:
                layers = self.model.shape.n_layers
                scores[name] = product.new_zeros(len(product), layers, *product.shape[1:])
            scores[name][:, layer] += product

        applied = self.each_gradient((point for point in points if self.source), add)  # read before a graph stands
        return Result({k.name: self.setup.to_slots(scores[k.name]) for k in self.setup.kinds}, applied, self.meta)

    def each_gradient(
        self, points: Iterable[Point], take: Callable[[Point, str, int, Tensor, Tensor], None]
    ) -> dict[str, int]:
        """`take` is given every point's gradients when they arrive (point, kind, layer, the run's value, gradient), 0 for nodes
        that the point is not for. Returns the rules applied.
        """
        applied: dict[str, int] = {}
        for group in self.groups(points):

            def arrived(
                i: int, kind: str, layer: int, value: Tensor, grad: Tensor, group: Sequence[Point] = group
            ) -> None:
                take(group[i], kind, layer, self.run[kind][layer] if group[i].moved else value, grad)

            for point, at in zip(group, gradients(self.setup, group, arrived), strict=True):
                applied = at.applied
                if at.leaf is not None:
                    of: NodesAt = point.of
                    grad = at.leaf if of.mask is None else _masked(self.model, of.kind, at.leaf, of.mask)
                    take(point, of.kind.name, of.layer, self.run[of.kind.name][of.layer], grad)
        return applied

    def patch(self) -> Result:
        layers = range(self.model.shape.n_layers)
        every = {(kind.name, layer): None for kind in self.setup.kinds for layer in layers}
        source = self.setup.source_activations(self.setup.traced[1])
        found = patch_nodes(self.setup, source, every, self.room.patched, self.tick, self.unfinished)
        scores = {kind: torch.stack([found[kind.name, n] for n in layers], 1) for kind in self.setup.kinds}
        return Result({kind.name: v[..., 0] if kind.split == "vector" else v for kind, v in scores.items()})

    @cached_property
    def units(self) -> Units:
        return units_of(self.model, [kind.name for kind in self.setup.kinds])

    def changed(self) -> Bool[Tensor, "slot unit"]:
        found, run = [], self.read_run()
        for kind in self.setup.kinds:
            pairs = zip(self.source[kind.name], run[kind.name], strict=True)
            layers = [(split(self.model, kind, s) != split(self.model, kind, r)).any(-1).any(0) for s, r in pairs]
            found.append(torch.stack(layers))
        return self.setup.any_of_slots(self.units.joined(found))

    def masked(self, keep: Float[Tensor, "slot unit"]) -> Float[Tensor, " batch"]:
        at = keep[self.setup.slots.to(keep.device)]
        masks = {kind: self.units.view(kind, at).to(self.model.device, self.model.dtype) for kind in self.units.kinds}
        with self.model.hooks(keeping(self.model, self.setup.kinds, masks, self.source)):
            logits = self.model.logits(self.setup.run)
        self.setup.passes.forward += 1
        return self.setup.value(logits)

    def of_units(self, values: Float[Tensor, "slot unit"]) -> dict[str, Tensor]:
        views = {kind: without_unit_axis(kind, self.units.view(kind, values)) for kind in self.units.kinds}
        return {kind: view.expand(len(self), *view.shape) for kind, view in views.items()}


def _masked(model: Model, kind: NodeKind, value: Tensor, mask: Bool[Tensor, "pos unit"]) -> Tensor:
    """The value where the mask is, 0 elsewhere: Float[batch, pos, width]."""
    return (split(model, kind, value) * mask[..., None]).flatten(-2)


def _interpolation(exact: Any) -> str:
    if exact == "all":
        return "exact (one node at a time)"
    joint = "joint (one layer's site at once)"
    return f"exact (one node at a time) for layer, unit {list(exact)}; {joint} for the others" if exact else joint


def _chosen(model: Model, kind: NodeKind, layer: int, exact: Any) -> list[int]:
    """Units of this layer that are interpolated one at a time."""
    n_units, n_layers = units(model, kind), model.shape.n_layers
    if exact == "all":
        return list(range(n_units))
    for at, unit in exact:
        if not (0 <= at < n_layers and 0 <= unit < n_units):
            raise RelpError(
                f"exact: {kind.name} has no layer {at}, unit {unit}; there are {n_layers} layers of {n_units} units"
            )
    return sorted({unit for at, unit in exact if at == layer})
