"""The statistics of tests of circuits: exact small cases, plain re-computations, and by simulation how often a true null
hypothesis, at the edge of what it allows, is rejected (5 % ± 1.5 %), and how often a false one.
"""

from math import comb, exp

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from relp_cli.errors import RelpError
from relp_cli.evaluation import verdicts
from relp_cli.evaluation.hypotheses import holm, hsic, hsic_p, kernel, reversed_sign_p, share_interval, share_p, sign_p
from relp_cli.evaluation.verdicts import Levels, Measured, rows, unit_rows

SIZE, BAND = 0.05, 0.015


def near_the_level(n: int, p: float, tail: str) -> int:
    """Of the sample sizes from n up, the first at which an exact binomial test attains nearly its level: counts are whole."""
    for size in range(n, 2 * n):
        low, high = binom.cdf(np.arange(size), size, p), binom.sf(np.arange(size), size, p)
        if 0.046 < max((v for v in (low if tail == "low" else high) if v <= SIZE), default=0) <= SIZE:
            return size
    raise AssertionError


def test_small_cases_by_hand():
    assert sign_p(4, 4, 0.0) == pytest.approx(2 / 16)
    assert sign_p(2, 2, 0.1) == pytest.approx(0.6**2 + 0.4**2)
    assert sign_p(1, 2, 0.1) == sign_p(0, 0, 0.1) == 1
    assert reversed_sign_p(1, 2, 0.1) == pytest.approx(1 - 0.6**2)
    assert share_p(2, 2, 0.9, "greater") == pytest.approx(0.81)
    assert share_p(0, 2, 0.9, "less") == pytest.approx(0.01)
    assert holm(np.array([0.01, 0.04, 0.03, 0.9])) == pytest.approx([0.04, 0.09, 0.09, 0.9])
    two = np.array([0.0, 1.0])
    assert hsic(kernel(two), kernel(two)) == pytest.approx((1 - exp(-0.5)) ** 2 / 4)
    assert hsic_p(two, two, 50, 0)[1:] == pytest.approx((1, 1))  # either order of two is as large
    assert hsic_p(two, np.ones(2), 50, 0) == (0, 0, 1)
    assert share_interval(0, 0, 0.05) == (0, 1)


def test_binomial_tests_are_scipys_and_the_sum_over_outcomes():
    for n in (1, 7, 20):
        for k in range(n + 1):
            assert sign_p(k, n, 0.0) == pytest.approx(binomtest(k, n).pvalue)
            assert share_p(k, n, 0.9, "less") == pytest.approx(binomtest(k, n, 0.9, "less").pvalue)
            assert share_p(k, n, 0.9, "greater") == pytest.approx(binomtest(k, n, 0.9, "greater").pvalue)
            assert share_interval(k, n, 0.05) == pytest.approx(tuple(binomtest(k, n).proportion_ci(method="exact")))
            for epsilon in (0.1, 0.3):  # the largest over the null
                chances = np.linspace(0.5 - epsilon, 0.5 + epsilon, 41)
                extreme = [j for j in range(n + 1) if abs(2 * j - n) >= abs(2 * k - n)]
                worst = max(sum(comb(n, j) * c**j * (1 - c) ** (n - j) for j in extreme) for c in chances)
                assert sign_p(k, n, epsilon) == pytest.approx(worst)


def hsic_by_loops(x, y):
    """(1/n²)Σ k_ij l_ij + (1/n⁴)Σ k Σ l − (2/n³)Σ_i (Σ_j k_ij)(Σ_j l_ij)."""

    def gauss(v):
        apart = sorted(abs(a - b) for i, a in enumerate(v) for b in v[:i] if a != b)
        half = len(apart) // 2
        width = apart[half] if len(apart) % 2 else (apart[half - 1] + apart[half]) / 2
        return [[exp(-((a - b) ** 2) / (2 * width**2)) for b in v] for a in v]

    k, m, n = gauss(x), gauss(y), len(x)
    both = sum(k[i][j] * m[i][j] for i in range(n) for j in range(n)) / n**2
    apart = sum(map(sum, k)) * sum(map(sum, m)) / n**4
    return both + apart - 2 * sum(sum(k[i]) * sum(m[i]) for i in range(n)) / n**3


def test_hsic_is_the_double_sum_and_its_permutations_are_counted():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=9), rng.normal(size=9)
    y[:3] = y[3]  # ties
    statistic, share, p = hsic_p(x, y, 300, 5)
    assert statistic == pytest.approx(hsic_by_loops(x.tolist(), y.tolist()), abs=1e-14)
    most = (hsic_by_loops(x.tolist(), x.tolist()) * hsic_by_loops(y.tolist(), y.tolist())) ** 0.5
    assert share == pytest.approx(statistic / most)
    other = np.random.default_rng(6)
    permuted = [hsic_by_loops(x.tolist(), other.permutation(y).tolist()) for _ in range(300)]
    assert p == pytest.approx(np.mean([v >= statistic for v in permuted]), abs=0.1)
    assert hsic_p(x, 3 * y + 1, 300, 5) == pytest.approx((statistic, share, p))  # no unit of measurement


def test_permutations_held_at_once_do_not_matter(monkeypatch):
    x, y = np.random.default_rng(1).normal(size=(2, 6))
    whole = hsic_p(x, y, 40, 2)
    monkeypatch.setattr("relp_cli.evaluation.hypotheses.GATHERED", 36 * 40)
    assert hsic_p(x, y, 40, 2) == whole


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_false_positives_of_equivalence(epsilon):
    n, rng = near_the_level(90, 0.5 + epsilon, "high") if epsilon else 88, np.random.default_rng(0)
    for chance in {0.5 - epsilon, 0.5 + epsilon}:
        assert (sign_p(rng.binomial(n, chance, 20_000), n, epsilon) <= SIZE).mean() == pytest.approx(SIZE, abs=BAND)
    if epsilon:  # within, fewer
        assert (sign_p(rng.binomial(n, 0.5, 20_000), n, epsilon) <= SIZE).mean() < SIZE / 5
    assert (sign_p(rng.binomial(n, 0.8, 1000), n, epsilon) <= SIZE).mean() > 0.95


def test_false_positives_of_equivalence_reversed():
    n, rng = near_the_level(200, 0.6, "low"), np.random.default_rng(0)
    for chance in (0.4, 0.6):
        assert (reversed_sign_p(rng.binomial(n, chance, 20_000), n, 0.1) <= SIZE).mean() == pytest.approx(
            SIZE, abs=BAND
        )
    assert (reversed_sign_p(rng.binomial(2 * n, 0.5, 1000), 2 * n, 0.1) <= SIZE).mean() > 0.9


@pytest.mark.parametrize("draw", ["normal", "standard_cauchy", "integers"])
def test_false_positives_of_independence(draw):
    rng = np.random.default_rng(0)
    more = {"low": 0, "high": 4} if draw == "integers" else {}  # many ties
    samples = getattr(rng, draw)(size=(1000, 2, 13), **more).astype(float)
    p = np.array([hsic_p(x, y, 99, seed)[2] for seed, (x, y) in enumerate(samples)])
    assert (p <= SIZE).mean() == pytest.approx(SIZE, abs=BAND)


def test_power_of_independence():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 40))
    y = x**2 + 0.3 * rng.normal(size=x.shape)  # not correlated with x
    assert np.mean([hsic_p(a, b, 99, 0)[2] <= SIZE for a, b in zip(x, y, strict=True)]) > 0.95


def measured(rng, *, circuit=0.0, complement=0.0, references=None, knocked=None, parts=None, units=()):
    """Scores of 6 pairs in which each run is the model's, or the circuit's, and a constant."""
    model = rng.normal(size=6)
    none = np.zeros(1)
    references, knocked, parts = (none if v is None else v for v in (references, knocked, parts))
    own = model + circuit
    return Measured(model, own, model + complement, model + references[:, None], model + knocked[:, None],
                    own + parts[:, None], np.tile(own, (len(parts), 1)), own + np.asarray(units)[:, None])  # fmt: skip


def test_false_positives_and_power_of_tests_against_random_circuits():
    """Sufficiency and partial necessity, where exactly a share q of random circuits is surpassed; and where all are."""
    n, rng, how = near_the_level(29, 0.9, "high"), np.random.default_rng(0), Levels(quantile=0.9)
    assert n == 29
    for truly, draws in ((0.1, 1500), (1e-4, 50)):
        rejected = {"sufficiency": 0, "partial necessity": 0}
        for _ in range(draws):
            drawn = rng.uniform(size=(2, n))
            at = measured(rng, circuit=truly, complement=1 - truly, references=drawn[0], knocked=drawn[1])
            for made in (verdicts._sufficiency(at, how), verdicts._necessity(at, how)):
                rejected[made["test"]] += made["rejected"]
        for count in rejected.values():
            assert count / draws == pytest.approx(SIZE, abs=BAND) if truly == 0.1 else count > 0.95 * draws


def test_false_positives_of_minimality_over_all_units():
    """Units that change the score exactly as much as a share q of random parts: any of them rejected in no more than 5 %; in
    about 5 % where there is one unit, or p-values are independent.
    """
    n, rng = near_the_level(80, 0.9, "low"), np.random.default_rng(0)
    for units in ((0.9,), (0.9,) * 10):
        rejected = 0
        for _ in range(1500):
            at = measured(rng, parts=rng.uniform(size=n), units=units)
            rejected += verdicts._minimality(at, Levels())["rejected"]
        rate = rejected / 1500
        assert rate == pytest.approx(SIZE, abs=BAND) if len(units) == 1 else rate < SIZE + BAND
    p = rng.uniform(size=(20_000, 20))
    assert np.mean([holm(row).min() <= SIZE for row in p]) == pytest.approx(SIZE, abs=BAND)
    idle = measured(rng, parts=rng.uniform(size=50), units=(2.0, 0.3, 3.0, 0.0))
    found = unit_rows(idle, Levels(), [{"unit": i} for i in range(4)])
    assert [u["rejected"] for u in found] == [False, True, False, True]
    assert found[1]["change"] == pytest.approx(0.3)
    assert verdicts._minimality(idle, Levels())["verdict"].startswith("not minimal: 2 of 4 units")


def test_holm_rejects_what_its_steps_reject():
    rng = np.random.default_rng(0)
    for p in rng.uniform(size=(200, 7)) ** 3:
        rejected, left = set(), list(range(7))
        while left:
            best = min(left, key=lambda i: p[i])
            if p[best] > SIZE / len(left):
                break
            rejected.add(best)
            left.remove(best)
        assert set(np.flatnonzero(holm(p) <= SIZE)) == rejected


def test_what_cannot_be_tested_and_what_no_outcome_could_reject_says_so():
    rng = np.random.default_rng(0)
    same = measured(rng, references=np.ones(5), knocked=np.ones(5), parts=np.zeros(0))
    by = {r["test"]: r for r in rows(same, Levels())}
    assert by["equivalence"]["verdict"] == "not tested: circuit and model score every pair the same"
    assert by["minimality"]["verdict"].startswith("not tested: ")
    assert by["sufficiency"]["note"] == "no outcome of 5 random circuits could be rejected at 0.05: ask for more"
    assert all(r["rejected"] is None or not r["rejected"] or r["p"] <= SIZE for r in by.values())
    constant = Measured(*(np.ones(9), np.arange(9.0), np.arange(9.0)), *(np.zeros((2, 9)),) * 4, np.zeros((1, 9)))
    by = {r["test"]: r for r in rows(constant, Levels())}
    assert by["independence"]["verdict"] == "not tested: the model scores every pair the same"
    assert by["equivalence"]["n"] == 8  # one tie, which is said
    assert "1 pairs score the same and are left out" in by["equivalence"]["note"]
    for no in ("is equivalent", "are equivalent", "is minimal", "is independent"):
        assert all(no not in r["verdict"].replace("not a proof that they are equivalent", "") for r in by.values())


def test_settings_out_of_range_are_refused():
    for bad, name in (
        ({"alpha": 0.0}, "alpha"), ({"alpha": float("nan")}, "alpha"), ({"epsilon": 0.5}, "epsilon"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"quantile": 1.0}, "quantile"), ({"references": 0}, "references"), ({"units": 0}, "units"),
    ):  # fmt: skip
        with pytest.raises(RelpError, match=f"--{name}"):
            Levels(**bad).check()
    Levels(epsilon=0.0).check()
