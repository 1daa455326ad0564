"""Metric values against sums written out by hand, in float64."""

import math

import pytest
import torch
from pydantic import ValidationError

from relp_cli.errors import RelpError
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.spec import TaskSpec

LOGITS = torch.tensor(
    [[math.log(1), math.log(2), math.log(3), math.log(4)], [1.0, 0.0, -1.0, 5.0]], dtype=torch.float64
)
ANSWER, FOIL = torch.tensor([[3], [1]]), torch.tensor([[0], [0]])


def test_logit_diff_is_per_example():
    found = METRICS["logit_diff"].fn(LOGITS, ANSWER, FOIL)
    torch.testing.assert_close(found, torch.tensor([math.log(4), -1.0], dtype=torch.float64))


def test_logit_diff_without_a_foil_is_the_answers_logit():
    found = METRICS["logit_diff"].fn(LOGITS, ANSWER, torch.full((2, 1), -1))
    torch.testing.assert_close(found, torch.tensor([math.log(4), 0.0], dtype=torch.float64))


def test_logit_diff_refuses_sets():
    with pytest.raises(RelpError, match="prob_diff"):
        METRICS["logit_diff"].fn(LOGITS, torch.tensor([[2, 3], [1, -1]]), FOIL)


def test_prob_diff_over_sets_ignores_the_fill():
    found = METRICS["prob_diff"].fn(LOGITS[:1], torch.tensor([[1, 3, -1]]), torch.tensor([[2, -1, -1]]))
    torch.testing.assert_close(found, torch.tensor([(2 + 4 - 3) / 10], dtype=torch.float64))


def test_kl_sums_over_the_vocabulary_and_is_zero_on_itself():
    p, q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    found = METRICS["kl"].fn(q.log()[None] + 7, ANSWER[:1], FOIL[:1], reference=p.log()[None] - 2)
    by_hand = -(0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5))
    torch.testing.assert_close(found, torch.tensor([by_hand], dtype=torch.float64))
    assert METRICS["kl"].fn(LOGITS, ANSWER, FOIL, reference=LOGITS).abs().max() == 0


def test_kl_has_no_gradient_at_the_original():
    run = LOGITS.clone().requires_grad_()
    METRICS["kl"].fn(run, ANSWER, FOIL, reference=LOGITS).sum().backward()
    assert run.grad is not None
    assert run.grad.abs().max() < 1e-15
    assert METRICS["kl"].zero_grad_at_original


def test_kl_needs_a_reference():
    with pytest.raises(RelpError, match="reference"):
        METRICS["kl"].fn(LOGITS, ANSWER, FOIL)


def test_accuracy_with_foil_without_foil_and_over_sets():
    accuracy = METRICS["accuracy"].fn
    assert accuracy(LOGITS, ANSWER, FOIL).tolist() == [1.0, 0.0]
    assert accuracy(LOGITS, ANSWER, torch.full((2, 1), -1)).tolist() == [1.0, 0.0]
    # Neither 1 nor 2 alone has more than 3, together they have: 2 + 3 > 4.
    assert accuracy(LOGITS[:1], torch.tensor([[1, 2]]), torch.tensor([[3, -1]])).tolist() == [1.0]


def test_accuracy_survives_probabilities_that_underflow():
    logits = torch.tensor([[0.0, -1000.0, -1001.0]], dtype=torch.float64)
    assert METRICS["accuracy"].fn(logits, torch.tensor([[1]]), torch.tensor([[2]])).tolist() == [1.0]


def test_the_yaml_knows_exactly_the_metrics_of_the_table():
    for name in METRICS:
        assert TaskSpec(name="a", metric=name, pairs="a.jsonl").metric == name
    with pytest.raises(ValidationError, match="did you mean 'prob_diff'"):
        TaskSpec(name="a", metric="probdiff", pairs="a.jsonl")
