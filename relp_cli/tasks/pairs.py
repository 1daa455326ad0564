"""Prompt pairs as text (`PromptPair`) and as token ids (`PairBatch`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.tasks.prompt import PromptPair

__all__ = ["PairBatch", "PromptPair", "in_batches"]


def _as_sets(values: Int[Tensor, " batch"] | Int[Tensor, "batch k"] | Sequence[object], what: str) -> Tensor:
    """Token ids as Int[batch, k]; rows shorter than k are filled with -1, which no metric reads."""
    if isinstance(values, Tensor):
        ids = values.long()
        return ids[:, None] if ids.ndim == 1 else ids
    rows = [tuple(v) if isinstance(v, (list, tuple, set, frozenset)) else (int(v),) for v in values]  # type: ignore[call-overload]
    if not rows or any(not row for row in rows):
        raise RelpError(f"PairBatch: every example needs at least one {what} token")
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [-1] * (width - len(row)) for row in rows], dtype=torch.long)


@dataclass(frozen=True)
class PairBatch:
    """Pairs of one token length, never padded.

    original, patch: Int[batch, pos] token ids, BOS included where used; `patch` is None for single prompts.
    answer, foil:    Int[batch, k] token ids; sets of different sizes are filled with -1 (Int[batch] is accepted).
    roles:           one label per position, or None (raw positions).

    Raises: RelpError where shapes disagree.
    """

    original: Tensor
    patch: Tensor | None
    answer: Tensor
    foil: Tensor
    roles: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "original", torch.as_tensor(self.original).long())
        if self.patch is not None:
            object.__setattr__(self, "patch", torch.as_tensor(self.patch).long())
        object.__setattr__(self, "answer", _as_sets(self.answer, "answer"))
        object.__setattr__(self, "foil", _as_sets(self.foil, "foil"))
        if self.original.ndim != 2 or 0 in self.original.shape:
            raise RelpError(
                f"PairBatch: original must be token ids [batch, pos], got shape {tuple(self.original.shape)}"
            )
        if self.patch is not None and self.patch.shape != self.original.shape:
            raise RelpError(
                f"PairBatch: original {tuple(self.original.shape)} and patch {tuple(self.patch.shape)} must have the "
                "same shape; pairs are never padded"
            )
        for name in ("answer", "foil"):
            if getattr(self, name).shape[0] != self.original.shape[0]:
                raise RelpError(f"PairBatch: {name} has {getattr(self, name).shape[0]} rows for {len(self)} pairs")
        if self.roles is not None and len(self.roles) != self.n_pos:
            raise RelpError(f"PairBatch: {len(self.roles)} roles for {self.n_pos} positions")

    def __len__(self) -> int:
        return int(self.original.shape[0])

    @property
    def n_pos(self) -> int:
        return int(self.original.shape[1])

    @property
    def labels(self) -> tuple[str, ...]:
        """One label per position: the roles, or the positions' numbers."""
        return self.roles or tuple(str(i) for i in range(self.n_pos))

    def index(self, labels: Sequence[str]) -> Int[Tensor, " pos"]:
        """Position → number of its label in `labels`, which has them all."""
        return torch.tensor([labels.index(label) for label in self.labels])

    def to(self, device: torch.device | str) -> PairBatch:
        return replace(
            self,
            original=self.original.to(device),
            patch=None if self.patch is None else self.patch.to(device),
            answer=self.answer.to(device),
            foil=self.foil.to(device),
        )

    def rows(self, index: slice | Tensor) -> PairBatch:
        """The same batch restricted to some of its pairs."""
        return replace(
            self,
            original=self.original[index],
            patch=None if self.patch is None else self.patch[index],
            answer=self.answer[index],
            foil=self.foil[index],
        )

    def split(self, size: int) -> list[PairBatch]:
        """Consecutive batches of at most `size` pairs."""
        return [self.rows(slice(i, i + size)) for i in range(0, len(self), size)]


def in_batches(pairs: Sequence[PairBatch], size: int, device: torch.device | str) -> list[PairBatch]:
    """The pairs in batches of at most `size`, on a device."""
    return [chunk.to(device) for batch in pairs for chunk in batch.split(size)]
