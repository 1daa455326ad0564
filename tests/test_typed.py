"""That tests check the shapes which annotations name: else a wrong one would say nothing."""

import pytest
import torch
from jaxtyping import TypeCheckError

from relp_cli.spaces.scores import KindScores
from relp_cli.tasks.metrics import METRICS


def test_an_array_of_another_rank_is_refused():
    mean, n = torch.zeros(2, 3), torch.ones(3, dtype=torch.long)
    KindScores("mlp_out", mean, mean, n, ("a", "b", "c"), "position")
    with pytest.raises(TypeCheckError):
        KindScores("mlp_out", mean, mean, n[None], ("a", "b", "c"), "position")


def test_axes_of_one_name_must_be_of_one_size():
    mean = torch.zeros(2, 3)
    with pytest.raises(TypeCheckError):
        KindScores("mlp_out", mean, mean, torch.ones(4, dtype=torch.long), ("a", "b", "c"), "position")


def test_functions_are_checked():
    ids = torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeCheckError):
        METRICS["logit_diff"].fn(torch.zeros(5), ids, ids)
