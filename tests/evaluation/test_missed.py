"""The bound on missed effects: what it must cover, what it must find, and Welch's formula against scipy."""

import numpy as np
import pytest
import torch
from oracles.wrapped import case, close, double_by_default, exact_float64, run
from scipy import stats

from relp_cli.errors import RelpError
from relp_cli.evaluation.missed import _welch, missed_effects

KINDS = ["attn_out", "mlp_out"]


def bound(c, verified, **options):
    with exact_float64(), double_by_default():
        return missed_effects(c.model, [c.batch], verified, **options)


def exact(c):
    return {kind: scores.mean for kind, scores in run(c, "act_patch", KINDS).items()}


def test_welch_equals_scipy():
    rng = torch.Generator().manual_seed(0)
    effects = torch.randn(60, generator=rng, dtype=torch.float64)
    member = (torch.rand(60, 5, generator=rng) < 0.3).double()
    difference, error, upper = _welch(effects, member, 0.95)
    for n in range(5):
        inside, outside = (effects[member[:, n] == v].numpy() for v in (1, 0))
        test = stats.ttest_ind(inside, outside, equal_var=False)
        assert difference[n].item() == pytest.approx(inside.mean() - outside.mean())
        assert (difference[n] / error[n]).item() == pytest.approx(test.statistic)
        high, low = (test.confidence_interval(0.9).high, test.confidence_interval(0.9).low)
        assert upper[n].item() == pytest.approx(max(abs(high), abs(low)))


def test_a_missed_node_is_found_and_the_bound_covers_it():
    """Everything is verified but three nodes, the strongest of which was 'missed': few subsets pin it down."""
    c = case("gpt2")
    effects = exact(c)
    verified = {kind: torch.ones_like(e, dtype=torch.bool) for kind, e in effects.items()}
    strongest = int(effects["mlp_out"].abs().argmax())
    index = tuple(int(i) for i in np.unravel_index(strongest, effects["mlp_out"].shape))
    verified["mlp_out"][index] = False
    for kind, e in effects.items():  # and the weakest that are not 0
        weakest = int(e.abs().masked_fill(e.abs() < 1e-6, 1e6).argmin())
        verified[kind][tuple(int(i) for i in np.unravel_index(weakest, e.shape))] = False
    got = bound(c, verified, subsets=400, share=0.05)
    assert got.worst == ("mlp_out", index)
    assert got.n_unverified == 3
    assert got.bound >= effects["mlp_out"][index].abs()
    close(got.difference["mlp_out"][index], effects["mlp_out"][index], 0.3)
    assert got.difference["mlp_out"].isnan().sum() == effects["mlp_out"].numel() - 2
    assert got.upper["mlp_out"].nan_to_num(0).max().item() == got.bound


def test_the_bound_tightens_with_subsets_and_is_zero_when_all_is_verified():
    c = case("gpt2")
    effects = exact(c)
    verified = {kind: e.abs() > e.abs().median() for kind, e in effects.items()}
    few, many = (bound(c, verified, subsets=n, share=0.1).bound for n in (100, 1600))
    assert many < few
    worst = max(e[~verified[kind]].abs().max().item() for kind, e in effects.items())
    assert many > worst * 0.5
    assert bound(c, {k: torch.ones_like(v) for k, v in verified.items()}).bound == 0


def test_bad_input_is_one_clear_line():
    c = case("gpt2")
    with pytest.raises(RelpError, match="shape"):
        bound(c, {"mlp_out": torch.zeros(3, 2, dtype=torch.bool)})
    nothing = {k: torch.zeros_like(e, dtype=torch.bool) for k, e in exact(c).items()}
    with pytest.raises(RelpError, match="more subsets"):
        bound(c, nothing, subsets=4)
    with pytest.raises(RelpError, match="share"):
        bound(c, nothing, share=1.5)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.8])
def test_coverage_is_nominal_where_effects_add_up_and_lower_where_they_saturate(share):
    rng = torch.Generator().manual_seed(1)
    covered = {"add up": 0, "saturate": 0}
    for _ in range(500):
        effects = 0.2 * torch.randn(40, generator=rng, dtype=torch.float64)
        effects[0] = 1.0
        member = (torch.rand(256, 40, generator=rng) < share).double()
        for name, of_sum in (("add up", torch.clone), ("saturate", torch.tanh)):
            _, _, upper = _welch(of_sum(member @ effects), member, 0.95)
            covered[name] += bool(upper.max() >= of_sum(effects).abs().max())
    assert covered["add up"] / 500 > 0.92  # 95 % less three standard errors
    low, high = {0.05: (0.77, 0.87), 0.1: (0.58, 0.72), 0.5: (0.3, 0.43), 0.8: (0.3, 0.43)}[share]
    assert low < covered["saturate"] / 500 < high  # what the module says of it


def test_the_company_is_said():
    c = case("gpt2")
    verified = {kind: torch.zeros_like(e, dtype=torch.bool) for kind, e in exact(c).items()}
    got = bound(c, verified, subsets=100, share=0.1)
    assert got.company == pytest.approx(0.1 * (sum(v.numel() for v in verified.values()) - 1))
