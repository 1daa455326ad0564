"""Correlation, and the bootstrap: seeded resamples of examples, and intervals of what they give."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

TAIL = 0.025  # on either side of a 95 % interval


def pearson(a: np.ndarray, b: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Pearson correlation along the last axis, over the entries where `weight` is 1; NaN where one side is constant."""
    w = np.ones_like(a) if weight is None else weight
    total = w.sum(-1, keepdims=True)
    a = w * (a - (w * a).sum(-1, keepdims=True) / total)
    b = w * (b - (w * b).sum(-1, keepdims=True) / total)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def resample_counts(
    n: int, draws: int, seed: int, clusters: Int[np.ndarray, " n"] | None = None
) -> Int[np.ndarray, "draws n"]:
    """How often each of n examples is in each resample of n. clusters: which one each example is of, where examples of one
    are not independent; then whole clusters are drawn, as many as there are (cluster bootstrap, Davison and Hinkley 1997,
    section 3.8).
    """
    if clusters is not None:
        names, clusters = np.unique(clusters, return_inverse=True)
        n = len(names)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    return drawn if clusters is None else drawn[:, clusters]


def resample_picks(n: int, draws: int, seed: int) -> Int[np.ndarray, "draws n"]:
    """Which of n examples each resample of n is made of."""
    return np.random.default_rng(seed).integers(n, size=(draws, n))


def interval(values: np.ndarray, tail: float = TAIL) -> np.ndarray:
    """(low, high) along the first axis: what a share `tail` of the resampled values is below, and above. NaN are left out;
    without any draw there is none.
    """
    if not len(values):
        return np.full((2, *values.shape[1:]), np.nan)
    return np.nanquantile(values, [tail, 1 - tail], axis=0)
