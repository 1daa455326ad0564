"""`Circuit`: which nodes are kept, and one readable JSON file of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch import Tensor

from relp_cli.errors import RelpError, unknown
from relp_cli.files import read_json, write_atomically
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.tasks.pairs import PairBatch

SCHEMA = 1
ANY_POSITION = ("*",)
MOST_NODES = 10**9  # of one kind in a file; the neurons of a 70B model at 100 positions are a fifth of this


@dataclass(frozen=True)
class Circuit:
    """A set of nodes, of one or several kinds.

    masks:  node kind → Bool[layer, pos, *unit], True = in the circuit.
    labels: one label per position of the masks; ("*",) means that a node is in at every position or at none.
    meta:   how it was selected (τ, …), and the model, task and scores that it came from.
    """

    masks: Mapping[str, Tensor]
    labels: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels):
            raise RelpError("circuit: position labels must be distinct")
        for kind, mask in self.masks.items():
            want = len(NODE_KINDS[kind].axes)
            if mask.dtype != torch.bool or mask.ndim != want:
                raise RelpError(
                    f"circuit: {kind} needs a boolean mask [{', '.join(NODE_KINDS[kind].axes)}], "
                    f"got {mask.dtype} of shape {tuple(mask.shape)}"
                )
            if mask.shape[1] != len(self.labels):
                raise RelpError(f"circuit: {kind} has {mask.shape[1]} positions for {len(self.labels)} labels")

    @classmethod
    def from_mask(cls, kind: str, mask: Tensor, labels: tuple[str, ...] | None = None, **meta: Any) -> Circuit:
        """A circuit from anywhere: Bool[layer, pos, *unit]. Without labels, positions are raw (0, 1, …)."""
        mask = torch.as_tensor(mask)
        if labels is None:
            labels = tuple(str(i) for i in range(mask.shape[1] if mask.ndim > 1 else 0))
        return cls({kind: mask}, tuple(labels), meta)

    @property
    def n_nodes(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def n_possible(self) -> int:
        return sum(mask.numel() for mask in self.masks.values())

    def complement(self) -> Circuit:
        return replace(self, masks={kind: ~mask for kind, mask in self.masks.items()})

    def random_like(self, seed: int, from_layer: int = 0) -> Circuit:
        """As many nodes of each kind, drawn uniformly from the layers at or above `from_layer` (the counted ones)."""
        generator = torch.Generator().manual_seed(seed)
        masks = {}
        for kind, mask in self.masks.items():
            upper = mask[from_layer:]
            order = torch.randperm(upper.numel(), generator=generator)
            drawn = torch.zeros(upper.numel(), dtype=torch.bool)
            drawn[order[: int(upper.sum())]] = True
            masks[kind] = torch.cat([mask[:from_layer], drawn.view(upper.shape)])
        return replace(self, masks=masks, meta={**self.meta, "method": "random circuit", "selection": {"seed": seed}})

    def save(self, path: str | Path) -> None:
        """One JSON file: per kind its full shape and the kept nodes as columns (layer, pos, unit)."""
        kinds = {}
        for kind, mask in self.masks.items():
            columns = mask.nonzero().T.tolist()
            axes = NODE_KINDS[kind].axes
            kinds[kind] = {"shape": list(mask.shape), **dict(zip(axes, columns, strict=True))}
        content = {
            "schema": SCHEMA,
            "type": "relp node circuit",
            "meta": finite(dict(self.meta)),
            "labels": list(self.labels),
            "n_nodes": self.n_nodes,
            "nodes": kinds,
        }
        write_atomically(Path(path), json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote. Raises RelpError for a file that is not a circuit."""
        file = read_file(path, _File, "relp node circuit")
        masks = {}
        for kind, columns in file.nodes.items():
            if kind not in NODE_KINDS:
                raise unknown("node kind", kind, NODE_KINDS, f"circuit file {path}: nodes: ")
            axes = NODE_KINDS[kind].axes
            shape, found = columns.get("shape", []), [columns.get(axis, []) for axis in axes]
            fits = columns.keys() == {"shape", *axes} and len(shape) == len(axes) and len(set(map(len, found))) == 1
            if not fits or any(max(column, default=-1) >= n for column, n in zip(found, shape, strict=True)):
                raise RelpError(
                    f"circuit file {path}: {kind} needs a shape and columns {', '.join(axes)} of equal length within it"
                )
            if math.prod(shape) > MOST_NODES:
                raise RelpError(f"circuit file {path}: {kind}: a shape of {shape} has more than {MOST_NODES:,} nodes")
            masks[kind] = torch.zeros(shape, dtype=torch.bool)
            masks[kind][tuple(torch.tensor(column, dtype=torch.long) for column in found)] = True
        circuit = cls(masks, tuple(file.labels), with_tau(file.meta))
        if circuit.n_nodes != file.n_nodes:
            raise RelpError(f"circuit file {path}: n_nodes says {file.n_nodes}, but there are {circuit.n_nodes}")
        return circuit


class Strict(BaseModel):
    """Part of a circuit file: nothing unknown in it, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _File(Strict):
    schema_: int = Field(alias="schema")
    type: str
    meta: dict[str, Any]
    labels: list[str]
    n_nodes: int
    nodes: dict[str, dict[str, list[NonNegativeInt]]]


File = TypeVar("File", bound=BaseModel)


# What a circuit says of where it came from, and is compared by.
TEXTS = (
    "model",
    "revision",
    "task",
    "task_hash",
    "method",
    "metric",
    "direction",
    "baseline",
    "dictionary_hash",
    "scores",
)


def read_file(path: str | Path, form: type[File], kind: str) -> File:
    """A circuit file's content. Raises RelpError for one that is not of this kind and form."""
    content = read_json(path, "circuit file")
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or content.get("type") != kind:
        raise RelpError(f"circuit file {path}: expected a {kind} (schema {SCHEMA})")
    meta = content.get("meta")
    if isinstance(meta, dict):
        for key in TEXTS:
            if not isinstance(meta.get(key), str | None):
                raise RelpError(f"circuit file {path}: meta.{key}: expected text, got {meta[key]!r:.40}")
    try:
        return form.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise RelpError(f"circuit file {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def with_tau(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A file's metadata with τ as a number ("inf" in JSON). Raises RelpError for a selection or a τ that is none."""
    selection = meta.get("selection", {})
    if not isinstance(selection, dict):
        raise RelpError(f"meta.selection: expected an object, got {selection!r:.40}")
    try:
        return (
            {**meta, "selection": {**selection, "tau": float(selection["tau"])}} if "tau" in selection else dict(meta)
        )
    except (TypeError, ValueError):
        raise RelpError(f"meta.selection.tau: expected a number, got {selection['tau']!r:.40}") from None


def positions_of(labels: tuple[str, ...], batch: PairBatch) -> list[int]:
    """Per position of a batch, which of a circuit's positions it is. Raises RelpError where it is none."""
    if labels == ANY_POSITION:
        return [0] * batch.n_pos
    missing = [label for label in batch.labels if label not in labels]
    if missing:
        raise RelpError(
            f"the circuit has no position '{missing[0]}' (it has {', '.join(labels)}), but the pairs to evaluate have"
        )
    return [labels.index(label) for label in batch.labels]


def finite(value: Any) -> Any:
    """JSON has no infinity: τ = inf is written "inf"."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def tensor_hash(*tensors: Tensor) -> str:
    """A short content hash of tensors (float32 values), which ties a circuit to the scores it came from."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
