"""The mean of curves that were measured at different numbers of nodes (the bold lines of Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

Curve = tuple[np.ndarray, np.ndarray]


def curve(table: pd.DataFrame, x: str, y: str) -> Curve:
    """(x, y) of one structure, sorted, x > 0, without missing values; several values at one x are averaged."""
    rows = table[[x, y]].astype(float).dropna()
    means = rows[rows[x] > 0].groupby(x)[y].mean()
    return means.index.to_numpy(), means.to_numpy()


def at(one: Curve, x: np.ndarray | float) -> np.ndarray:
    """The curve's values at x, linear in log x; NaN outside its range."""
    if not len(one[0]):
        return np.full(np.shape(x), np.nan)
    return np.interp(np.log(x), np.log(one[0]), one[1], left=np.nan, right=np.nan)


def reach(one: Curve, value: float) -> float:
    """The smallest x at which the curve reaches `value`, linear in log x; NaN where it never does."""
    x, y = one
    above = np.flatnonzero(y >= value)
    if not len(above):
        return float("nan")
    i = int(above[0])
    if i == 0:
        return float(x[0])
    share = (value - y[i - 1]) / (y[i] - y[i - 1])
    return float(x[i - 1] * (x[i] / x[i - 1]) ** share)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over curves, each linear in log x, where *all* of them have data.

    The grid is every x at which one of them was measured: between those points the mean is straight.
    Two empty arrays where the curves have no range in common.
    """
    if not curves or any(len(x) == 0 for x, _ in curves):
        return np.array([]), np.array([])
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(grid >= low) & (grid <= high)]
    return grid, np.mean([at(one, grid) for one in curves], axis=0) if len(grid) else np.array([])
