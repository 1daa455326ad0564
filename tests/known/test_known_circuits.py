"""`relp evaluate known_circuits`: the measures against plain counting, and the command as a user runs it."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest

from relp_cli.evaluation.known_circuits import ALL, Question, judge, measures
from relp_cli.known.case import read_case


def plain(values: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """AUROC by counting pairs; precision and recall as the mean over random orders of what ties."""
    kept = [0.0 if v < 1e-6 * max(values) else float(v) for v in values]
    inside, outside = ([v for v, t in zip(kept, truth, strict=True) if bool(t) == side] for side in (True, False))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(inside, outside)]
    rng, hits, taken = np.random.default_rng(0), [], 0
    for _ in range(4000):
        order = sorted(range(len(kept)), key=lambda i: (-kept[i], rng.random()))
        chosen = [i for i in order[: int(truth.sum())] if kept[i] > 0]
        hits.append(sum(bool(truth[i]) for i in chosen))
        taken = len(chosen)
    mean = float(np.mean(hits))
    return sum(wins) / len(wins), mean / taken, mean / int(truth.sum())


@pytest.mark.parametrize("seed", range(4))
def test_measures_count(seed: int) -> None:
    """With ties, zeros and what is too small to count; precision and recall to the error of the random orders."""
    rng = np.random.default_rng(seed)
    values = rng.choice([0.0, 1e-6, 0.5, 1.0, 2.0], size=12)
    truth = rng.permutation(np.arange(12) < 4)
    got = measures(values[None], truth)[0]
    auroc, precision, recall = plain(values, truth)
    assert got[0] == pytest.approx(auroc, abs=1e-12)
    assert got[1:] == pytest.approx([precision, recall], abs=0.03)


def test_measures_by_hand() -> None:
    truth = np.array([True, True, False, False])
    assert measures(np.array([[3.0, 2, 1, 0], [0, 0, 1, 2], [1, 0, 0, 0], [1, 1, 1, 1]]), truth).tolist() == [
        [1, 1, 1], [0, 0, 0], [0.75, 1, 0.5], [0.5, 0.5, 0.5]
    ]  # fmt: skip
    assert np.isnan(measures(np.ones((1, 2)), np.array([True, True]))[0, 0])


def test_exact_patching_misses_or_and_denoising_finds_it() -> None:
    cases = [read_case("either"), read_case("induction")]  # OR, and what is found both ways
    methods = ("atp", "act_patch")
    rows = {
        direction: judge(cases, Question(methods, ("nodes",), direction, bootstrap=20)).set_index(["method", "case"])
        for direction in ("noising", "denoising")
    }
    noising, denoising = rows["noising"], rows["denoising"]
    # Of OR's three nodes only the MLP moves: it is above all 7 others, and the heads tie with them.
    assert noising.auroc["act_patch", "either"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert noising.recall["act_patch", "either"] == pytest.approx(1 / 3)
    assert noising.auroc["act_patch", "induction"] == 1
    assert denoising.auroc["act_patch", "either"] == 1
    mean = noising.loc["act_patch", ALL]
    assert mean.auroc == pytest.approx((2 / 3 + 1) / 2)
    assert mean.auroc_lo == pytest.approx(2 / 3)
    assert mean.auroc_hi == 1


def test_who_is_wrong_where() -> None:
    """What docs/known-circuits.md says, as numbers: gradients that vanish or mislead, a path through no prompt."""
    names = ("opposed", "saturated", "tent", "twins", "ghost")
    table = judge(
        [read_case(name) for name in names], Question(("atp", "ig_inputs", "act_patch"), ("nodes",), bootstrap=2)
    )
    auroc = table.pivot(index="case", columns="method", values="auroc")
    recall = table.pivot(index="case", columns="method", values="recall")
    assert (auroc.act_patch == 1).all()
    assert [auroc.ig_inputs[name] for name in names] == [1, 1, 1, 1, pytest.approx(20 / 21)]
    assert [auroc.atp[name] for name in names] == [0.75, 0.75, pytest.approx(18 / 21), pytest.approx(15 / 16), 1]
    # In each, one part of the circuit is not among the first: a gradient of 0, or a decoy before the small head.
    assert [recall.atp[name] for name in names] == [0.5, 0.5, pytest.approx(2 / 3), 0.5, 1]
    assert recall.ig_inputs["ghost"] == pytest.approx(2 / 3)


def test_the_command(relp: Any, tmp_path: Any) -> None:
    done = relp(
        "evaluate", "known_circuits", "--methods", "atp,eap,act_patch", "--cases", "opposed,two_hops", "--bootstrap", 20
    )
    assert done.code == 0, done.err
    assert "eap does not score nodes: left out there" in done.err
    table = pd.read_csv(tmp_path / "known_circuits.csv").set_index(["space", "method", "case"])
    # The head's two ways have opposite slopes: its gradient is 0, and it ties with the 8 nodes outside.
    assert table.auroc["nodes", "atp", "opposed"] == pytest.approx(0.75)
    assert table.auroc["edges", "eap", "opposed"] == table.auroc["edges", "atp", "opposed"]
    assert table.auroc["edges", "act_patch", ALL] == 1
    one = relp(
        "evaluate",
        "known_circuits",
        "--methods",
        "act_patch",
        "--cases",
        "both",
        "--nodes",
        "nodes",
        "--json",
        "-o",
        "a.csv",
    )
    rows = json.loads(one.out)["rows"]
    assert [(r["case"], r["auroc"], r["precision"], r["recall"]) for r in rows] == [("both", 1, 1, 1), (ALL, 1, 1, 1)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "eiter"], "known circuit 'eiter' is no shipped case or folder; did you mean 'either'"),
        (["--methods", "atpp"], "unknown method 'atpp'; did you mean 'atp'"),
        (["--methods", "eap", "--nodes", "nodes"], "method 'eap' does not score nodes"),
        (["--nodes", "edge"], "unknown sort of components 'edge'; did you mean 'edges'"),
        (["--direction", "noise"], "unknown direction 'noise'; did you mean 'noising'"),
        (["--over-pairs", "sign"], "unknown way to take scores over pairs 'sign'; did you mean 'signed'"),
        (["--cases", "both,both"], "two cases are named 'both'"),
        (["--set", "step=3"], "has a parameter 'step'; did you mean 'steps'"),
        (["--cases", "."], "folder . has no case.json"),
        (["--method", "atp"], "unknown option '--method'; did you mean '--methods'"),
    ],
)
def test_bad_input(relp: Any, arguments: list[str], said: str) -> None:
    done = relp("evaluate", "known_circuits", *arguments)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_benchmark_stands_first_and_a_run_of_its_name_is_still_a_run(relp: Any) -> None:
    done = relp("evaluate", "--json", "known_circuits")
    assert done.code == 2
    assert "'known_circuits' stands first" in done.err
    assert "known_circuits" in relp("evaluate", "known_circuits", "--help").out
    assert (
        "no such" in relp("evaluate", "./known_circuits").err.lower()
        or "known_circuits" in relp("evaluate", "./known_circuits").err
    )


def test_a_dry_run_scores_nothing(relp: Any, tmp_path: Any) -> None:
    done = relp("evaluate", "known_circuits", "--dry-run", "--json", "--methods", "act_patch")
    assert done.code == 0
    assert {"case", "pairs"} <= set(json.loads(done.out)["cases"][0])
    assert not list(tmp_path.iterdir())


def test_cases_are_listed(relp: Any) -> None:
    assert {"either", "two_hops"} <= {row["case"] for row in json.loads(relp("ls", "cases", "--json").out)}
