"""How many groups examples fall into, by the directions of their scores; one group is the null hypothesis.

1. Every example's scores are scaled to length 1: what matters is which units an example uses, not how large its effect is. The
   distance of two examples is 1 − the cosine of their scores.
2. Ward's method joins the two groups whose union spreads least, from single examples up; cut at K groups, for every K.
3. s(K): the mean silhouette (Rousseeuw 1987), (b − a)/max(a, b) of each example, a its mean distance to its own group, b to the
   nearest other. A K counts if each of its groups has at least `LEAST` of the examples, and the mean scores of every two are at
   least 45° apart: groups that use the same units in other proportions are no mechanisms of their own.
4. Null: examples of one Gaussian with the mean and covariance of the real ones, scaled to length 1. p is the share of such sets
   (the real one counted) whose best s, at any angle, is as large as the best that counts.
5. There are K groups if s(K) ≥ REASONABLE and p ≤ LEVEL, and one otherwise. Silhouettes from ½ up are "a reasonable structure",
   those below "weak, could be artificial" (Kaufman & Rousseeuw 1990, table 2.4): a large sample makes any lump significant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage

from relp_cli.errors import RelpError

LEAST, SMALLEST = 0.1, 3  # of the examples, and examples
REASONABLE, LEVEL, APART = 0.5, 0.05, math.sqrt(0.5)
MOST, DRAWS = 6, 99


@dataclass(frozen=True)
class Groups:
    """labels: Int[example], from 0, the largest group first. tried: K → (s(K), the largest cosine between mean scores of two
    groups), without the K of which a group is too small.

    best: the K of the largest s that counts (1: none does), and p: how often one Gaussian does as well (NaN: none counts).
    found: how many groups there are; `labels` may have another number, which was asked for.
    """

    labels: Int[np.ndarray, " example"]
    tried: dict[int, tuple[float, float]]
    best: int
    p: float
    found: int

    @property
    def n(self) -> int:
        return int(self.labels.max()) + 1


def groups_of(values: Float[np.ndarray, "example unit"], k: int | None = None, seed: int = 0) -> Groups:
    """The groups of examples; k: how many (None: found as above). seed: of the null's draws.

    Raises: RelpError for too few examples, examples without any score, and more groups than examples.
    """
    n = len(values)
    if n < 2 * SMALLEST:
        raise RelpError(f"clusters need at least {2 * SMALLEST} pairs, got {n}")
    if k is not None and not 1 <= k <= n:
        raise RelpError(f"expected 1 to {n} clusters of {n} pairs, got {k}")
    size = np.linalg.norm(values, axis=1, keepdims=True)
    if not (size > 0).all():
        raise RelpError(f"{int((size == 0).sum())} of {n} pairs have no score that is not 0: they belong to no cluster")
    # Coordinates in which all distances are the same, as many as examples at most.
    left, singular, _ = np.linalg.svd(values / size, full_matrices=False)
    points = left * singular
    tried = _cuts(points)
    counting = {one: silhouette for one, (silhouette, cosine) in tried.items() if cosine <= APART}
    best = max(counting, key=lambda one: counting[one]) if counting else 1
    p = math.nan
    if counting:
        rng = np.random.default_rng(seed)
        centre = points.mean(0)
        spread = (points - centre) / math.sqrt(n - 1)
        nulls = (_cuts(_unit(centre + rng.standard_normal((n, n)) @ spread)) for _ in range(DRAWS))
        as_large = sum(max((s for s, _ in null.values()), default=-1.0) >= counting[best] for null in nulls)
        p = (1 + as_large) / (1 + DRAWS)
    found = best if counting and counting[best] >= REASONABLE and p <= LEVEL else 1
    return Groups(_cut(points, found if k is None else k), tried, best, p, found)


def _unit(points: np.ndarray) -> np.ndarray:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _cut(points: np.ndarray, k: int) -> Int[np.ndarray, " example"]:
    """Ward's groups, numbered by size, of equal ones by their first example."""
    found = fcluster(linkage(points, "ward"), k, "maxclust")
    first = {int(g): int(np.argmax(found == g)) for g in np.unique(found)}
    order = sorted(first, key=lambda g: (-int((found == g).sum()), first[g]))
    return np.array([order.index(int(g)) for g in found])


def _cuts(points: np.ndarray) -> dict[int, tuple[float, float]]:
    """K → mean silhouette of Ward's cut into K groups, and the largest cosine between two groups' means."""
    n = len(points)
    tree, distance = linkage(points, "ward"), np.maximum(1 - points @ points.T, 0)
    np.fill_diagonal(distance, 0)
    out = {}
    for k in range(2, min(MOST, n - 1) + 1):
        labels = fcluster(tree, k, "maxclust") - 1
        sizes = np.bincount(labels)
        if len(sizes) == k and sizes.min() >= max(SMALLEST, LEAST * n):
            means = _unit(np.eye(k)[labels].T @ points)
            out[k] = silhouette(distance, labels), float((means @ means.T)[np.triu_indices(k, 1)].max())
    return out


def silhouette(distance: Float[np.ndarray, "n n"], labels: Int[np.ndarray, " n"]) -> float:
    """The mean silhouette of groups 0 … K − 1; an example that is alone in its group has 0."""
    member = np.eye(labels.max() + 1)[labels]
    sizes = member.sum(0)
    total = distance @ member
    own = sizes[labels]
    a = total[np.arange(len(labels)), labels] / np.maximum(own - 1, 1)
    means = np.where(member > 0, np.inf, total / sizes)
    b = means.min(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        s = np.where(own > 1, (b - a) / np.maximum(a, b), 0.0)
    return float(np.nan_to_num(s).mean())
