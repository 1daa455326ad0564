"""Pairs that share their original prompt: they are one observation more than several, and whatever counts pairs has to know.

A *cluster* is all pairs of one original prompt (its token ids, whatever their patch prompts, answers and foils). Standard errors
and intervals are of independent clusters (Cameron and Miller 2015); where no two pairs share a prompt, of independent pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from relp_cli.tasks.counted import distinct
from relp_cli.tasks.pairs import PairBatch

PROMPT_OF = "prompt_of"  # key of a scoring's metadata: the prompt of each pair, where pairs share one


def prompts_of(pairs: Sequence[PairBatch]) -> Int[np.ndarray, " pair"]:
    """Which of the distinct original prompts each pair has, numbered as they come. Of parts of pairs (`tasks.parts`): of the
    pairs, without the answers that follow the prompt.
    """
    prompts: dict[int, tuple[int, ...]] = {}
    for batch in pairs:
        numbers = range(len(prompts), len(prompts) + len(batch)) if batch.pair is None else batch.pair.tolist()
        kept = batch.original[:, : batch.n_pos + 1 - batch.read]
        prompts |= zip(numbers, map(tuple, kept.tolist()), strict=True)
    known: dict[tuple[int, ...], int] = {}
    return np.array([known.setdefault(prompts[i], len(known)) for i in sorted(prompts)], dtype=np.int64)


def together(pairs: Sequence[PairBatch]) -> tuple[list[PairBatch], Int[np.ndarray, " row"] | None]:
    """The pairs with those of one prompt next to each other in their batch, and which pair each row then is; the same batches,
    and None, where no two pairs share a prompt.
    """
    prompts = prompts_of(pairs)
    if distinct(prompts) == len(prompts):
        return list(pairs), None
    out, order, first = [], [], 0
    for batch in pairs:
        rows = np.argsort(prompts[first : first + len(batch)], kind="stable")
        out.append(batch.rows(torch.from_numpy(rows)))
        order.append(first + rows)
        first += len(batch)
    return out, np.concatenate(order)


def about_prompts(prompts: Int[np.ndarray, " pair"]) -> dict[str, Any]:
    """What a scoring's metadata say of its pairs' prompts: how many, and, where pairs share one, which each is."""
    n_prompts = distinct(prompts)
    return {"n_prompts": n_prompts} | ({PROMPT_OF: prompts.tolist()} if n_prompts < len(prompts) else {})
