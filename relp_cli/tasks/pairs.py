"""Prompt pairs as text (`PromptPair`) and as token ids (`PairBatch`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from relp_cli.errors import RelpError, visible
from relp_cli.tasks.prompt import PromptPair

__all__ = ["PairBatch", "PromptPair", "batches_of", "in_batches"]


def _as_sets(values: Int[Tensor, "batch ..."] | Sequence[object], what: str) -> Tensor:
    """Token ids as Int[batch, k]; rows shorter than k are filled with -1, which no metric reads."""
    if isinstance(values, Tensor):
        ids = values.long()
        return ids[:, None] if ids.ndim == 1 else ids
    rows = [tuple(v) if isinstance(v, (list, tuple, set, frozenset)) else (int(v),) for v in values]  # type: ignore[call-overload]
    if not rows or any(not row for row in rows):
        raise RelpError(f"PairBatch: every example needs at least one {what} token")
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [-1] * (width - len(row)) for row in rows], dtype=torch.long)


def _as_ids(values: Any, what: str) -> Tensor:
    """Raises RelpError for texts, and for rows of several lengths."""
    try:
        return torch.as_tensor(values).long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RelpError(
            f"PairBatch: {what} must be token ids [batch, pos], all rows of one length (texts: relp.pairs_from)"
        ) from error


@dataclass(frozen=True, repr=False)
class PairBatch:
    """Pairs of one token length, never padded.

    original, patch: Int[batch, pos] token ids, BOS included where used; `patch` is None for single prompts.
    answer, foil:    Int[batch, k] token ids; sets of different sizes are filled with -1 (Int[batch] is accepted). Or, of both,
                     Int[batch, 1, k]: k tokens that follow one another (no foil: -1), for metric answer_logprob (`parts`).
    roles:           one label per position, or None (raw positions).
    read, pair:      of a part alone: how many last positions the metric reads, and which pair each row is of (Int[batch]).

    Raises: RelpError where shapes disagree.
    """

    original: Tensor
    patch: Tensor | None
    answer: Tensor
    foil: Tensor
    roles: tuple[str, ...] | None = None
    read: int = 1
    pair: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "original", _as_ids(self.original, "original"))
        if self.patch is not None:
            object.__setattr__(self, "patch", _as_ids(self.patch, "patch"))
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
        if 3 in (self.answer.ndim, self.foil.ndim):
            self._check_sequences()

    def _check_sequences(self) -> None:
        shapes = [tuple(ids.shape) for ids in (self.answer, self.foil)]
        if any(len(shape) != 3 or shape[1] != 1 or not shape[2] for shape in shapes):
            raise RelpError(f"PairBatch: answer and foil of several tokens must both be [batch, 1, k], got {shapes}")
        none = bool((self.foil < 0).all())
        if bool((self.answer < 0).any()) or (bool((self.foil < 0).any()) and not none):
            raise RelpError(
                "PairBatch: answers of several tokens have one length, and so have foils; they are never padded"
            )

    def __len__(self) -> int:
        return int(self.original.shape[0])

    def __repr__(self) -> str:
        patch = "without patch prompts" if self.patch is None else "with patch prompts"
        roles = "" if self.roles is None else f", roles {' '.join(map(visible, self.roles))}"
        return f"PairBatch({len(self)} pairs of {self.n_pos} tokens, {patch}{roles})"

    @property
    def n_pos(self) -> int:
        return int(self.original.shape[1])

    @property
    def several(self) -> bool:
        """Whether answers are sequences of tokens, which only `parts` of the batch can be scored with."""
        return self.answer.ndim == 3

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
            pair=None if self.pair is None else self.pair[index],
        )

    def split(self, size: int) -> list[PairBatch]:
        """Consecutive batches of at most `size` pairs."""
        return [self.rows(slice(i, i + size)) for i in range(0, len(self), size)]


def batches_of(pairs: Any) -> list[PairBatch]:
    """The batches that a caller gave: one alone, or several. Raises RelpError that names what is none."""
    if isinstance(pairs, PairBatch):
        return [pairs]
    made = "task.pairs(model), relp.pairs_from(model, ...) and relp.PairBatch(...) make them"
    if isinstance(pairs, str | bytes | Tensor | dict) or not isinstance(pairs, Iterable):
        raise RelpError(f"pairs: expected PairBatches, got a {type(pairs).__name__}; {made}")
    batches = list(pairs)
    for number, batch in enumerate(batches):
        if not isinstance(batch, PairBatch):
            raise RelpError(f"pairs[{number}]: expected a PairBatch, got a {type(batch).__name__}; {made}")
    return batches


def in_batches(pairs: Sequence[PairBatch], size: int, device: torch.device | str) -> list[PairBatch]:
    """The pairs in batches of at most `size`, on a device."""
    return [chunk.to(device) for batch in pairs for chunk in batch.split(size)]
