"""Why a score is wrong: its error, exact − estimate, as a sum over causes.

1. A cause is a sort of layer whose curvature the plain gradient does not see: norms, MLPs, attention, softcaps. Scored with the
   secants of these layers alone, and the plain gradient through all others, a node's score moves by what their curvature does.
2. With the secants of all layers (`relp+secant`) it moves by something else than the sum of these: several at once.
3. What is left then, exact − `relp+secant`, has no cause that is known.

The parts add up to the error of every node. Over nodes, shares are Σ sign(error)·part / Σ|error|: they add up to 1, and are
below 0 where a cause makes the others' errors smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from relp_cli.lrp.rules import RULES
from relp_cli.methods.request import Progress
from relp_cli.methods.score import with_extra_rules
from relp_cli.models.model import Model
from relp_cli.scoring import score
from relp_cli.spaces.scores import Scores
from relp_cli.tasks.pairs import PairBatch

SECANT = "relp+secant"
SITES = {  # of rules
    "norms": ("norm",),
    "MLPs": ("act", "gate"),
    "attention": ("attention", "softmax", "scores"),
    "softcaps": ("softcap",),
}
JOINTLY, UNKNOWN, CURVATURE = "several at once", "unknown", "curvature"


def secants_by_cause(model: Model) -> dict[str, tuple[str, ...]]:
    """Cause → the secant rules of its layers, where the model has such layers."""
    fitting = with_extra_rules(model, (), ["secant"])
    rules = {cause: tuple(r for r in fitting if RULES[r].site in sites) for cause, sites in SITES.items()}
    return {cause: names for cause, names in rules.items() if names}


def secants_alone(
    model: Model,
    pairs: Sequence[PairBatch],
    kinds: Sequence[str],
    metric: str,
    direction: str,
    progress: Progress | None = None,
) -> dict[str, Scores]:
    """Per cause, scores with the secants of its layers alone: one endpoint per changed position, blended as `relp+secant` is."""
    how: dict[str, Any] = {"endpoints": "position", "blend": True, "keep_examples": False, "progress": progress}
    return {
        cause: score(model, pairs, "relp", kinds, metric, direction, rules=rules, **how)
        for cause, rules in secants_by_cause(model).items()
    }


def column_of(cause: str) -> str:
    """What a table of nodes calls the scores with the secants of one cause alone."""
    return f"secants of {cause}"


def parts(nodes: pd.DataFrame, method: str) -> pd.DataFrame:
    """Cause → what it contributes to exact − method of every node, in the metric's units; NaN where nothing was patched.

    nodes: columns `exact`, the method, `relp+secant`; for the plain gradient (atp) also one per cause (`column_of`). Errors of
    other methods are split in two only: what the secants of all layers see, and the unknown.
    """
    moved = nodes[SECANT] - nodes[method]
    out: dict[str, pd.Series] = {}
    if method == "atp":
        out = {c: nodes[column_of(c)] - nodes[method] for c in SITES if column_of(c) in nodes}
        out[JOINTLY] = moved - sum(out.values())
    else:
        out[CURVATURE] = moved
    out[UNKNOWN] = nodes["exact"] - nodes[SECANT]
    return pd.DataFrame(out).where(nodes["exact"].notna())


def causes_table(nodes: pd.DataFrame, method: str) -> pd.DataFrame:
    """Over the patched nodes, largest share first: cause, its share of Σ|exact − method|, the sum of its part in the direction of
    the error (`explained`, in the metric's units), and how many nodes it is the largest part of (`nodes`, of `of_nodes`).
    """
    patched = nodes[nodes.exact.notna()]
    split, error = parts(patched, method), patched.exact - patched[method]
    towards = split.mul(np.sign(error), axis=0)
    wrong = error.abs() > 0
    largest = towards[wrong].idxmax(axis=1).value_counts() if wrong.any() else pd.Series(dtype=int)
    total = float(error.abs().sum())
    rows = [
        {"cause": cause, "share": float(towards[cause].sum()) / total if total else float("nan"),
         "explained": float(towards[cause].sum()), "nodes": int(largest.get(cause, 0)), "of_nodes": int(wrong.sum())}
        for cause in split
    ]  # fmt: skip
    return pd.DataFrame(rows).sort_values("share", ascending=False, ignore_index=True, kind="stable")


def in_words(shares: dict[str, float], least: float = 0.1) -> str:
    """`MLPs 91 %, norms 13 %`: the largest shares of an error; those below `least` in size are left out."""
    told = sorted(((c, s) for c, s in shares.items() if abs(s) >= least), key=lambda item: -item[1])
    return ", ".join(f"{cause} {_percent(share)}" for cause, share in told)


def whys(nodes: pd.DataFrame, method: str) -> Sequence[str]:
    """Of every node: what its error is made of, in shares of it; "" where it was not patched, or is exact."""
    split, error = parts(nodes, method), nodes["exact"] - nodes[method]
    shares = split.div(error.where(error != 0), axis=0).to_dict("records")
    return [in_words({str(c): s for c, s in row.items() if s == s}) for row in shares]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %".replace("-", "−")
