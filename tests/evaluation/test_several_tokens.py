"""Answers of several tokens in what is built on scores: tests, robustness, verification, chosen rules, edges of features."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import scores as S
from oracles.forward import forward
from oracles.make import exact_float64
from oracles.several import on_sides, sequences, summed
from oracles.wrapped import close

from relp_cli.errors import RelpError
from relp_cli.evaluation.circuit_tests import circuit_tests
from relp_cli.evaluation.diagnose import diagnose
from relp_cli.evaluation.hypotheses import hsic_p
from relp_cli.evaluation.mib import mib_values
from relp_cli.evaluation.missed import _subset_effects
from relp_cli.evaluation.verdicts import Levels
from relp_cli.evaluation.verify import exact_scores
from relp_cli.features.edges import feature_edges
from relp_cli.features.load import load_dictionaries
from relp_cli.methods.auto import exact_cells
from relp_cli.methods.request import Request
from relp_cli.models.load import load_model
from relp_cli.scoring import score
from relp_cli.selection import select
from relp_cli.statistics import resample_counts
from relp_cli.studies.robustness import Grid, _faithfulness
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.parts import parts_of

METRIC = "answer_logprob"
KINDS = ("mlp_out", "head")
META = {"metric": METRIC, "direction": "noising"}


def labels_of(batch):
    return (*batch.labels, "answer:1", "answer:2", "foil:1")


def circuit_of(c, batch, top_k):
    with exact_float64():
        return select(score(c.model, [batch], "atp", list(KINDS), METRIC, keep_examples=False), top_k=top_k)


@torch.no_grad()
def outcomes(c, batch, sides, circuit, keep, exclude):
    """L of every pair with what `keep` says of a node ablated (None: nothing) with its mean over the patch prompts."""
    total = torch.zeros(len(batch), dtype=torch.float64)
    for o, p, metric, labels in on_sides(batch, sides):
        source, patch = forward(c.weights, c.config, p), {}
        at = [circuit.labels.index(label) for label in labels]
        for kind, mask in circuit.masks.items() if keep is not None else ():
            for layer in range(exclude, len(mask)):
                kept = keep(mask[layer, at])[..., None]
                fill = source[kind][layer].mean(0, keepdim=True)
                patch[kind, layer] = lambda t, kept=kept, fill=fill: torch.where(kept, t, fill)
        total += metric(forward(c.weights, c.config, o, patch=patch).logits)
    return total.numpy()


def test_tests_of_a_circuit():
    c, batch, sides = sequences("gpt2")
    circuit = circuit_of(c, batch, 16)
    with exact_float64():
        tests, units = circuit_tests(
            c.model, [batch], circuit, Levels(references=2, units=2, permutations=40), exclude_layers=1, batch_size=3
        )
    model = outcomes(c, batch, sides, circuit, None, 1)
    own = outcomes(c, batch, sides, circuit, lambda m: m, 1)
    out = outcomes(c, batch, sides, circuit, lambda m: ~m, 1)
    rows = {row.test: row for row in tests.itertuples()}
    assert rows["equivalence"].statistic == (own > model).sum()
    assert rows["equivalence"].n == rows["equivalence"].n_pairs == len(batch)
    statistic, share, _ = hsic_p(model, out, 40, 0)
    assert rows["independence"].statistic == pytest.approx(statistic, abs=1e-9)
    assert rows["independence"].effect == pytest.approx(share, abs=1e-7)
    assert len(units) == 2
    for row in units.itertuples():
        masks = {kind: mask.clone() for kind, mask in circuit.masks.items()}
        place = (row.layer, circuit.labels.index(row.position), *(() if row.unit != row.unit else (int(row.unit),)))
        assert masks[row.kind][place[: masks[row.kind].ndim]]
        masks[row.kind][place[: masks[row.kind].ndim]] = False
        less = outcomes(c, batch, sides, SimpleNamespace(labels=circuit.labels, masks=masks), lambda m: m, 1)
        assert row.change == pytest.approx(np.abs(own - less).mean(), abs=1e-9)
    with pytest.raises(RelpError, match="resample"):
        circuit_tests(c.model, [batch], circuit, Levels(references=2), "resample")


def test_robustness_draws_pairs_and_not_their_two_runs():
    c, batch, sides = sequences("gpt2")
    circuits = [circuit_of(c, batch, k) for k in (10, 25)]
    grid = Grid(("atp",), ("mean",), "counts:10,25", resamples=1, seed=3)
    held = SimpleNamespace(model=c.model, pairs=[batch], metric=METRIC)
    with exact_float64():
        got = _faithfulness(held, circuits, "mean", grid, 1, None, None)
    (draw,) = resample_counts(len(batch), 1, 4)
    full, empty = (
        draw @ outcomes(c, batch, sides, circuits[0], keep, 1) for keep in (None, lambda m: torch.zeros_like(m))
    )
    want = [(draw @ outcomes(c, batch, sides, one, lambda m: m, 1) - empty) / (full - empty) for one in circuits]
    assert got == pytest.approx(want, abs=1e-9)


def test_single_effects_and_those_of_sets():
    """Verified nodes, cells of the automatic choice, and random sets, patched in both runs."""
    c, batch, sides = sequences("gemma2")
    labels, o_p = labels_of(batch), on_sides(batch, sides)

    def exact(_, sign):
        o, p, metric, _ = o_p[0 if sign > 0 else 1]
        return S.act_patch(c.weights, c.config, o, p, metric, KINDS)

    want = summed(exact, sides)
    rng = torch.Generator().manual_seed(0)
    masks = {kind: torch.rand(want[kind].shape[1:], generator=rng) < 0.3 for kind in KINDS}
    with exact_float64():
        got = exact_scores(c.model, [batch], masks, META, batch_size=3)
    order = [got.labels.index(label) for label in labels]
    asked = {kind: torch.zeros_like(m) for kind, m in masks.items()}
    for kind in KINDS:  # masks are on the axis of the scores
        asked[kind] = masks[kind][:, order]
        close(got[kind].mean[:, order], want[kind].mean(0) * asked[kind])
        assert got[kind].n.max() == len(batch)
    cells = {kind: want[kind].nonzero()[::7].numpy() for kind in KINDS}
    cells = {kind: np.pad(at, ((0, 0), (0, 4 - at.shape[1]))) for kind, at in cells.items()}
    like = {kind: SimpleNamespace(labels=labels) for kind in KINDS}
    with exact_float64():
        values, _ = exact_cells(c.model, [batch], cells, like, Request(METRIC))
    for kind in KINDS:
        of = want[kind] if want[kind].ndim == 4 else want[kind][..., None]
        close(torch.from_numpy(values[kind]), of[tuple(cells[kind].T)])
        assert {*cells[kind][:, 2]} >= {6, 8}, "cells of both runs' own positions"
    sets = {kind: torch.rand((2, *mask.shape), generator=rng) < 0.3 for kind, mask in masks.items()}
    with exact_float64():
        effects = _subset_effects(c.model, [batch], labels, sets, METRIC, "noising")
    for i, effect in enumerate(effects):
        total = 0.0
        for o, p, metric, own in o_p:
            source, patch, at = forward(c.weights, c.config, p), {}, [labels.index(label) for label in own]
            for kind, of in sets.items():
                for layer, chosen in enumerate(of[i][:, at][..., None]):
                    new = source[kind][layer]
                    patch[kind, layer] = lambda t, chosen=chosen, new=new: torch.where(chosen, new, t)
            with torch.no_grad():
                total += metric(forward(c.weights, c.config, o, patch=patch).logits).mean().item()
                total -= metric(forward(c.weights, c.config, o).logits).mean().item()
        assert effect.item() == pytest.approx(total, abs=1e-9)


def test_edges_of_features_are_summed_pair_by_pair():
    model = load_model("tiny-pythia")
    rng = torch.Generator().manual_seed(0)
    ids, answer, foil = (torch.randint(4, model.shape.vocab, (3, k), generator=rng) for k in (10, 3, 2))
    roles = ("a", "b", "c", "d", "e")
    batch = PairBatch(ids[:, :5], ids[:, 5:], answer[:, None], foil[:, None], roles)
    found = load_dictionaries("tiny-pythia", model)
    scores = score(model, [batch], "atp", ["feature"], METRIC, dictionary=found, keep_examples=False)
    circuit = select(scores, top_k=25)
    whole = feature_edges(model, [batch], circuit, "atp", dictionary=found, metric=METRIC)
    n = len(whole.nodes)
    single = torch.zeros(3, n, n + 1, dtype=torch.float64)
    for i in range(3):
        for part in parts_of([batch.rows(torch.tensor([i]))]):
            one = feature_edges(model, [part], circuit, "atp", dictionary=found, metric=METRIC)
            single[i][tuple(one.index.T)] += one.mean
    at = tuple(whole.index.T)
    assert (single.abs().sum(0) > 0).sum() == len(whole.index) > 20
    torch.testing.assert_close(whole.mean, single.mean(0)[at], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(whole.variance, single.var(0)[at], rtol=1e-4, atol=1e-9)


def test_what_reads_one_run_refuses():
    c, batch, _ = sequences("gpt2")
    with pytest.raises(RelpError, match="diagnose takes answers of single tokens"):
        diagnose(c.model, [batch], METRIC)
    scores = score(c.model, [batch], "atp", ["mlp_out"], METRIC, keep_examples=False)
    with pytest.raises(RelpError, match="MIB's metric"):
        mib_values(c.model, [batch], scores, METRIC)
