"""Nodes: vectors, heads, neurons and dimensions of the model's own activations (`nodes.kinds`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import NonNegativeInt, RootModel
from torch import Tensor

from relp_cli.errors import RelpError, unknown
from relp_cli.models.model import Model
from relp_cli.nodes.access import units as units_per_layer
from relp_cli.nodes.kinds import NODE_KINDS, mixed_note
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.files import expect, validated
from relp_cli.spaces.paths import layer_path
from relp_cli.spaces.scores import KindScores, Scores
from relp_cli.spaces.select import choose, circuit_of
from relp_cli.spaces.table import Entries
from relp_cli.spaces.units import Block, Units

MOST_NODES = 10**9  # of one kind in a file; the neurons of a 70B model at 100 positions are a fifth of this


def node_units(shapes: Mapping[str, tuple[int, int]]) -> Units:
    """Units of node kinds: kind → (layers, units per layer; 1 for vector nodes)."""
    return Units("nodes", tuple(Block(kind, n, size) for kind, (layers, size) in shapes.items() for n in range(layers)))


def units_of(model: Model, kinds: Sequence[str]) -> Units:
    """All units of some node kinds of a model."""
    return node_units({kind: (model.shape.n_layers, units_per_layer(model, NODE_KINDS[kind])) for kind in kinds})


def with_unit_axis(kind: str, table: Tensor) -> Tensor:
    """[..., layer, pos, unit] of a kind's table; vector nodes have one unit."""
    return table if len(NODE_KINDS[kind].axes) == 3 else table[..., None]


def without_unit_axis(kind: str, table: Tensor) -> Tensor:
    """Back: [..., layer, pos] for vector nodes."""
    return table if len(NODE_KINDS[kind].axes) == 3 else table[..., 0]


def node_blocks(scores: Mapping[str, Tensor], kinds: Sequence[str]) -> list[Tensor]:
    """Per kind and layer Float[batch, slot, unit], from kind → Float[batch, layer, slot, *unit]."""
    return [layer for kind in kinds for layer in with_unit_axis(kind, scores[kind]).unbind(1)]


def node_circuit(masks: Mapping[str, Tensor], labels: Sequence[str], meta: Mapping[str, Any] | None = None) -> Circuit:
    """A circuit from node kind → Bool[layer, pos, *unit]. Raises RelpError for masks that are none."""
    parts = {}
    for kind, mask in masks.items():
        axes = NODE_KINDS[kind].axes
        if mask.dtype != torch.bool or mask.ndim != len(axes):
            raise RelpError(
                f"circuit: {kind} needs a boolean mask [{', '.join(axes)}], got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        if mask.shape[1] != len(labels):
            raise RelpError(f"circuit: {kind} has {mask.shape[1]} positions for {len(labels)} labels")
        parts[kind] = with_unit_axis(kind, mask)
    units = node_units({kind: (part.shape[0], part.shape[2]) for kind, part in parts.items()})
    return Circuit(units, units.joined(list(parts.values())), tuple(labels), meta or {})


def node_scores(views: Mapping[str, KindScores], meta: Mapping[str, Any]) -> Scores:
    """Scores from one table per kind, of one position axis. Raises RelpError where these differ."""
    first, *others = views.values()
    if any(view.labels != first.labels for view in others):
        raise RelpError("scores of different position axes cannot form one circuit")
    units = node_units(
        {kind: tuple(with_unit_axis(kind, v.mean).shape[::2]) for kind, v in views.items()}  # type: ignore[misc]
    )

    def joined(name: str) -> Tensor:
        return units.joined([with_unit_axis(k, getattr(v, name)) for k, v in views.items()]).flatten(-2)

    kept = all(v.examples is not None for v in views.values())
    return Scores(
        units, first.labels, first.axis, first.n, joined("mean"), joined("variance"),
        examples=joined("examples") if kept else None, present=first.present, meta=meta,
    )  # fmt: skip


class _Nodes:
    file_keys = frozenset({"n_nodes", "nodes"})
    count = "n_nodes"
    sparse = False
    path = staticmethod(layer_path)
    circuit = staticmethod(node_circuit)
    joined = staticmethod(node_scores)

    def keys(self, units: Units) -> tuple[str, ...]:
        return units.kinds

    def view(self, scores: Scores, key: str) -> KindScores:
        def table(values: Tensor | None) -> Any:
            return None if values is None else without_unit_axis(key, scores.units.view(key, scores.dense(values)))

        return KindScores(
            key, table(scores.mean), table(scores.variance), scores.n, scores.labels, scores.axis,
            table(scores.examples), scores.present, scores.meta,
        )  # fmt: skip

    table = view

    def masks(self, circuit: Circuit) -> dict[str, Tensor]:
        units = circuit.units
        return {kind: without_unit_axis(kind, units.view(kind, circuit.mask)) for kind in units.kinds}

    def names(self, units: Units, which: Sequence[int]) -> list[str]:
        out = []
        for unit in which:
            block, number = units.block_of(unit)
            suffix = f".{number}" if len(NODE_KINDS[block.kind].axes) == 3 else ""
            out.append(f"{block.kind}.{block.layer}{suffix}")
        return out

    def columns(self, circuit: Circuit) -> dict[str, Any]:
        kinds = {
            kind: {
                "shape": list(mask.shape),
                **dict(zip(NODE_KINDS[kind].axes, mask.nonzero().T.tolist(), strict=True)),
            }
            for kind, mask in circuit.masks.items()
        }
        return {"n_nodes": circuit.n_nodes, "nodes": kinds}

    def read(self, content: Mapping[str, Any], labels: tuple[str, ...], meta: Mapping[str, Any]) -> Circuit:
        masks = {}
        for kind, columns in validated(_Columns, content["nodes"], "nodes").root.items():
            if kind not in NODE_KINDS:
                raise unknown("node kind", kind, NODE_KINDS, "nodes: ")
            axes = NODE_KINDS[kind].axes
            shape, at = columns.get("shape", []), [columns.get(axis, []) for axis in axes]
            fits = columns.keys() == {"shape", *axes} and len(shape) == len(axes) and len(set(map(len, at))) == 1
            if not fits or any(max(column, default=-1) >= n for column, n in zip(at, shape, strict=True)):
                raise RelpError(f"{kind} needs a shape and columns {', '.join(axes)} of equal length within it")
            if math.prod(shape) > MOST_NODES:
                raise RelpError(f"{kind}: a shape of {shape} has more than {MOST_NODES:,} nodes")
            masks[kind] = torch.zeros(shape, dtype=torch.bool)
            masks[kind][tuple(torch.tensor(column, dtype=torch.long) for column in at)] = True
        return node_circuit(masks, labels, meta)

    def tensors(self, scores: Scores, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        view = self.view(scores, key)
        tensors = {n: getattr(view, n) for n in ("mean", "variance", "examples")}
        # All kinds share these two, and in a file each has its own.
        tensors |= {n: None if t is None else t.clone() for n, t in (("n", view.n), ("present", view.present))}
        return {n: t for n, t in tensors.items() if t is not None}, {"labels": list(view.labels), "axis": view.axis}

    def from_tensors(self, entries: Entries, meta: Mapping[str, Any]) -> Scores:
        def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            """The others are joined; as they are, these would hold all of their file."""
            return {**tensors, **{name: tensors[name].clone() for name in ("n", "present") if name in tensors}}

        for kind, (tensors, header) in entries.items():
            labels, shape = len(header["labels"]), tuple(tensors["mean"].shape)
            per_layer = (None,) * (len(NODE_KINDS[kind].axes) - 2)
            expect(tensors, mean=(None, labels, *per_layer), variance=shape, n=(labels,), examples=(None, *shape),
                   present=(None, labels))  # fmt: skip
        return node_scores(
            {
                kind: KindScores(kind, labels=tuple(header["labels"]), axis=header["axis"], meta=meta, **own(tensors))
                for kind, (tensors, header) in entries.items()
            },
            meta,
        )

    def hashed(self, scores: Scores) -> list[Tensor]:
        return [self.view(scores, kind).mean for kind in scores.units.kinds]

    def select(self, scores: Scores, how: Mapping[str, float], options: Mapping[str, Any], **more: Any) -> Circuit:
        if more:
            raise RelpError(f"only edge and feature circuits can be selected with {', '.join(more)}")
        circuit = circuit_of(scores, choose(scores, how, **options), how, **options)
        mixed = mixed_note(circuit.units.kinds)
        return replace(circuit, meta={**circuit.meta, "note": mixed}) if mixed else circuit

    def row(self, units: Units, unit: int, position: str) -> dict[str, Any]:
        block, number = units.block_of(unit)
        within = number if len(NODE_KINDS[block.kind].axes) == 3 else None
        return {"kind": block.kind, "layer": block.layer, "position": position, "unit": within}

    def scored(self, scores: Scores, from_layer: int) -> int:
        """Of a re-scoring, its candidates: what is not 0."""
        upper = scores.dense(scores.mean)[:, scores.units.counted(from_layer)]
        return int((upper != 0).sum()) if "n_candidates" in scores.meta else upper.numel()

    def note(self, circuit: Circuit, ablation: str) -> str:
        return mixed_note(circuit.units.kinds)

    def about(self, circuits: Sequence[Circuit]) -> dict[str, list[Any]]:
        return {}

    def counts(self, circuit: Circuit) -> dict[str, tuple[Tensor, int]]:
        units = circuit.units
        return {
            kind: (mask.sum(-1), mask.numel())
            for kind, mask in ((kind, units.view(kind, circuit.mask)) for kind in units.kinds)
        }

    def check(self, model: Model, circuit: Circuit) -> None:
        want = units_of(model, circuit.units.kinds)
        for kind in circuit.units.kinds:
            shapes = [units.view(kind, torch.zeros(1, len(units))).shape[0::2] for units in (circuit.units, want)]
            if shapes[0] != shapes[1]:
                raise RelpError(
                    f"circuit: {kind} has {shapes[0][0]} layers of {shapes[0][1]}, model {model.name} needs "
                    f"{shapes[1][0]} of {shapes[1][1]}"
                )


class _Columns(RootModel[dict[str, dict[str, list[NonNegativeInt]]]]):
    pass


NODES = _Nodes()
