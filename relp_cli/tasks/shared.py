"""Pairs that share their original prompt: they are one observation more than several, and whatever counts pairs has to know.

A *cluster* is all pairs of one original prompt (its token ids, whatever their patch prompts, answers and foils). Standard errors
and intervals are of independent clusters (Cameron and Miller 2015); where no two pairs share a prompt, of independent pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from relp_cli.tasks.pairs import PairBatch

PROMPT_OF = "prompt_of"  # key of a scoring's metadata: the prompt of each pair, where pairs share one
MATTERS = 1.1  # by so much a standard error over pairs would be too small, at most, before people are told
FEW = 20  # of fewer clusters, robust standard errors are too small themselves


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
    import torch

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


def distinct(prompts: Int[np.ndarray, " pair"]) -> int:
    return len(np.unique(prompts))


def about_prompts(prompts: Int[np.ndarray, " pair"]) -> dict[str, Any]:
    """What a scoring's metadata say of its pairs' prompts: how many, and, where pairs share one, which each is."""
    n_prompts = distinct(prompts)
    return {"n_prompts": n_prompts} | ({PROMPT_OF: prompts.tolist()} if n_prompts < len(prompts) else {})


def effective(prompts: Int[np.ndarray, " pair"]) -> float:
    """How many independent pairs these are worth where pairs of a prompt all do the same: n² / Σ n_g² (Kish 1965), the number of
    prompts where each has as many pairs.
    """
    return len(prompts) ** 2 / float((np.bincount(prompts) ** 2).sum())


def counted(n: int, n_prompts: int | None = None, what: str = "pairs") -> str:
    """`24 pairs of 8 prompts`; `24 pairs` where each has its own, or it is not known (None: runs of older versions).

    what: the pairs' name, in the plural.
    """
    said = f"{n} {what if n != 1 else what.removesuffix('s')}"
    if n_prompts is None or not n_prompts < n:  # NaN: a table whose older rows have no such column
        return said
    return f"{said} of {int(n_prompts)} prompt{'s' * (n_prompts != 1)}"


def sharing_note(prompts: Int[np.ndarray, " pair"]) -> str:
    """What people have to know of pairs that share prompts, or "" where it matters little."""
    n, k = len(prompts), distinct(prompts)
    if (n / effective(prompts)) ** 0.5 < MATTERS:
        return ""
    if k == 1:
        return f"WARNING: all {n} pairs have one prompt: there is no standard error or interval over prompts; {REMEDY}"
    few = f", and with fewer than {FEW} prompts still too small" if k < FEW else ""
    return (
        f"WARNING: {counted(n, k)}: pairs of one prompt are no independent evidence, so standard errors, intervals and tests "
        f"are of {k} prompts{few}; {REMEDY}"
    )


REMEDY = "more words or templates make more prompts"
