"""Answers of several tokens: L = log p(answer | prompt) − log p(foil | prompt), each the sum over its tokens, as a model that is
made to write them reads it. It takes two runs of a prompt, which are the two *parts* of a batch:

1. prompt + answer but its last token, whose last k positions' logits give log p(answer), and
2. prompt + foil but its last token, which gives −log p(foil).
L, and everything linear in it, is the sum over both parts. The tokens that follow are the same in original and patch; their
positions are positions like others, `answer:1` the first token of the answer: what is patched or ablated at the prompt's
positions is so in both runs, at the answer's or the foil's in its own run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.tasks.pairs import PairBatch


def parts_of(pairs: Sequence[PairBatch]) -> list[PairBatch]:
    """The parts of all batches in order; `pair` numbers the pairs through. Batches of single tokens are as they were.

    Raises: RelpError where some answers are sequences and some are not, or only some have a foil: means over prompts would weigh
    pairs differently.
    """
    if not any(batch.several for batch in pairs):
        return list(pairs)
    if len({(batch.several, bool((batch.foil < 0).all())) for batch in pairs}) > 1:
        raise RelpError(
            "answers of several tokens: either all pairs have a foil or none, and all answers are [batch, 1, k]"
        )
    out, first = list[PairBatch](), 0
    for batch in pairs:
        pair = torch.arange(first, first + len(batch))
        out += [_part(batch, side, pair) for side in ("answer", "foil") if bool((getattr(batch, side) >= 0).all())]
        first += len(batch)
    return out


def _part(batch: PairBatch, side: Literal["answer", "foil"], pair: Tensor) -> PairBatch:
    tokens: Tensor = getattr(batch, side)[:, 0]
    follow, none = tokens[:, :-1], torch.full_like(tokens, -1)
    labels = tuple(f"{side}:{i}" for i in range(1, tokens.shape[1]))
    if taken := set(labels) & set(batch.labels):
        raise RelpError(f"roles: '{min(taken)}' is the name of a position of the {side}; choose another")
    return replace(
        batch,
        original=torch.cat([batch.original, follow], 1),
        patch=None if batch.patch is None else torch.cat([batch.patch, follow], 1),
        answer=tokens if side == "answer" else none,
        foil=tokens if side == "foil" else none,
        roles=batch.labels + labels,
        read=tokens.shape[1],
        pair=pair,
    )


def of_pairs(values: Float[Tensor, " rows"], parts: Sequence[PairBatch]) -> Float[Tensor, " pairs"]:
    """Σ over each pair's rows, of values of the parts' rows in order; the values themselves where there are no parts."""
    rows = [part.pair for part in parts if part.pair is not None]
    if not rows:
        return values
    index = torch.cat(rows).to(values.device)
    return values.new_zeros(int(index.max()) + 1).index_add_(0, index, values)
