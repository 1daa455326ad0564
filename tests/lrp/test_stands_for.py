"""A rule's surrogate is compared with the value it replaces: a wrong one would change gradients, and no value would show it."""

from dataclasses import replace

import pytest
import torch
from oracles.plain import ROWS, build
from oracles.wrapped import Case, exact_float64, pairs, run

from relp_cli.errors import RelpError
from relp_cli.lrp.context import lrp
from relp_cli.models.load import wrap


def case_of(name):
    with exact_float64():
        return Case(wrap(build(ROWS[name]), None, name), {}, None, pairs(2, 5), lambda _: None)


@pytest.mark.parametrize("rule", ["ah", "attn2"])
def test_values_that_are_clipped_before_they_are_attended_to(rule):
    """Where nothing is clipped any more the value's gradient is 0; a model that clips unbeknownst is refused."""
    c = case_of("olmo-clip")
    clip = c.model.shape.clip_qkv
    scores = run(c, "relp", ["value"], rules=[rule])["value"]
    assert scores.mean.abs().max() > 1e-6
    with torch.no_grad(), c.model.hooks({"blocks.0.attn.v.hook_out": lambda v: v - v.detach() + 2 * clip}):
        beyond = run(c, "relp", ["value"], rules=[rule])["value"]
    assert torch.equal(beyond.mean[0], torch.zeros_like(beyond.mean[0]))
    unaware = replace(c, model=replace(c.model, shape=replace(c.model.shape, clip_qkv=None)))
    with pytest.raises(RelpError, match=rf"olmo-clip .*blocks\.0\.attn does not compute what rule {rule} replaces"):
        run(unaware, "relp", ["resid_pre"], rules=[rule])


def test_a_norm_that_is_not_what_its_rule_says(monkeypatch):
    monkeypatch.setattr("relp_cli.lrp.sites.weighted", lambda _, x: x)
    for rule in ("ln", "ln2"):
        with pytest.raises(RelpError, match=rf"blocks\.0\.ln1 does not compute what rule {rule} replaces"):
            run(case_of("llama"), "relp", ["resid_pre"], rules=[rule])


def test_it_is_compared_once(monkeypatch):
    c = case_of("gpt2")
    rules = ["ln", "identity", "ah"]
    run(c, "relp", ["resid_pre"], rules=rules)
    monkeypatch.setattr("relp_cli.lrp.context.TOLERANCE", {})  # looked up only where two values are compared
    run(c, "relp", ["resid_pre"], rules=rules)


def test_a_pattern_of_the_pass_before_is_not_read():
    """GPT-J calls hook_pattern after attention's output: in a second pass it would stand there, one pass too old."""
    c = case_of("gptj")
    with exact_float64(), lrp(c.model, ["ah"]):
        with torch.no_grad():
            c.model.logits(c.batch.original)  # without gradients nothing is replaced
        with torch.enable_grad(), pytest.raises(RelpError, match="never calls"):
            c.model.logits(c.batch.original)
