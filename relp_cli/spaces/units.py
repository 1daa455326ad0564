"""Units: what is scored, kept and ablated, whatever it is (components, heads, neurons, edges, features), in one flat order.

A *block* holds the units of one kind in one layer (of features: at one site). Blocks of a kind stand together. Scores and
circuits have one row per position and one column per unit, so that ranking, selecting, resampling, counting and drawing at
random are written once, for units of every space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from relp_cli.errors import unknown

ANY_POSITION = ("*",)  # the labels of what is the same at every position


@dataclass(frozen=True)
class Block:
    """`size` units of one kind in one layer. name: what people call the block where that is not its layer (a site)."""

    kind: str
    layer: int
    size: int
    name: str = ""


@dataclass(frozen=True)
class Units:
    """space:     the row of `spaces.table.SPACES` that knows how to run, patch and ablate them.
    blocks:    in the order of units, kind by kind.
    structure: what else the space needs to know of them (edges: the graph; features: the sites), or None.
    """

    space: str
    blocks: tuple[Block, ...]
    structure: Any = None

    def __len__(self) -> int:
        return self.starts[-1]

    @cached_property
    def starts(self) -> list[int]:
        """Number of each block's first unit, and at the end the number of units."""
        starts = [0]
        for block in self.blocks:
            starts.append(starts[-1] + block.size)
        return starts

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(block.kind for block in self.blocks))

    @cached_property
    def layer(self) -> Int[Tensor, " unit"]:
        """Every unit's layer: of edges, their reader's. What an evaluation that leaves out the first layers goes by."""
        if self.structure is not None and hasattr(self.structure, "layers"):
            return self.structure.layers
        sizes = torch.tensor([block.size for block in self.blocks], dtype=torch.long)
        return torch.tensor([block.layer for block in self.blocks], dtype=torch.long).repeat_interleave(sizes)

    def counted(self, from_layer: int) -> Bool[Tensor, " unit"]:
        """The units of layers ≥ `from_layer`; all of them (the embedding's features too) where that is 0."""
        return torch.ones(len(self), dtype=torch.bool) if from_layer == 0 else self.layer >= from_layer

    def span(self, kind: str) -> slice:
        """A kind's units. Raises RelpError for a kind that is not there."""
        at = [i for i, block in enumerate(self.blocks) if block.kind == kind]
        if not at:
            raise unknown("kind of units", kind, self.kinds)
        return slice(self.starts[at[0]], self.starts[at[-1] + 1])

    def only(self, kinds: Sequence[str]) -> Units:
        """The units of some kinds."""
        return Units(self.space, tuple(b for b in self.blocks if b.kind in kinds), self.structure)

    def view(self, kind: str, values: Tensor) -> Tensor:
        """One kind of values[..., pos, unit] as [..., layer, pos, size]; its blocks are of one size."""
        sizes = {block.size for block in self.blocks if block.kind == kind}
        part = values[..., self.span(kind)]
        return part.unflatten(-1, (-1, sizes.pop())).movedim(-2, -3)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """values[..., pos, unit] from one [..., layer, pos, size] per kind: what `view` took apart."""
        return torch.cat([part.movedim(-3, -2).flatten(-2) for part in parts], -1)

    def ordered(self, n_pos: int, where: Tensor | None = None) -> Int[Tensor, "cell 2"]:
        """(position, unit) of every cell, block by block and in a block position by position: the order in which ties are
        broken and random circuits are drawn. where: Bool[unit], units to be listed at all.
        """
        cells = []
        for start, stop in zip(self.starts, self.starts[1:], strict=False):
            units = torch.arange(start, stop) if where is None else start + where[start:stop].nonzero()[:, 0]
            cells.append(torch.cartesian_prod(torch.arange(n_pos), units).view(-1, 2))
        return torch.cat(cells) if cells else torch.zeros(0, 2, dtype=torch.long)

    def rank(self, pos: Tensor, unit: Tensor, n_pos: int) -> Tensor:
        """The place of cells in that order."""
        starts = torch.tensor(self.starts)
        block = torch.searchsorted(starts, unit.contiguous(), right=True) - 1
        start = starts[block]
        return n_pos * start + pos * (starts[block + 1] - start) + unit - start

    def block_of(self, unit: int) -> tuple[Block, int]:
        """A unit's block and its number in the block."""
        at = int(torch.searchsorted(torch.tensor(self.starts), unit, right=True)) - 1
        return self.blocks[at], unit - self.starts[at]
