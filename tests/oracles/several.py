"""Answers of several tokens as the oracle reads them: a run of prompt and answer, and one of prompt and foil."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from relp_cli.tasks.pairs import PairBatch

from .wrapped import Case, case

Side = tuple[Tensor, float]  # tokens [batch k], and the sign that their log-probability has in L
POS = 6


def sequences(shape: str, answer: int = 3, foil: int = 2) -> tuple[Case, PairBatch, tuple[Side, Side]]:
    """The case's pairs, with answers of 3 tokens and foils of 2, and both as the oracle reads them: (tokens, sign)."""
    c = case(shape)
    rng = torch.Generator().manual_seed(5)
    a, f = (torch.randint(50, (4, k), generator=rng) for k in (answer, foil))
    roles = ("bos", "a", "b", "c", "d", "end")
    batch = PairBatch(c.batch.original, c.batch.patch, a[:, None], f[:, None], roles)
    return c, batch, ((a, 1.0), (f, -1.0))


def logprob(tokens: Tensor, sign: float) -> Callable[[Tensor], Tensor]:
    """Σ log p(tokens) of runs of prompt + all tokens but the last."""

    def metric(logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        return sign * sum(log_p[:, POS - 1 + i].gather(-1, t[:, None])[:, 0] for i, t in enumerate(tokens.T))

    return metric


def following(prompts: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat([prompts, tokens[:, :-1]], 1)


def summed(of_side: Callable[..., Mapping[str, Tensor]], sides: Sequence[Side]) -> dict[str, Tensor]:
    """Both sides' oracle scores [batch, layer, pos, *unit] on the axis prompt, answer:1, answer:2, foil:1."""
    out = {}
    parts = [of_side(tokens, sign) for tokens, sign in sides]
    for kind, (one, two) in {k: (parts[0][k], parts[1][k]) for k in parts[0]}.items():
        both = one.new_zeros(*one.shape[:2], POS + 3, *one.shape[3:])
        both[:, :, : POS + 2] += one
        both[:, :, [*range(POS), POS + 2]] += two
        out[kind] = both
    return out


def on_sides(batch: PairBatch, sides: Sequence[Side]) -> list[tuple[Tensor, Tensor, Any, tuple[str, ...]]]:
    """Per side: the originals and patches that it runs, its metric [batch], the labels of its positions."""
    assert batch.patch is not None
    out = []
    for tokens, sign in sides:
        name = "answer" if sign > 0 else "foil"
        labels = (*batch.labels, *(f"{name}:{i}" for i in range(1, tokens.shape[1])))
        out.append((following(batch.original, tokens), following(batch.patch, tokens), logprob(tokens, sign), labels))
    return out
