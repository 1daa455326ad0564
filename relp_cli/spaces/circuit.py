"""`Circuit`: which units are kept, of any space."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.spaces.files import load_circuit, save_circuit, tensor_hash
from relp_cli.spaces.shown import ShownCircuit
from relp_cli.spaces.table import SPACES, space_of
from relp_cli.spaces.units import ANY_POSITION, Units
from relp_cli.tasks.pairs import PairBatch

RANDOM = "random circuit"


@dataclass(frozen=True, repr=False)
class Circuit(ShownCircuit):
    """A set of units.

    units:  what there is to keep. mask: Bool[pos, unit], True = in the circuit.
    labels: one label per position; ("*",) means that a unit is in at every position or at none.
    meta:   how it was selected (τ, …), and the model, task and scores that it came from.
    edges:  between its units, where they were scored (`features.edges`); evaluation is of units alone.
    """

    units: Units
    mask: Bool[Tensor, "pos unit"]
    labels: tuple[str, ...] = ANY_POSITION
    meta: Mapping[str, Any] = field(default_factory=dict)
    edges: Any = None

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels):
            raise RelpError("circuit: position labels must be distinct")
        want = (len(self.labels), len(self.units))
        if self.mask.dtype != torch.bool or tuple(self.mask.shape) != want:
            raise RelpError(
                f"circuit: expected a boolean mask of {want[0]} positions × {want[1]} units, got {self.mask.dtype} of "
                f"shape {list(self.mask.shape)}"
            )

    @classmethod
    def from_mask(cls, kind: str, mask: Tensor, labels: Sequence[str] | None = None, **meta: Any) -> Circuit:
        """A circuit of nodes from anywhere: Bool[layer, pos, *unit]. Without labels, positions are raw (0, 1, …).

        Raises: RelpError for a kind that does not exist, and a mask that is none of its.
        """
        mask = torch.as_tensor(mask)
        if labels is None:
            labels = [str(i) for i in range(mask.shape[1] if mask.ndim > 1 else 0)]
        nodes: Any = SPACES["nodes"].load()
        circuit: Circuit = nodes.circuit({kind: mask}, labels, meta)
        return circuit

    @property
    def n_nodes(self) -> int:
        """What tables count: nodes, edges, or features and error terms."""
        return int(self.mask.sum())

    n_edges = n_nodes  # as people call them in circuits of edges

    @property
    def n_possible(self) -> int:
        return self.mask.numel()

    def counted(self, from_layer: int) -> int:
        """How many of its units lie in layers ≥ `from_layer`."""
        return int(self.mask[:, self.units.counted(from_layer)].sum())

    def possible(self, from_layer: int) -> int:
        """How many units there are in those layers, at all positions."""
        return int(self.units.counted(from_layer).sum()) * len(self.labels)

    def slots(self, batch: PairBatch) -> Int[Tensor, " pos"]:
        """Per position of a batch, which of the circuit's positions it is. Raises RelpError where it is none."""
        if self.labels == ANY_POSITION:
            return torch.zeros(batch.n_pos, dtype=torch.long)
        if self.labels == tuple(str(i) for i in range(batch.n_pos)):
            return torch.arange(batch.n_pos)
        if batch.roles is None:
            raise RelpError(
                f"the circuit's positions are {', '.join(self.labels)}, the pairs to evaluate have {batch.n_pos} without roles"
            )
        missing = [label for label in batch.labels if label not in self.labels]
        if missing:
            raise RelpError(
                f"the circuit has no position '{missing[0]}' (it has {', '.join(self.labels)}), but the pairs have it; "
                "`relp circuit --aggregate sum` makes circuits without positions"
            )
        return batch.index(self.labels)

    def complement(self) -> Circuit:
        return replace(self, mask=~self.mask, edges=None)

    def without(self, position: int, unit: int) -> Circuit:
        """The circuit less one unit at one position."""
        mask = self.mask.clone()
        mask[position, unit] = False
        return replace(self, mask=mask, edges=None)

    def random_like(self, seed: int, from_layer: int = 0, among: Bool[Tensor, "pos unit"] | None = None) -> Circuit:
        """As many units of each kind, drawn uniformly from the counted ones; those of lower layers stay.

        among: the units that may be drawn; where they are fewer than the circuit has of a kind, all of them.
        """
        generator = torch.Generator().manual_seed(seed)
        mask, counted = self.mask.clone(), self.units.counted(from_layer)
        for kind in self.units.kinds:
            here = torch.zeros(len(self.units), dtype=torch.bool)
            here[self.units.span(kind)] = counted[self.units.span(kind)]
            pos, unit = self.units.ordered(len(self.labels), here).unbind(1)
            pool = torch.arange(len(pos)) if among is None else among[pos, unit].nonzero()[:, 0]
            chosen = pool[torch.randperm(len(pool), generator=generator)[: int(mask[pos, unit].sum())]]
            mask[pos, unit] = False
            mask[pos[chosen], unit[chosen]] = True
        return replace(self, mask=mask, edges=None, meta={**self.meta, "method": RANDOM, "selection": {"seed": seed}})

    @property
    def masks(self) -> dict[str, Bool[Tensor, "layer pos *unit"]]:
        """The mask as tables of layers × positions (× units), by name (a node kind, a site)."""
        return space_of(self.units).masks(self)

    def names(self) -> list[str]:
        """Its units' names, in the order of units, without positions."""
        return space_of(self.units).names(self.units, self.mask.any(0).nonzero()[:, 0].tolist())

    edge_names = names  # as people call those of edges

    @property
    def hash(self) -> str:
        """A short hash of what it keeps: its kinds, positions and units."""
        masks = self.masks
        names = json.dumps([list(masks), list(self.labels)])
        return hashlib.sha256((names + tensor_hash(*masks.values())).encode()).hexdigest()[:12]

    def save(self, path: str | Path) -> None:
        """One readable JSON file, the kept units as columns."""
        save_circuit(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote. Raises RelpError for a file that is no circuit."""
        return load_circuit(path)
