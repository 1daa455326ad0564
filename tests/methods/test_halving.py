"""Memory that runs out: batches are halved, and the numbers are those of whole batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles.wrapped import case, pairs

import relp_cli as relp
from relp_cli.errors import RunFailed
from relp_cli.methods.room import Room
from relp_cli.models.model import Model
from relp_cli.tasks.pairs import PairBatch

RAISED = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."
    ),
    MemoryError(),
)


def limited(monkeypatch, most: int, error: Exception) -> list[int]:
    """A model whose passes fail with more than `most` prompts; returns the sizes that were tried."""
    whole, tried = Model.logits, []

    def logits(self, tokens, *args, **kwargs):
        tried.append(len(tokens))
        if len(tokens) > most:
            raise error
        return whole(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Model, "logits", logits)
    return tried


@pytest.fixture
def batch() -> PairBatch:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (2, 11, 6), generator=draw)
    return PairBatch(
        ids[0], ids[1], torch.randint(0, 40, (11,), generator=draw), torch.randint(0, 40, (11,), generator=draw)
    )


@pytest.mark.parametrize(
    ("method", "nodes", "error"),
    [
        ("relp", ["resid_pre", "mlp_neuron"], RAISED[0]),
        ("ig_inputs", ["edges"], RAISED[1]),
        ("act_patch", ["mlp_out", "head"], RAISED[2]),
    ],
)
def test_halves_give_the_numbers_of_the_whole(monkeypatch, batch, method, nodes, error):
    model = case("gpt2").model
    options = {"chunk_tokens": 6} if method == "ig_inputs" else {}
    want = relp.score(model, [batch], method, nodes, keep_examples=True, **options)
    tried = limited(monkeypatch, 3, error)
    got = relp.score(model, [batch], method, nodes, keep_examples=True, **options)
    assert max(tried) == 11
    assert got.meta["out_of_memory_pairs_per_pass"] == 3
    assert "out_of_memory_pairs_per_pass" not in want.meta
    torch.testing.assert_close(got.examples, want.examples, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-9, atol=1e-12)
    for key in ("forwards_per_pair", "backwards_per_pair", "mean_metric"):
        assert got.meta[key] == pytest.approx(want.meta[key], abs=2e-3)


def test_one_pair_that_does_not_fit_is_one_clear_line(monkeypatch, batch):
    limited(monkeypatch, 0, RAISED[0])
    with pytest.raises(RunFailed, match="out of memory with one pair of 6 tokens"):
        relp.score(case("gpt2").model, [replace(batch)], "atp")


def test_methods_of_all_pairs_at_once_say_so(monkeypatch, batch):
    limited(monkeypatch, 3, RAISED[1])
    with pytest.raises(RunFailed, match="'screened' needs all pairs at once"):
        relp.score(case("gpt2").model, [batch], "screened")


def test_other_errors_are_not_taken_for_it(monkeypatch, batch):
    limited(monkeypatch, 3, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        relp.score(case("gpt2").model, [batch], "atp")


def test_a_batch_size_that_was_asked_for_is_kept() -> None:
    """The default is cut to the tokens that memory is worth; another number of pairs is the user's."""
    batch = pairs(40, 16)
    for asked, sizes in ((32, [12, 12, 12, 4]), (40, [40]), (30, [30, 10]), (8, [8] * 5)):
        chunks = Room.on(torch.device("cpu"), pairs=asked, small=True).batches([batch], "cpu")
        assert [len(chunk) for chunk in chunks] == sizes
