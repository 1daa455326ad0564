"""Pairs that share their original prompt: standard errors, intervals and tests are of prompts, not of pairs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles.make import exact_float64
from oracles.wrapped import case, close, pairs, run

from relp_cli.evaluation.behaviour import behaviour
from relp_cli.evaluation.circuit_tests import circuit_tests
from relp_cli.evaluation.compare import run_comparison
from relp_cli.evaluation.evaluate import evaluate
from relp_cli.evaluation.overlap import stability
from relp_cli.evaluation.verdicts import Levels
from relp_cli.evaluation.verify import rescore
from relp_cli.methods.request import Request
from relp_cli.methods.score import score_share, score_units
from relp_cli.methods.unfinished import Shard, Unfinished
from relp_cli.scoring import score
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.refine import rank_average, stable_signs
from relp_cli.spaces.scores import Scores
from relp_cli.statistics import resample_counts
from relp_cli.tasks.counted import effective, pairs_text, sharing_note
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.parts import parts_of
from relp_cli.tasks.shared import prompts_of, together

KINDS = ("mlp_out", "head")


def of_prompts(batch: PairBatch, prompts: list[int]) -> PairBatch:
    """The batch's patches, answers and foils with these of its originals (the first token is common to a pair)."""
    original = batch.original[prompts]
    patch = batch.patch.clone()
    patch[:, 0] = original[:, 0]
    return replace(batch, original=original, patch=patch)


# 11 pairs of 6 prompts, in two lengths that share roles but for one; prompts are mixed up, and batches of 3 cut them
SHARED = [
    of_prompts(pairs(7, 5, seed=3, roles=tuple("abcde")), [0, 3, 0, 1, 3, 0, 2]),
    of_prompts(pairs(4, 6, seed=4, roles=tuple("abxcde")), [0, 0, 1, 1]),
]
PROMPTS = np.array([0, 1, 0, 2, 1, 0, 3, 4, 4, 5, 5])


def twice(batches: list[PairBatch]) -> list[PairBatch]:
    """Every pair two times, the copies not beside each other."""
    return [batch.rows(torch.arange(len(batch)).repeat(2)) for batch in batches]


def by_hand(values: np.ndarray, clusters: np.ndarray) -> float:
    """Standard error of the mean of independent clusters' sums, with G/(G − 1): a ratio estimator's linearisation."""
    residuals = values - values.mean()
    sums = np.array([residuals[clusters == c].sum() for c in np.unique(clusters)])
    return float(np.sqrt(len(sums) * np.var(sums, ddof=1)) / len(values))


def errors(scores: Scores) -> torch.Tensor:
    return (scores.variance / scores.n[scores.positions]).sqrt()


@pytest.mark.parametrize("nodes", [KINDS, ("edges",)])
def test_standard_errors_are_of_prompts(nodes: tuple[str, ...]) -> None:
    c = case("pythia")
    with exact_float64():
        single = [score(c.model, [b.rows(slice(i, i + 1))], "atp", nodes) for b in SHARED for i in range(len(b))]
        streamed = score(c.model, SHARED, "atp", nodes, keep_examples=False, batch_size=3)
    kept = run(c, "atp", nodes, SHARED, batch_size=3)
    assert prompts_of(SHARED).tolist() == PROMPTS.tolist() == streamed.prompts.tolist()
    table = torch.zeros(len(single), len(kept.labels), len(kept.units), dtype=torch.float64)
    there = torch.zeros(len(single), len(kept.labels), dtype=torch.bool)
    for i, one in enumerate(single):
        at = [kept.labels.index(label) for label in one.labels]
        table[i, at], there[i, at] = one.dense(one.mean), True
    close(kept.examples, table.flatten(1))  # in the order that was given
    assert torch.equal(kept.present, there) or nodes == ("edges",)
    want, larger = torch.empty(table.shape[1:], dtype=torch.float64), 0
    for pos in range(want.shape[0]):
        mine = there[:, pos].numpy()
        for unit in range(want.shape[1]):
            own = table[mine, pos, unit].numpy()
            robust, independent = by_hand(own, PROMPTS[mine]), by_hand(own, np.arange(len(own)))
            assert independent == pytest.approx(own.std(ddof=1) / len(own) ** 0.5)
            want[pos, unit], larger = max(robust, independent), larger + (robust > independent)
    assert 0 < larger < want.numel()
    for got in (streamed, kept):
        close(errors(got), want.flatten())
        assert (got.meta["n_pairs"], got.meta["n_prompts"]) == (11, 6)


def test_a_data_set_given_twice_says_no_more_than_once(tmp_path) -> None:
    c = case("gpt2")
    batches = [pairs(5, 5, seed=6, roles=tuple("abcde")), pairs(7, 6, seed=7, roles=tuple("abxcde"))]
    once, more = (run_comparison(c.model, b, ["atp"], KINDS, bootstrap=200) for b in (batches, twice(batches)))
    columns = ["pcc", "pcc_lo", "pcc_hi", "pcc_per_pair"]
    assert np.allclose(once.table[columns], more.table[columns], atol=1e-5)
    assert (once.table.n_prompts == once.table.n_pairs).all()
    assert (more.table.n_prompts == 12).all()
    assert (more.table.n_pairs == 24).all()
    for method in ("atp", "act_patch"):
        a, b = once.scores[method], more.scores[method]
        near = errors(a) > 1e-6
        assert torch.allclose(errors(a)[near], errors(b)[near], rtol=1e-3)
        b.save(tmp_path / "scores.safetensors")
        again = Scores.load(tmp_path / "scores.safetensors")
        of = [*range(5), *range(5), *range(5, 12), *range(5, 12)]
        assert again.prompts.tolist() == again["head"].prompts.tolist() == of
        assert torch.equal(stable_signs(a, 0.9, draws=100), stable_signs(again, 0.9, draws=100))
        assert stability(a, 20, top_k=9)[0] == pytest.approx(stability(again, 20, top_k=9)[0])
        rows = torch.ones(24, dtype=torch.bool)
        rows[:5] = rows[10:17] = False  # one copy of each: no prompt is shared any more
        left = again.among(rows)
        assert left.prompts is None
        assert torch.equal(left.variance, a.among(torch.ones(12, dtype=torch.bool)).variance)
        assert rank_average([again]).prompts is None

    circuit = Circuit.from_mask("head", torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(1)) < 0.5)
    circuit = replace(circuit, labels=tuple("abxcde"))
    columns = [f"{n}{end}" for n in ("faithfulness", "completeness") for end in ("", "_lo", "_hi")]
    one, two = (
        evaluate(c.model, b, circuit, exclude_layers=0, bootstrap=200).iloc[0] for b in (batches, twice(batches))
    )
    assert np.allclose(one[columns].astype(float), two[columns].astype(float), atol=1e-5)
    assert (two.n_pairs, two.n_prompts, one.n_pairs, one.n_prompts) == (24, 12, 12, 12)

    one, two = (behaviour(c.model, b, "logit_diff") for b in (batches, twice(batches)))
    assert one.interval == pytest.approx(two.interval)
    assert one.verdict == two.verdict
    how = Levels(permutations=50, references=3, units=2)
    one, two = (circuit_tests(c.model, b, circuit, how, exclude_layers=0)[0] for b in (batches, twice(batches)))
    assert np.allclose(one.p.dropna(), two.p.dropna())
    assert (one.n == two.n).all()
    assert (one.rejected.dropna() == two.rejected.dropna()).all()
    assert (two.n_pairs == 24).all()
    assert "prompts" in {*two.of_n}
    assert "pairs" not in {*two.of_n}


@pytest.mark.parametrize("count", [1, 3, 7])
def test_shards_of_shared_prompts_are_the_whole_to_the_bit(tmp_path, count: int) -> None:
    model = case("gpt2").model

    def request(folder: str, shard: Shard | None = None) -> Request:
        left = Unfinished(tmp_path / folder, "x", shard)
        return Request(unfinished=left, batch_size=2, keep_examples=False)

    whole = score_units(model, SHARED, "relp", KINDS, request("whole"))
    for index in range(count):
        score_share(model, SHARED, "relp", KINDS, request("shards", Shard(index, count)))
    merged = score_units(model, SHARED, "relp", KINDS, request("shards"))
    assert torch.equal(whole.mean, merged.mean)
    assert torch.equal(whole.variance, merged.variance)


def test_exact_scores_of_candidates_are_of_prompts_too() -> None:
    """And of all pairs, also where the first of the cheap methods scored some of them alone (`relp+auto`)."""
    c = case("pythia")
    cheap, exact = run(c, "atp", ("mlp_out",), SHARED), run(c, "act_patch", ("mlp_out",), SHARED)
    of_some = cheap.among(torch.arange(11) < 7)
    with exact_float64():
        found = rescore(c.model, SHARED, [of_some], cheap.n_nodes, batch_size=3)
    assert of_some.meta["n_pairs"] == 7
    assert (found.meta["n_pairs"], found.meta["n_prompts"], found.prompts.tolist()) == (11, 6, PROMPTS.tolist())
    assert torch.equal(found.n, exact.n)
    close(found.mean, exact.mean)
    close(found.variance[~exact.variance.isnan()], exact.variance[~exact.variance.isnan()])
    close(found.examples, exact.examples)


def test_clusters_are_drawn_whole() -> None:
    draws = resample_counts(11, 2000, 0, PROMPTS)
    for prompt in range(6):
        assert (draws[:, prompt == PROMPTS] == draws[:, prompt == PROMPTS][:, :1]).all()
    firsts = draws[:, [0, 1, 3, 6, 7, 9]]
    assert (firsts.sum(1) == 6).all()
    assert firsts.mean(0) == pytest.approx(1, abs=0.1)
    assert np.array_equal(resample_counts(5, 9, 1, np.arange(5)), resample_counts(5, 9, 1))


def test_prompts_and_what_is_said_of_them() -> None:
    assert together([pairs(5)])[1] is None
    rows, order = together(SHARED)
    assert order.tolist() == [0, 2, 5, 1, 4, 3, 6, 7, 8, 9, 10]
    assert torch.equal(rows[0].patch, SHARED[0].patch[[0, 2, 5, 1, 4, 3, 6]])
    sequences = [
        replace(b, answer=torch.stack([b.answer, b.foil], 2), foil=torch.stack([b.foil, b.foil], 2)) for b in SHARED
    ]
    assert prompts_of(parts_of(sequences)).tolist() == PROMPTS.tolist()
    assert effective(np.arange(9)) == 9
    assert effective(np.repeat(np.arange(8), 3)) == 8
    assert effective(np.array([0, 0, 0, 1])) == pytest.approx(16 / 10)
    assert pairs_text(24, 8) == pairs_text(np.int64(24), np.float64(8)) == "24 pairs of 8 prompts"  # type: ignore[arg-type]
    assert [pairs_text(24, 24), pairs_text(24), pairs_text(24, float("nan"))] == ["24 pairs"] * 3
    assert (
        pairs_text(np.int64(24), np.int64(8), "held-out pairs") == "24 held-out pairs of 8 prompts"
    )  # of a table's row
    assert [pairs_text(1, 1), pairs_text(3, 1)] == ["1 pair", "3 pairs of 1 prompt"]
    assert sharing_note(np.repeat(np.arange(8), 3)).startswith("WARNING: 24 pairs of 8 prompts:")
    assert "still too small" not in sharing_note(np.repeat(np.arange(40), 3))
    assert sharing_note(np.array([*range(98), 0, 1])) == ""  # worth 96
    assert "all 3 pairs have one prompt" in sharing_note(np.zeros(3, dtype=int))


def test_one_prompt_has_no_standard_error() -> None:
    c = case("gpt2")
    got = score(c.model, [of_prompts(pairs(3), [0, 0, 0])], "atp", KINDS)
    assert got.variance.isnan().all()
    assert got.top(3).se.isna().all()


def test_on_the_command_line(relp, tmp_path) -> None:
    """Four words and two templates: 12 pairs of 8 prompts, before anything is loaded and in every output."""
    task = """name: few
slots:
  A: {values: [John, James, Sarah, Alice], single: true}
templates:
  - "Then, Mary and {IO=A} went to the store. Mary gave a ring to"
  - "When, Mary and {IO=A} went to the store. Mary gave a ring to"
patch: {A: other}
answer: "{A}"
"""
    (tmp_path / "few.yaml").write_text(task)
    which = ("--split", "all", "--pairs", 24)
    done = relp("show", "few.yaml", *which, "--examples", 0)
    assert done.code == 0, done.err
    assert "over 24 pairs of 8 prompts" in done.out
    assert "WARNING: 24 pairs of 8 prompts: pairs of one prompt are no independent evidence" in done.err
    done = relp(
        "score",
        "few.yaml",
        "--split",
        "all",
        "--pairs",
        24,
        "--method",
        "atp",
        "--nodes",
        "mlp_out",
        "-o",
        "run",
        "--json",
    )
    record = json.loads(done.out)
    assert (record["scores"]["n_pairs"], record["scores"]["n_prompts"]) == (24, 8)
    assert "prompt_of" not in record["scores"]
    assert any(line.startswith("WARNING: 24 pairs of 8 prompts") for line in record["notes"])
    assert "24 pairs of 8 prompts (all)" in relp("show", "run").out
    assert relp("report", "run").code == 0
    assert "24 pairs of 8 prompts" in (tmp_path / "run" / "report.html").read_text()
    done = relp("validate", "few.yaml", "--model", "tiny-gpt2")
    assert "prompts" in done.out
