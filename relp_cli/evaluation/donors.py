"""Whose run an ablation takes its values from: token ids in place of each pair's original, for all pairs of one length at once,
so that a draw does not depend on how they are batched.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.evaluation.ablation_table import AblationRow
from relp_cli.tasks.pairs import PairBatch


def own(pairs: PairBatch, _: int) -> Int[Tensor, "pair pos"]:
    """The pair's own patch prompt."""
    assert pairs.patch is not None  # the row needs it
    return pairs.patch


def another(pairs: PairBatch, seed: int) -> Int[Tensor, "pair pos"]:
    """Another pair's patch prompt, a different one, drawn with a seed. Raises RelpError where there is none."""
    assert pairs.patch is not None  # the row needs it
    if len(pairs) < 2:
        raise RelpError("ablation 'resample' needs at least two pairs of every token length")
    different = (pairs.patch[None] != pairs.patch[:, None]).any(-1).float().cpu()  # [pair, donor]
    if not different.any(-1).all():
        raise RelpError("ablation 'resample' needs at least two different patch prompts of every token length")
    drawn = torch.multinomial(different, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return pairs.patch[drawn.to(pairs.patch.device)]


def with_donors(
    row: AblationRow, pairs: list[PairBatch], seed: int, size: int, device: torch.device | str
) -> list[tuple[PairBatch, Tensor | None]]:
    """The pairs in batches of at most `size`, each with the token ids that its values come from (None: from no run)."""
    out: list[tuple[PairBatch, Tensor | None]] = []
    for number, same_length in enumerate(pairs):
        tokens, chunks = row.tokens(same_length, seed + 1000 * number), same_length.split(size)
        parts = [None] * len(chunks) if tokens is None else [part.to(device) for part in tokens.split(size)]
        out += zip((chunk.to(device) for chunk in chunks), parts, strict=True)
    return out
