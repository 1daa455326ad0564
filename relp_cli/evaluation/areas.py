"""What a faithfulness curve comes to: CPR and CMD over the fraction kept (Mueller et al. 2025, MIB); circuits that are enough."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

ENOUGH = 0.8  # faithfulness that a suggested circuit has
MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def areas(fraction: Sequence[float], faithfulness: Sequence[float]) -> tuple[float, float]:
    """(CPR, CMD): trapezoids of faithfulness and of |1 − faithfulness| over the given fractions, in [0, 1].

    NaN where a point is missing, and where the curve does not reach the full model (fraction 1): areas over different
    ranges do not compare. Below the smallest fraction nothing is added (as on MIB's grid, which starts at 0.001).
    """
    order = np.argsort(fraction, kind="stable")
    x, y = np.asarray(fraction, dtype=float)[order], np.asarray(faithfulness, dtype=float)[order]
    if len(x) < 2 or np.isnan(y).any() or x[-1] < 1 - 1e-9:
        return float("nan"), float("nan")
    return float(np.trapezoid(y, x)), float(np.trapezoid(np.abs(1 - y), x))


def enough(sweep: pd.DataFrame) -> pd.DataFrame:
    """The rows of a sweep whose circuit, like all larger ones, has a faithfulness of at least `ENOUGH`; the smallest last."""
    by = [name for name in ("n_nodes", "tau") if name in sweep]
    rows = sweep.sort_values(by, ascending=[name == "tau" for name in by], kind="stable")
    return rows[(rows.faithfulness >= ENOUGH).cummin()]
