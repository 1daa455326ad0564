"""A prompt pair as text. Apart from `PairBatch` so that reading and checking tasks loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Listed = Literal["", "answer", "foil", "both", "rows"]


@dataclass(frozen=True)
class PromptPair:
    """One pair as text. `answer` and `foil` are sets of strings (usually of one element each).

    `roles` names token spans: role → (start, end) character offsets in `original`. Positions without a role are
    labelled from the role before them (`S1+1`). `patch` is None for single prompts (baseline zero or mean).
    """

    original: str
    patch: str | None
    answer: tuple[str, ...]
    foil: tuple[str, ...]
    roles: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class RawPair:
    """A pair before tokenisation, with what the tokeniser has to check.

    pair:      the text (empty strings where a file gives token ids only).
    changed:   character spans (original, patch) where the two prompts may differ; None: anywhere.
    join:      what stands between prompt and answer; None: a space where two words would touch.
    ids:       token ids of (original, patch) that a file gives instead of text.
    outcome_ids: token ids of (answer, foil) that a file gives instead of text.
    first:     answer and foil of several tokens are read by the first one, where they have equally many (MIB).
    labels:    one role per token of the text, given by a file.
    listed:    whose texts are words of a list, of which those that are no single tokens are left out: of one side, of both,
               or of both row against row (what one side loses the other loses too).
    where:     `file:line: ` for error messages, empty for generated pairs.
    """

    pair: PromptPair
    changed: tuple[tuple[tuple[int, int], tuple[int, int]], ...] | None = None
    join: str | None = None
    ids: tuple[tuple[int, ...], tuple[int, ...] | None] | None = None
    outcome_ids: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    first: bool = False
    labels: tuple[str, ...] | None = None
    split: str | None = None
    listed: Listed = ""
    where: str = ""
