"""MIB's measures against a recomputation from the definitions: plain float64 runs of the oracle, sums written out."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.evaluation.mib import Curve, MibValues, mib, mib_circuits, mib_measures, without_positions
from relp_cli.spaces.graph import Graph
from relp_cli.studies.evaluating import circuits_of
from tests.oracles import edges as oracle
from tests.oracles.forward import forward
from tests.oracles.make import exact_float64
from tests.oracles.wrapped import Case, case, pairs, run

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def areas_by_hand(f: list[float], size: list[float], right: list[float]) -> tuple[float, float, float]:
    cpr = cmd = accuracy = 0.0
    for i in range(9):
        step = SHARES[i + 1] - SHARES[i]
        cpr += step * (f[i] + f[i + 1]) / 2
        cmd += step * (abs(1 - size[i]) + abs(1 - size[i + 1])) / 2
        accuracy += (math.log(SHARES[i + 1]) - math.log(SHARES[i])) * (right[i] + right[i + 1]) / 2
    return cpr, cmd, accuracy / math.log(1000)


def connected(kept: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without edges whose writer nothing reaches, or whose reader's node reaches nothing, until none is left."""
    while True:
        read = {v.partition("<")[0] for _, v in kept} | {"input"}
        wrote = {u for u, _ in kept} | {"logits"}
        left = {(u, v) for u, v in kept if u in read and v.partition("<")[0] in wrote}
        if left == kept:
            return kept
        kept = left


def first(strength: dict[Any, float], k: int) -> set[Any]:
    return set(sorted(strength, key=lambda unit: -strength[unit])[:k])


def measured(c: Case, scores: Any) -> Any:
    with exact_float64():
        return mib(c.model, [c.batch], scores, bootstrap=50)


def check(c: Case, summary: dict[str, Any], table: Any, logits: dict[str, list[Tensor]], empty: Tensor) -> None:
    """logits: ranking → [fraction] Float[pair, vocab] of the circuits; empty: those of the empty one."""
    full = oracle.run(*c.prompts[:3]).logits[:, -1]
    rows = torch.arange(len(full))

    def values(x: Tensor) -> Tensor:
        return x[rows, c.batch.answer[:, 0]] - x[rows, c.batch.foil[:, 0]]

    m = {"full": values(full).mean().item(), "empty": values(empty).mean().item()}
    f = {
        name: [(values(x).mean().item() - m["empty"]) / (m["full"] - m["empty"]) for x in found]
        for name, found in logits.items()
    }
    right = [(values(x) > 0).double().mean().item() for x in logits["signed"]]
    for name, found in f.items():
        assert table[table.ranking == name].faithfulness.tolist() == pytest.approx(found, abs=1e-8)
    assert table[table.ranking == "signed"].accuracy.tolist() == right
    want = areas_by_hand(f["signed"], f["absolute"], right)
    assert (summary["CPR"], summary["CMD"], summary["acc_auc"]) == pytest.approx(want, abs=1e-8)
    assert (summary["F_M"], summary["F_empty"]) == pytest.approx((m["full"], m["empty"]), abs=1e-8)
    assert f["signed"][-1] == pytest.approx(1)
    assert f["signed"] != f["absolute"]


@pytest.mark.parametrize(("shape", "direction"), [("gpt2", "noising"), ("qwen2", "denoising"), ("pythia", "noising")])
def test_edges(shape: str, direction: str) -> None:
    c = case(shape)
    scores = run(c, "eap", ["edges"], direction=direction)["edges"]
    summary, table = measured(c, scores)
    w, config, original, patch = c.prompts
    source = oracle.run(w, config, patch).written
    names = [tuple(name.split("->")) for name in scores.edge_names()]
    support = dict(zip(names, ((-1 if direction == "noising" else 1) * scores.mean[scores.mask]).tolist(), strict=True))
    logits: dict[str, list[Tensor]] = {}
    for ranking, strength in (("signed", support), ("absolute", {n: abs(s) for n, s in support.items()})):
        asked = [int(p * len(names)) for p in SHARES]
        kept = [connected(first(strength, k)) for k in asked]
        part = table[table.ranking == ranking]
        assert part.n_asked.tolist() == asked
        assert part.n_kept.tolist() == [len(edges) for edges in kept]
        logits[ranking] = [oracle.circuit_logits(w, config, original, edges, source)[:, -1] for edges in kept]
    check(c, summary, table, logits, oracle.run(w, config, patch).logits[:, -1])


@pytest.mark.parametrize("kinds", [("head", "mlp_out"), ("mlp_neuron",), ("mlp_dim",)])
def test_nodes_and_neurons(kinds: tuple[str, ...]) -> None:
    """Scores per position, of which the sums over positions are ranked; a unit is in everywhere or nowhere."""
    c = case("qwen2")
    scores = run(c, "atp", kinds)
    summary, table = measured(c, scores)
    w, config, original, patch = c.prompts
    source = forward(w, config, patch)
    support = {
        (kind, at): -score
        for kind in kinds
        for at, score in enumerate(scores[kind].mean.sum(1).flatten().tolist())  # [layer, *unit]
    }

    def logits_of(kept: set[tuple[str, int]]) -> Tensor:
        holds = {}
        for kind in kinds:
            site = "mlp_out" if kind == "mlp_dim" else kind
            shape = scores[kind].mean.sum(1).shape
            inside = torch.tensor([(kind, i) in kept for i in range(shape.numel())]).view(shape)
            for layer in range(shape[0]):
                keep = (
                    inside[layer]
                    if "unit" in str(kind) or kind in ("mlp_neuron", "mlp_dim")
                    else inside[layer][..., None]
                )
                other = source[site][layer]
                holds[site, layer] = lambda t, keep=keep, other=other: torch.where(keep, t, other)
        return forward(w, config, original, patch=holds).logits[:, -1]

    asked = [int(p * len(support)) for p in SHARES]
    by_size = {unit: abs(s) for unit, s in support.items()}
    logits = {
        "signed": [logits_of(first(support, k)) for k in asked],
        "absolute": [logits_of(first(by_size, k)) for k in asked],
    }
    assert table.n_asked.tolist() == table.n_kept.tolist() == 2 * asked
    check(c, summary, table, logits, logits_of(set()))


def test_positions_that_few_pairs_have_weigh_as_much_as_these_pairs() -> None:
    """Pairs of two lengths: a role that one pair of five has counts a fifth in the sum over positions."""
    c = case("gpt2")
    long, short = pairs(1, 7, 2, tuple("abcdefg")), pairs(4, 6, 3, tuple("abcdef"))
    scores = run(c, "atp", ["head"], [short, long])
    parts = [run(c, "atp", ["head"], [batch]) for batch in (short, long)]
    want = sum(len(b) * p["head"].mean.sum(1) for b, p in zip((short, long), parts, strict=True)) / 5
    summed = without_positions(scores)
    torch.testing.assert_close(summed["head"].mean[:, 0], want)
    assert not torch.allclose(scores["head"].mean.sum(1), want)
    kept = run(c, "eap", ["edges"], [c.batch], positions="keep")
    torch.testing.assert_close(without_positions(kept).mean, run(c, "eap", ["edges"]).mean)


def by_hand(values: dict[str, list[list[float]]], full: list[float], empty: list[float]) -> MibValues:
    curves = [
        Curve(name, [0] * 10, [0] * 10, v, [[float(x > 0) for x in row] for row in v]) for name, v in values.items()
    ]
    return MibValues(list(SHARES), 100, full, empty, [1.0] * len(full), curves)


def test_measures_of_numbers_that_can_be_done_on_paper() -> None:
    """A circuit that is twice the model everywhere: CPR 2 · .999, CMD .999, and an accuracy that cannot exceed 1."""
    twice = by_hand({"signed": [[4.0, 8.0]] * 10, "absolute": [[4.0, 8.0]] * 10}, [2.0, 4.0], [0.0, 0.0])
    summary, _ = mib_measures(twice, bootstrap=20)
    assert [summary[k] for k in ("CPR", "CMD", "acc_auc")] == pytest.approx([2 * 0.999, 0.999, 1.0])
    assert [summary[f"CPR{end}"] for end in ("_lo", "_hi")] == pytest.approx([1.998, 1.998])  # the same in every draw
    half = by_hand({"absolute": [[0.0, 0.0]] * 9 + [[2.0, 4.0]]}, [2.0, 4.0], [0.0, 0.0])  # all of it in the last step
    summary, _ = mib_measures(half, bootstrap=20)
    assert [summary[k] for k in ("CPR", "CMD", "acc_auc")] == pytest.approx(
        [0.25, 0.499 + 0.25, math.log(2) / 2 / math.log(1000)]
    )
    flat = by_hand({"absolute": [[1.0, 1.0]] * 10}, [1.0, 1.0], [1.0, 1.0])
    summary, table = mib_measures(flat, bootstrap=20)
    assert np.isnan([summary[k] for k in ("CPR", "CMD", "CPR_lo")]).all()
    assert summary["acc_auc"] == pytest.approx(1)
    assert summary["note"].startswith("ill-posed")
    assert table.faithfulness.isna().all()


def test_intervals_are_those_of_resampled_pairs() -> None:
    rng = np.random.default_rng(0)
    full, empty = rng.normal(3, 0.5, 40), rng.normal(0, 0.5, 40)
    v = {
        name: (empty + rng.uniform(0, 1, (10, 1)) * (full - empty) + rng.normal(0, 0.3, (10, 40)))
        for name in ("signed", "absolute")
    }
    values = by_hand({k: x.tolist() for k, x in v.items()}, full.tolist(), empty.tolist())
    summary, table = mib_measures(values, seed=3, bootstrap=400)
    again = []
    for _ in range(400):
        pick = rng.integers(40, size=40)
        gap = full[pick].mean() - empty[pick].mean()
        f = [[(x[i][pick].mean() - empty[pick].mean()) / gap for i in range(10)] for x in v.values()]
        again.append(areas_by_hand(*f, [(v["signed"][i][pick] > 0).mean() for i in range(10)]))
    for at, name in enumerate(("CPR", "CMD", "acc_auc")):
        low, high = np.quantile([a[at] for a in again], [0.025, 0.975])
        width = high - low
        assert summary[f"{name}_lo"] == pytest.approx(low, abs=0.15 * width)
        assert summary[f"{name}_hi"] == pytest.approx(high, abs=0.15 * width)
        assert summary[f"{name}_lo"] < summary[name] < summary[f"{name}_hi"]
    assert (table.faithfulness_lo <= table.faithfulness).all()
    assert MibValues.from_dict(json.loads(json.dumps(values.as_dict()))) == values


def test_scores_without_sign_are_ranked_by_size_alone() -> None:
    c = case("gpt2")
    scores = run(c, "atp_star", ["head"])
    assert not scores.meta["signed"]
    summary, table = measured(c, scores)
    assert set(table.ranking) == {"absolute"}
    assert 0 <= summary["acc_auc"] <= 1


def test_circuits_are_nested() -> None:
    scores = run(case("gpt2"), "eap", ["edges"])
    chosen = mib_circuits(scores)["signed"]
    graph: Graph = scores.units.structure
    assert [c.n_nodes for c in chosen][-1] == graph.n_edges == 262
    for small, large in itertools.pairwise(chosen):
        assert not (small.mask & ~large.mask).any()
    assert [len(circuits_of(scores, f"fractions:{which}")) for which in ("mib", ".1,.5")] == [10, 2]


def test_what_cannot_be_measured_is_refused() -> None:
    c = case("gpt2")
    scores = run(c, "eap", ["edges"])
    with pytest.raises(RelpError, match="needs patch prompts"):
        mib(c.model, [replace(c.batch, patch=None)], scores)
    with pytest.raises(RelpError, match="graph"):
        mib(case("gpt2", layers=2).model, [c.batch], scores)
    units = replace(scores.units, space="features", structure=None)
    with pytest.raises(RelpError, match="MIB measures edges and nodes, not features"):
        mib_circuits(replace(scores, units=units))
