"""Statistics of tests of circuits: exact binomial tests with composite nulls, HSIC with permutations, Holm's correction.

NumPy and SciPy alone: what is tested are numbers, whatever model they came from. Every p-value is the largest that the null
hypothesis allows, so that a test at level α rejects a true null with probability at most α.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import beta, binom

GATHERED = 1 << 22  # elements of permuted kernels held at once


def sign_p(wins: Any, n: int, epsilon: float) -> np.ndarray:
    """Of H0: |P(win) − ½| ≤ ε, with `wins` of n: P(|K/n − ½| ≥ |wins/n − ½|), K ~ Bin(n, ½ + ε), the worst case of H0.
    wins: any shape. ε = 0 is the two-sided sign test.
    """
    low = np.minimum(wins, n - np.asarray(wins))
    return np.minimum(binom.cdf(low, n, 0.5 + epsilon) + binom.sf(n - low - 1, n, 0.5 + epsilon), 1.0)


def reversed_sign_p(wins: Any, n: int, epsilon: float) -> np.ndarray:
    """Of H0: |P(win) − ½| ≥ ε, the larger of two one-sided p-values at ½ ± ε (Schuirmann 1987). wins: any shape."""
    below = binom.cdf(wins, n, 0.5 + epsilon)
    above = binom.sf(np.asarray(wins) - 1, n, 0.5 - epsilon)
    return np.maximum(below, above)


def share_p(count: Any, n: int, q: float, alternative: Literal["less", "greater"]) -> np.ndarray:
    """Of H0: share ≥ q (alternative "less") or ≤ q ("greater"), with `count` of n draws: exact binomial. count: any shape."""
    return binom.cdf(count, n, q) if alternative == "less" else binom.sf(np.asarray(count) - 1, n, q)


def share_interval(count: int, n: int, alpha: float) -> tuple[float, float]:
    """Clopper and Pearson's exact 1 − α interval of a share; (0, 1) without any draw."""
    low = beta.ppf(alpha / 2, count, n - count + 1) if count else 0.0
    high = beta.ppf(1 - alpha / 2, count + 1, n - count) if count < n else 1.0
    return float(low), float(high)


def holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Holm's (1979) adjusted p-values: rejecting those ≤ α, the chance of any false rejection is at most α."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    out = np.empty(len(p))
    out[order] = np.minimum(stepped, 1.0)
    return out


def kernel(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n n"]:
    """Gaussian kernel exp(−d²/2σ²), σ the median distance of those pairs that are apart (Gretton et al. 2007)."""
    apart = np.abs(x[:, None] - x[None])
    positive = apart[np.triu(apart > 0)]
    return np.exp(-(apart**2) / (2 * np.median(positive) ** 2)) if len(positive) else np.ones_like(apart)


def centred(k: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """HKH, H = I − 1/n."""
    return k - k.mean(0) - k.mean(1, keepdims=True) + k.mean()


def hsic(k: Float[np.ndarray, "n n"], other: Float[np.ndarray, "n n"]) -> float:
    """tr(K H L H)/n² of two kernels over the same examples: 0 where these are independent, above it otherwise."""
    return float((centred(k) * other).mean())


def hsic_p(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], permutations: int, seed: int
) -> tuple[float, float, float]:
    """HSIC of x and y, its share of the largest possible (√ HSIC(x, x)·HSIC(y, y)), and the p-value of H0: independent.

    p = (1 + permutations of y with an HSIC no smaller) / (1 + permutations): exact at every n. (0, 0, 1) where one side is
    constant.
    """
    k, other, n = kernel(x), kernel(y), len(x)
    most = (hsic(k, k) * hsic(other, other)) ** 0.5
    if most <= 0:
        return 0.0, 0.0, 1.0
    statistic, k, rng = hsic(k, other), centred(k), np.random.default_rng(seed)
    as_large, step = 0, max(1, GATHERED // n**2)
    for start in range(0, permutations, step):
        drawn: Int[np.ndarray, "draw n"] = rng.permuted(
            np.tile(np.arange(n), (min(step, permutations - start), 1)), axis=1
        )
        permuted = np.einsum("ij,dij->d", k, other[drawn[:, :, None], drawn[:, None]]) / n**2
        as_large += int((permuted >= statistic - 1e-12 * most).sum())
    return statistic, statistic / most, (1 + as_large) / (1 + permutations)
