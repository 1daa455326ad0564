"""How pairs are cut into batches, and the work on a batch into passes: everything that computes asks here.

A batch is what is read and held at once; a pass is one call of the model, whose rows are pairs, points of a path or patched runs.
Numbers do not depend on either beyond the rounding of floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from relp_cli import BATCH_SIZE
from relp_cli.tasks.pairs import PairBatch


def fitting(tokens: int, chunk_tokens: int) -> int:
    """How many copies of `tokens` tokens one pass of at most `chunk_tokens` holds; at least one."""
    return max(1, chunk_tokens // tokens)


@dataclass(frozen=True)
class Room:
    """How many tokens one pass may hold: `graph`, with the graph that leads back through them; `patched`, of runs with a patch.
    And a batch: at most so many `pairs`, and `batch` tokens (None: as many as they have). recompute: layers are computed again in
    the backward pass (`models.recompute`).

    On a CPU 192 tokens with a graph take 2 to 3 % longer than 1,024, and a fifth of the memory; patched runs take as long at
    1,024 as at 16,384 (docs/memory.md).
    """

    graph: int = 192
    patched: int = 2048
    pairs: int = BATCH_SIZE
    batch: int | None = None
    recompute: bool = False

    @classmethod
    def on(
        cls, device: torch.device, chunk_tokens: int | None = None, pairs: int = BATCH_SIZE, small: bool = False
    ) -> Room:
        """By default on a device. chunk_tokens: what a method was asked for instead. small: whether batches are as small as
        graphs need, unless a number of `pairs` was asked for.
        """
        room = cls(pairs=pairs) if device.type == "cpu" else cls(8192, 16384, pairs)
        if small and pairs == BATCH_SIZE:
            room = replace(room, batch=room.graph)
        return room if chunk_tokens is None else replace(room, graph=chunk_tokens, patched=chunk_tokens)

    @classmethod
    def of_tokens(cls, tokens: int, recompute: bool = False) -> Room:
        """Batches and passes of so many tokens, whatever the method. A patched run keeps next to nothing: four times as many."""
        return cls(tokens, 4 * tokens, tokens, tokens, recompute)

    @property
    def about(self) -> dict[str, bool]:
        """What metadata say of it."""
        return {"layers_recomputed": True} if self.recompute else {}

    def size(self, batch: PairBatch) -> int:
        """How many of these pairs a batch has at most."""
        return self.pairs if self.batch is None else min(self.pairs, fitting(batch.n_pos, self.batch))

    def batches(self, pairs: Sequence[PairBatch], device: torch.device | str) -> list[PairBatch]:
        """The pairs in batches, on a device."""
        return [chunk.to(device) for batch in pairs for chunk in batch.split(self.size(batch))]

    def halved(self, pairs: int) -> Room:
        """For what memory did not hold, a batch of so many pairs."""
        return replace(self, graph=max(1, self.graph // 2), patched=max(1, self.patched // 2), pairs=-(-pairs // 2))
