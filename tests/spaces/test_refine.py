"""Stable signs against plain NumPy, averaged ranks by hand, and both on the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import relp_cli
from relp_cli.errors import RelpError
from relp_cli.selection import select
from relp_cli.spaces.refine import only_stable, rank_average, stable_signs
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.units import Block, Units
from relp_cli.statistics import resample_counts

UNITS = Units("nodes", tuple(Block("mlp_out", layer, 1) for layer in range(4)))


def scores_of(values, **meta):
    mean = torch.tensor(values, dtype=torch.float64)
    labels = tuple("ab"[: len(mean) // 4])
    about = {"method": "atp", "model": "m", "revision": "1", "direction": "noising", "signed": True} | meta
    return Scores(UNITS, labels, "role", torch.tensor([9] * len(labels)), mean, mean, meta=about)


def with_examples(n=20, seed=0):
    rng = np.random.default_rng(seed)
    present = rng.random((n, 2)) < 0.7
    present[:, 0] = True
    examples = rng.standard_normal((n, 8)) + np.array([2, 0.5, 0.2, 0, -2, -0.5, -0.2, 0.1])
    examples[:, 3] = 0
    examples *= present.repeat(4, 1)
    mean = examples.sum(0) / present.sum(0).repeat(4)
    base = scores_of(mean.tolist())
    return replace(base, examples=torch.from_numpy(examples), present=torch.from_numpy(present)), examples, present


@pytest.mark.parametrize("aggregate", ["none", "sum"])
@pytest.mark.parametrize("confidence", [0.6, 0.9, 1.0])
def test_stable_signs_are_those_of_plain_resampling(aggregate, confidence):
    scores, examples, present = with_examples()

    def means(rows):
        found = np.array([examples[rows, c].sum() / max(present[rows, c // 4].sum(), 1) for c in range(8)])
        own = examples[rows].reshape(-1, 2, 4).sum(1)  # of each pair, over its positions
        return found if aggregate == "none" else np.tile(own.mean(0), 2)

    whole, agreeing = np.sign(means(np.arange(20))), np.zeros(8)
    for counts in resample_counts(20, 200, 3):
        agreeing += np.sign(means(np.repeat(np.arange(20), counts))) == whole
    want = (whole != 0) & (agreeing / 200 >= confidence - 1e-12)
    assert stable_signs(scores, confidence, aggregate, 200, 3).tolist() == want.tolist()
    assert aggregate == "sum" or 0 < want.sum() < 8
    kept, left = only_stable(scores, confidence, aggregate, 200, 3)
    assert left == want.sum()
    assert torch.equal(kept.mean.isfinite(), torch.from_numpy(want))


def test_units_of_unstable_sign_are_selected_by_nothing():
    scores, *_ = with_examples()
    kept, left = only_stable(scores, 0.95)
    stable = kept.mean.isfinite()
    for how in ({"threshold": -1}, {"top_k": 8}, {"top_p": 1}):
        assert torch.equal(select(kept, **how).mask.flatten(), stable), how
    strongest = torch.where(stable, scores.mean.abs(), 0).topk(2).indices
    assert sorted(select(kept, top_k=2).mask.flatten().nonzero()[:, 0].tolist()) == sorted(strongest.tolist())
    assert left == stable.sum()


def test_refusals_of_signs():
    scores, *_ = with_examples()
    for bad, confidence, why in (
        (scores, 0.5, "above 0.5"),
        (replace(scores, examples=None), 0.9, "per-example"),
        (replace(scores, meta={"method": "grad_drop", "signed": False}), 0.9, "grad_drop scores have no sign"),
    ):
        with pytest.raises(RelpError, match=why):
            stable_signs(bad, confidence)


def test_ranks_by_hand():
    one = scores_of([-4.0, 3, 0, 1], method="atp")  # |score|: ranks from below 4, 3, 1, 2
    two = scores_of([0.2, 0.1, 0.1, -0.3], method="relp")  # 3, 1½, 1½, 4
    average = rank_average([one, two])
    assert average.mean.tolist() == pytest.approx([7 / 8, 4.5 / 8, 2.5 / 8, 6 / 8])
    assert average.meta["method"] == "rank average of atp, relp"
    assert select(average, top_k=2).mask.flatten().tolist() == [True, False, False, True]
    assert select(average, threshold=0.5).mask.flatten().tolist() == [True, True, False, True]
    # Negative scores alone: ranked where both runs have them.
    both = rank_average([scores_of([-4.0, -1, 2, -3]), scores_of([-1.0, 5, -2, -7])], "negative")
    assert both.mean[[0, 3]].tolist() == pytest.approx([(4 / 4 + 3 / 4) / 2 - 1 / 8, 7 / 8])
    assert both.mean[[1, 2]].isnan().all()
    # From support to opposition: in noising, support is negative; in denoising positive.
    signed = rank_average([scores_of([-4.0, 3, 0, 1]), scores_of([4.0, -3, 0, -1], direction="denoising")], "signed")
    assert signed.mean.tolist() == pytest.approx([1, 0.25, 0.75, 0.5])
    # Without positions: summed first, so that runs may have different ones.
    summed = rank_average([scores_of([1.0, 0, 0, 0, 1, 5, 0, 4]), scores_of([3.0, 2, 1, 4])], aggregate="sum")
    assert summed.labels == ("*",)
    assert summed.mean.tolist() == pytest.approx([(2 + 3) / 8, (4 + 2) / 8, (1 + 1) / 8, (3 + 4) / 8])


def test_averaged_ranks_are_added_up_over_positions_once():
    """Not once for each of the runs, whose pairs are counted together."""
    parts = [scores_of([1.0, 0, 0, 0, 1, 5, 0, 4], n_pairs=9), scores_of([3.0, 2, 1, 4, 0, 0, 2, 1], n_pairs=9)]
    average = rank_average(parts)
    assert average.meta["n_pairs"] == 18 == int(average.n.max())
    assert torch.allclose(average.summed(average.mean), average.mean.view(2, 4).sum(0))


def test_rank_average_does_not_care_for_scale_or_order():
    rng = np.random.default_rng(0)
    parts = [scores_of(rng.standard_normal(8).tolist()) for _ in range(3)]
    want = rank_average(parts).mean
    scaled = [replace(part, mean=part.mean * factor) for part, factor in zip(parts, (1e-6, -3, 1e5), strict=True)]
    assert torch.allclose(rank_average(scaled[::-1]).mean, want)
    assert torch.allclose(rank_average(parts[:1] * 3).mean, rank_average(parts[:1]).mean)


def test_refusals_of_averages():
    with pytest.raises(RelpError, match="only edge and feature circuits can be selected with connected"):
        select(scores_of([1.0, 2, 3, 4]), top_k=2, connected=True)
    one = scores_of([1.0, 2, 3, 4])
    other = replace(one, units=Units("nodes", UNITS.blocks[:3]), mean=one.mean[:3], variance=one.mean[:3])
    for two, sign, why in (
        (scores_of([1.0, 2, 3, 4], model="other"), "absolute", "different models: 'm' and 'other'"),
        (other, "absolute", "different units"),
        (scores_of([1.0] * 8), "absolute", "different positions: --aggregate sum"),
        (scores_of([1.0, 2, 3, 4], direction="denoising"), "negative", "both directions"),
        (one, "big", "unknown sign 'big'"),
    ):
        with pytest.raises(RelpError, match=why):
            rank_average([one, two], sign)


def test_on_the_command_line(relp, tmp_path):
    for name, method, seed in (("a", "relp", 0), ("b", "atp", 1)):
        done = relp("score", "ioi", "--nodes", "edges", "--pairs", 12, "--method", method, "--seed", seed, "-o", name)
        assert done.code == 0, done.err
    done = relp("circuit", "a", "--average", "b", "--stable-signs", 0.9, "--top-k", 15, "--connected", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["n_nodes"] == 15
    assert {"averaged_with": ["b"], "stable_signs": 0.9, "connected": True}.items() <= said["selection"].items()
    assert said["method"] == "rank average of relp, atp"
    err = done.err.replace("\n", " ")
    assert "scores have the same sign in at least 90% of 1000 bootstrap resamples" in err
    assert "connected: of " in err
    # The circuit is the run's own: it is evaluated, and equals what the library gives.
    assert relp("evaluate", "a", "--pairs", 6, "--random", 0).code == 0
    parts = [only_stable(Scores.load(tmp_path / name / "scores.safetensors"), 0.9)[0] for name in "ab"]
    want = relp_cli.select(relp_cli.rank_average(parts), top_k=15, connected=True)
    assert torch.equal(relp_cli.Circuit.load(tmp_path / "a/circuit.json").mask, want.mask)
    for more, why in (
        (["--top-p", 0.5], "--top-p is of the sizes of scores"),
        (["--top-k", 3, "--union"], "selects from means over pairs"),
        (["--top-k", 3, "--verify"], "needs --confirm"),
    ):
        refused = relp("circuit", "a", "--average", "b", *more)
        assert refused.code == 2
        assert why in refused.err.replace("\n", " ")
    assert "expected a share above 0.5" in relp("circuit", "a", "--stable-signs", 0.2, "--top-k", 3).err
