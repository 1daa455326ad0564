"""Tests of a circuit from its scores per pair: one row per test, with its null hypothesis and its verdict in plain words.

The hypotheses are those of Shi et al. 2024 ("Hypothesis Levels the Circuit Hypothesis in LLMs"); M the model, C the circuit,
M∖C the model with the circuit knocked out, s the score of one pair, R a random circuit, |s − s'| averaged over pairs.
A null hypothesis that is not rejected is not thereby true: no verdict says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from relp_cli.errors import RelpError
from relp_cli.evaluation.hypotheses import holm, hsic_p, reversed_sign_p, share_interval, share_p, sign_p

FEW = 30  # draws below which a test is said to be small
SAME = 1e-5  # of the largest |score|: a difference between two runs of the same function

Row = dict[str, Any]


@dataclass(frozen=True)
class Levels:
    """alpha: chance of rejecting a true null hypothesis. epsilon: of "as often": ½ ± ε. quantile: share q of random circuits, or
    parts of them, that one has to surpass. permutations: of HSIC. references: random circuits. units: that minimality tests.
    """

    alpha: float = 0.05
    epsilon: float = 0.1
    quantile: float = 0.9
    permutations: int = 1000
    references: int = 100
    units: int = 100

    def check(self) -> None:
        """Raises RelpError for values that are no level, distance from ½, share or count."""
        for name, low, high in (("alpha", 0, 1), ("epsilon", -1, 0.5), ("quantile", 0, 1)):
            value = getattr(self, name)
            if not low < value < high or value < 0:
                raise RelpError(
                    f"--{name} {value}: expected a number {'from' if low < 0 else 'above'} 0 and below {high}"
                )
        for name in ("permutations", "references", "units"):
            if getattr(self, name) < 1:
                raise RelpError(f"--{name} {getattr(self, name)}: expected a count from 1 up")


@dataclass(frozen=True)
class Measured:
    """Scores of the same pairs, Float[pair], or one row per run.

    model, circuit, complement: s(M), s(C), s(M∖C). references, knocked: of random circuits R, s(R) and s(M∖R).
    inflated, deflated: of C with a random path, and of that less one of the path's units. without: of C less one of its own.
    against_itself: the score compares with M's own run (kl), so that s(M) is no performance. counted: what the observations
    are, "prompts" where each is the mean over the pairs of a prompt.
    """

    model: Float[np.ndarray, " pair"]
    circuit: Float[np.ndarray, " pair"]
    complement: Float[np.ndarray, " pair"]
    references: Float[np.ndarray, "reference pair"]
    knocked: Float[np.ndarray, "reference pair"]
    inflated: Float[np.ndarray, "path pair"]
    deflated: Float[np.ndarray, "path pair"]
    without: Float[np.ndarray, "unit pair"]
    against_itself: bool = False
    counted: str = "pairs"

    @property
    def rounding(self) -> float:
        """Differences up to this are none."""
        return SAME * max(float(np.abs(v).max()) for v in (self.model, self.circuit, self.complement))


def rows(at: Measured, how: Levels, seed: int = 0) -> list[Row]:
    """One row per test: test, null, statistic (and what it is), n (and of what), p, correction, effect (and what it is, and its
    1 − α interval), alpha, rejected (None: not tested), verdict, note.
    """
    made = [_equivalence(at, how), _shown(at, how), _independence(at, how, seed)]
    made += [_minimality(at, how), _sufficiency(at, how), _necessity(at, how)]
    return [{**_EMPTY, **row, "alpha": how.alpha} for row in made]


_EMPTY = {
    "test": "", "null": "", "statistic": np.nan, "of_statistic": "", "n": 0, "of_n": "", "p": np.nan, "correction": "none",
    "effect": np.nan, "effect_lo": np.nan, "effect_hi": np.nan, "of_effect": "", "alpha": np.nan, "rejected": None,
    "verdict": "", "note": "",
}  # fmt: skip


def unit_rows(at: Measured, how: Levels, names: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Minimality, unit by unit: change (|s(C) − s(C∖u)|), share of the random parts that change less, p, Holm's p, rejected."""
    changes, references = _changes(at)
    if not len(references) or not len(changes):
        return []
    below = (references[None] < changes[:, None]).sum(1)
    p = share_p(below, len(references), how.quantile, "less")
    return [
        {**name, "change": float(c), "share_below": b / len(references), "n": len(references), "p": float(one),
         "p_holm": float(adjusted), "rejected": bool(adjusted <= how.alpha)}
        for name, c, b, one, adjusted in zip(names, changes, below, p, holm(p), strict=True)
    ]  # fmt: skip


def _equivalence(at: Measured, how: Levels) -> Row:
    """Two-sided, with the null an interval about ½: the circuit's chance to beat the model."""
    row = {"test": "equivalence", "null": f"|P(s(C) > s(M)) − ½| ≤ {how.epsilon:g}, of {at.counted} where they differ"}
    wins, n, ties = _wins(at)
    row |= _of_wins(at, how, wins, n, ties)
    if at.against_itself or not n:
        return row | _not_tested(
            _NO_PERFORMANCE if at.against_itself else f"circuit and model score every {at.counted[:-1]} the same"
        )
    side = "higher" if wins > n / 2 else "lower"
    yes = f"not equivalent: the circuit scores {side} than the model on {max(wins, n - wins)} of {n} {at.counted}"
    no = f"no difference shown in how often the circuit beats the model ({wins} of {n}); not a proof that they are equivalent"
    best = float(sign_p(0, n, how.epsilon))
    p = float(sign_p(wins, n, how.epsilon))
    return row | _decided(p, how.alpha, yes, no, best, n, at.counted, row["note"])


def _shown(at: Measured, how: Levels) -> Row:
    """The reverse, which can show equivalence (ours)."""
    row = {
        "test": "equivalence, reversed",
        "null": f"|P(s(C) > s(M)) − ½| ≥ {how.epsilon:g}, of {at.counted} where they differ",
    }
    wins, n, ties = _wins(at)
    row |= _of_wins(at, how, wins, n, ties)
    if at.against_itself or not n or how.epsilon == 0:
        why = (
            f"circuit and model score every {at.counted[:-1]} the same"
            if n == 0
            else "--epsilon 0 leaves nothing to show"
        )
        return row | _not_tested(_NO_PERFORMANCE if at.against_itself else why)
    yes = f"as often better as worse than the model, within {how.epsilon:g} (how much better or worse is not tested)"
    no = "equivalence not shown"
    best = float(reversed_sign_p(n // 2, n, how.epsilon))
    return row | _decided(
        float(reversed_sign_p(wins, n, how.epsilon)), how.alpha, yes, no, best, n, at.counted, row["note"]
    )


def _independence(at: Measured, how: Levels, seed: int) -> Row:
    row: Row = {
        "test": "independence",
        "null": f"s(M∖C) and s(M) are independent over {at.counted}",
        "n": len(at.model),
        "of_n": at.counted,
    }
    row |= {"of_statistic": "HSIC", "of_effect": "HSIC / largest possible"}
    if at.against_itself:
        return row | _not_tested(_NO_PERFORMANCE)
    for name, values in (("the model", at.model), ("the complement", at.complement)):
        if np.ptp(values) <= at.rounding:
            return row | _not_tested(f"{name} scores every {at.counted[:-1]} the same")
    statistic, share, p = hsic_p(at.model, at.complement, how.permutations, seed)
    row |= {"statistic": statistic, "effect": share}
    yes = "the model without the circuit still follows the model: what it does on a pair is not all in the circuit"
    no = "no dependence shown between the model without the circuit and the model; not a proof that there is none"
    best = 1 / (1 + how.permutations)
    return row | _decided(p, how.alpha, yes, no, best, len(at.model), at.counted)


def _minimality(at: Measured, how: Levels) -> Row:
    null = f"of every unit u: |s(C) − s(C∖u)| is above that of at least {how.quantile:g} of random parts of C with a random path"
    units, of = unit_rows(at, how, [{}] * len(at.without)), len(at.without)
    row: Row = {
        "test": "minimality",
        "null": null,
        "of_statistic": "units that fail",
        "of_effect": "share of the units tested",
    }
    row |= {"n": len(at.inflated), "of_n": "random parts", "correction": f"Holm over {of} units"}
    if not units:
        return row | _not_tested("no random path leaves the circuit" if of else "the circuit has no unit to knock out")
    idle, p = sum(u["rejected"] for u in units), min(u["p_holm"] for u in units)
    low, high = share_interval(idle, of, how.alpha)
    row |= {"statistic": idle, "effect": idle / of, "effect_lo": low, "effect_hi": high}
    matched = f"matched by more than a share {1 - how.quantile:.3g} of random parts"
    yes = f"not minimal: {idle} of {of} units are {matched}"
    no = f"no unit of {of} shown to be {matched}; not a proof that all are needed"
    best = of * share_p(0, len(at.inflated), how.quantile, "less")
    return row | _decided(p, how.alpha, yes, no, float(best), len(at.inflated), "random parts")


def _sufficiency(at: Measured, how: Levels) -> Row:
    own, others = _apart(at.model, at.circuit), _apart(at.model, at.references)
    null = f"|s(M) − s(C)| is below that of at most {how.quantile:g} of random circuits of its size"
    yes = f"closer to the model than a share {how.quantile:g} of random circuits of its size (it may still be far from it)"
    no = f"not shown to be closer to the model than a share {how.quantile:g} of random circuits of its size"
    return _against_random("sufficiency", null, int((own < others - at.rounding).sum()), len(others), how, yes, no)


def _necessity(at: Measured, how: Levels) -> Row:
    own, others = _apart(at.model, at.complement), _apart(at.model, at.knocked)
    null = f"|s(M) − s(M∖C)| is above that of at most {how.quantile:g} of random circuits of its size"
    yes = f"knocking it out changes the score more than a share {how.quantile:g} of random circuits of its size"
    no = f"not shown that knocking it out changes the score more than a share {how.quantile:g} of random circuits of its size"
    return _against_random(
        "partial necessity", null, int((own > others + at.rounding).sum()), len(others), how, yes, no
    )


def _against_random(test: str, null: str, count: int, n: int, how: Levels, yes: str, no: str) -> Row:
    low, high = share_interval(count, n, how.alpha)
    row: Row = {"test": test, "null": null, "statistic": count, "of_statistic": "random circuits surpassed", "n": n}
    row |= {
        "of_n": "random circuits",
        "effect": count / n,
        "effect_lo": low,
        "effect_hi": high,
        "of_effect": "share surpassed",
    }
    p = float(share_p(count, n, how.quantile, "greater"))
    return row | _decided(p, how.alpha, yes, f"{no} ({count} of {n})", how.quantile**n, n, "random circuits")


_NO_PERFORMANCE = "the metric compares with the model's own run, where it is 0 by definition; use another --metric"


def _not_tested(why: str) -> Row:
    return {"rejected": None, "verdict": f"not tested: {why}"}


def _decided(p: float, alpha: float, yes: str, no: str, best: float, n: int, of: str, more: str = "") -> Row:
    """Reject where p ≤ α. best: the smallest p that any outcome of n draws could have."""
    notes = [more] if more else []
    if best > alpha:
        notes.append(f"no outcome of {n} {of} could be rejected at {alpha:g}: ask for more")
    elif n < FEW:
        notes.append(f"{n} {of} are few: only large effects can show")
    rejected = bool(p <= alpha)
    return {"p": p, "rejected": rejected, "verdict": yes if rejected else no, "note": "; ".join(notes)}


def _wins(at: Measured) -> tuple[int, int, int]:
    """Pairs (prompts) where the circuit scores higher than the model, where they differ at all, and where they do not."""
    change = at.circuit - at.model
    differ = np.abs(change) > at.rounding
    return int((change > at.rounding).sum()), int(differ.sum()), int((~differ).sum())


def _of_wins(at: Measured, how: Levels, wins: int, n: int, ties: int) -> Row:
    low, high = share_interval(wins, n, how.alpha)
    mean = float((at.circuit - at.model).mean())
    notes = [
        f"mean s(C) − s(M) = {mean:.3g}",
        *([f"{ties} {at.counted} score the same and are left out"] if ties else []),
    ]
    row = {
        "statistic": wins,
        "of_statistic": f"{at.counted} where s(C) > s(M)",
        "n": n,
        "of_n": at.counted,
        "note": "; ".join(notes),
    }
    return row | {
        "effect": wins / n if n else np.nan,
        "effect_lo": low,
        "effect_hi": high,
        "of_effect": "P(s(C) > s(M))",
    }


def _changes(at: Measured) -> tuple[np.ndarray, np.ndarray]:
    """Per unit of C, and per random part, the change of score when it is knocked out; below rounding: none."""
    found = (_apart(at.circuit, at.without), _apart(at.inflated, at.deflated))
    own, parts = (np.where(c <= at.rounding, 0.0, c) for c in found)
    return own, parts


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean |a − b| over pairs."""
    return np.abs(a - b).mean(-1)
