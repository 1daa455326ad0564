"""Runs that start in the middle, at the changed block and position, against whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from oracles.make import exact_float64
from oracles.wrapped import case, close, double_by_default, hook_count, pairs
from torch import Tensor

import relp_cli
from relp_cli.methods.patching import patch_nodes
from relp_cli.methods.request import Request
from relp_cli.methods.setup import Passes
from relp_cli.models import resume
from relp_cli.models.catalog import embedded_names
from relp_cli.models.model import Model
from relp_cli.models.resume import WAYS, WHOLE, Rows, Way, record, way_of
from relp_cli.nodes.access import activations, units
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.scoring import score
from relp_cli.spaces.scores import Scores

ROLES = ("a", "b", "a", "c", "b", "d")


@contextmanager
def by(model: Model, way: Way | None) -> Iterator[None]:
    """Patched runs of the model take this way; None: the one that is found."""
    before = resume._found.pop(model, {})
    if way is not None:
        resume._found[model] = dict.fromkeys(range(100), way)
    try:
        yield
    finally:
        resume._found[model] = before


def effects(
    model: Model, batch: relp_cli.PairBatch, request: Request, cells: dict[str, Tensor], size: int
) -> list[Tensor]:
    """Of some (layer, pair, slot, unit) cells of each kind."""
    kinds = tuple(NODE_KINDS[kind] for kind in cells)
    means = None
    if request.baseline == "mean":
        means = {k: [v.mean(0) for v in at] for k, at in activations(model, batch.original, kinds).items()}
    setup = request.setup(model, batch, kinds, Passes(), means)
    wanted = {(kind, layer): mask for kind, of in cells.items() for layer, mask in enumerate(of)}
    return list(patch_nodes(setup, setup.source_activations(), wanted, size).values())


@pytest.mark.parametrize("name", embedded_names())
def test_embedded_models_in_every_way(name: str) -> None:
    """A sample of all kinds, directions and baselines: every cell is the same as by a whole run to 1e-9."""
    rng = torch.Generator().manual_seed(0)
    with exact_float64(), double_by_default():
        model = relp_cli.load_model(name, dtype="float64")
        batch = max(relp_cli.load_task("ioi").pairs(model, n=8), key=len).rows(slice(0, 2))
        shape = (model.shape.n_layers, len(batch), len(set(batch.labels)))
        cells = {}
        for kind_name, kind in NODE_KINDS.items():
            drawn = torch.rand(*shape, units(model, kind), generator=rng)
            cells[kind_name] = drawn < 5 / drawn.numel()
        for direction, baseline in (
            ("noising", "patch"),
            ("denoising", "patch"),
            ("noising", "zero"),
            ("noising", "mean"),
        ):
            request = Request("logit_diff", direction, baseline)
            with by(model, WHOLE):
                want = effects(model, batch, request, cells, 10**6)
            assert sum(w.count_nonzero() for w in want) > 10
            with by(model, None):
                got = effects(model, batch, request, cells, 200)
                assert way_of(model, batch.original) == Way()
            for one, other in zip(got, want, strict=True):
                close(one, other)


@pytest.mark.parametrize("roles", [None, ROLES], ids=["positions", "roles"])
@pytest.mark.parametrize("shape", ["gpt2", "pythia", "gemma2"])
def test_every_way_gives_the_same_numbers(shape: str, roles: tuple[str, ...] | None) -> None:
    c, batch, kinds = case(shape), pairs(2, roles=roles), ("resid_pre", "attn_out", "head", "value")

    def exact(way: Way | None) -> Scores:
        with by(c.model, way):
            return score(c.model, [batch], "act_patch", kinds, keep_examples=True, chunk_tokens=90)

    with exact_float64(), double_by_default():
        want = exact(WHOLE)
        assert want.meta["patched_share_computed"] == 1
        for way in (*WAYS[:-1], None):
            got = exact(way)
            for kind in kinds:
                close(got[kind].examples, want[kind].examples)
            assert got.meta["forwards_per_pair"] == want.meta["forwards_per_pair"]
            assert got.meta["patched_share_computed"] < (0.5 if way is None or way.positions else 0.8)


def test_what_a_patch_cannot_change_is_not_run() -> None:
    """No pass for what is the same in both prompts, and for what the metric does not read."""
    c, layers, last = case("qwen2"), 3, 5
    with exact_float64(), double_by_default():
        same = relp_cli.PairBatch(c.batch.original, c.batch.original, c.batch.answer, c.batch.foil)
        assert score(c.model, [same], "act_patch", ["resid_pre", "head"]).meta["forwards_per_pair"] == 2
        late = relp_cli.PairBatch(c.batch.original, c.batch.original.clone(), c.batch.answer, c.batch.foil)
        assert late.patch is not None
        late.patch[:, last - 1] = (late.patch[:, last - 1] + 1) % 50
        for kind, n in (
            ("resid_pre", 1 + 2 * 2),
            ("mlp_out", 2 * 2 + 1),
            ("value", 2 * (1 + 2 * 2)),
            ("query", 4 * (1 + 2 + 1)),
        ):
            got = score(c.model, [late], "act_patch", [kind], keep_examples=True)
            assert got.meta["forwards_per_pair"] == 2 + n, kind
            assert (got[kind].examples != 0).flatten(1).sum(1).eq(n).all() or kind == "query"
            assert got.meta["patched_share_computed"] <= 1 / 3 * (layers + 1) / 2 / layers * 2


def test_a_way_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("gpt2", layers=2)
    with exact_float64(), double_by_default():
        want = score(c.model, [c.batch], "act_patch", ["resid_pre"])
        with by(c.model, None):
            assert way_of(c.model, c.batch.original) == Way()
        for broken, left in (
            ({"update": lambda _self, k, v, *_, **__: (torch.zeros_like(k), v)}, False),
            ({"update": lambda *_, **__: 1 / 0}, False),
        ):
            with by(c.model, None), monkeypatch.context() as patched:
                for name, value in broken.items():
                    patched.setattr(resume._Earlier, name, value)
                assert way_of(c.model, c.batch.original).positions is left
                close(score(c.model, [c.batch], "act_patch", ["resid_pre"])["resid_pre"].mean, want["resid_pre"].mean)
        with by(c.model, None), monkeypatch.context() as patched:
            patched.setattr(resume, "_passed_over", lambda *_: 1 / 0)
            assert way_of(c.model, c.batch.original) == WHOLE
            close(score(c.model, [c.batch], "act_patch", ["resid_pre"])["resid_pre"].mean, want["resid_pre"].mean)


def test_nothing_is_left_in_the_model() -> None:
    c = case("gpt2", layers=2)
    with exact_float64(), double_by_default(), torch.no_grad():
        before, count = c.model.logits(c.batch.original), hook_count(c.model)
        trace, _ = record(c.model, c.batch.original, Way())
        boom = Rows([("blocks.1.hook_in", lambda _: 1 / 0)], torch.arange(2))  # type: ignore[arg-type, return-value]
        with pytest.raises(ZeroDivisionError):
            trace.logits([boom], 3)
        assert torch.equal(c.model.logits(c.batch.original), before)
        assert hook_count(c.model) == count
    with pytest.raises(ValueError, match=r"embed\.hook_out is neither in a block nor behind them"):
        trace.logits([Rows([("embed.hook_out", lambda v: v)], torch.arange(2))])


def test_before_the_first_changed_token_effects_are_zero_to_the_last_bit() -> None:
    """Two passes may round differently, in float32: that is no effect, and costs no run."""
    model = relp_cli.load_model("tiny-gpt2")
    batches = relp_cli.load_task("sva_across_pp").pairs(model, n=24, seed=0)
    scores = score(model, batches, "act_patch", ["resid_pre", "mlp_neuron"])
    (batch,) = batches
    assert batch.patch is not None
    first = int((batch.original != batch.patch).any(0).nonzero()[0])
    assert first >= 1
    for kind in ("resid_pre", "mlp_neuron"):
        assert scores[kind].mean[:, :first].abs().max() == 0
        assert scores[kind].mean[:, first].abs().max() > 0.01
