"""How many pairs there are, and how many prompts: numbers, and how people are told. No torch.

A *cluster* is all pairs of one original prompt (`shared`).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

MATTERS = 1.1  # by so much a standard error over pairs would be too small, at most, before people are told
FEW = 20  # of fewer clusters, robust standard errors are too small themselves
REMEDY = "more words or templates make more prompts"


def distinct(prompts: Int[np.ndarray, " pair"]) -> int:
    return len(np.unique(prompts))


def effective(prompts: Int[np.ndarray, " pair"]) -> float:
    """How many independent pairs these are worth where pairs of a prompt all do the same: n² / Σ n_g² (Kish 1965), the number of
    prompts where each has as many pairs.
    """
    return len(prompts) ** 2 / float((np.bincount(prompts) ** 2).sum())


def pairs_text(n: int, n_prompts: int | None = None, what: str = "pairs", does: tuple[str, str] | None = None) -> str:
    """`24 pairs of 8 prompts`; `24 pairs` where each has its own, or it is not known (None: runs of older versions).

    what: the pairs' name, in the plural. does: a verb that follows, of one and of several: ("is", "are").
    """
    verb = "" if does is None else f" {does[n != 1]}"
    said = f"{n} {what if n != 1 else what.removesuffix('s')}"
    if n_prompts is None or not n_prompts < n:  # NaN: a table whose older rows have no such column
        return said + verb
    return f"{said} of {int(n_prompts)} prompt{'s' if n_prompts != 1 else ''}{verb}"


def sharing_note(prompts: Int[np.ndarray, " pair"]) -> str:
    """What people have to know of pairs that share prompts, or "" where it matters little."""
    n, k = len(prompts), distinct(prompts)
    if (n / effective(prompts)) ** 0.5 < MATTERS:
        return ""
    if k == 1:
        return f"WARNING: all {n} pairs have one prompt: there is no standard error or interval over prompts; {REMEDY}"
    few = f", and with fewer than {FEW} prompts still too small" if k < FEW else ""
    return (
        f"WARNING: {pairs_text(n, k)}: pairs of one prompt are no independent evidence, so standard errors, intervals and tests "
        f"are of {k} prompts{few}; {REMEDY}"
    )
