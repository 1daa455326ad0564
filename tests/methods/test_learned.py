"""Learned rankings: the masks and their gradients, the masked run, what is found on circuits that are known, and resuming."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.cells import dictionaries
from oracles import forward
from oracles.make import exact_float64
from oracles.wrapped import Case, case, close, double_by_default, pairs, run
from torch import Tensor

from relp_cli.edges.stack import Stack
from relp_cli.errors import RelpError
from relp_cli.evaluation.evaluate import evaluate
from relp_cli.methods import unfinished
from relp_cli.methods.learned import (
    HardConcreteParams,
    LearnedParams,
    draw_size,
    gates,
    hard_concrete,
    learned,
    open_share,
    sized_mask,
)
from relp_cli.methods.nodes import NodeBatch
from relp_cli.methods.request import Request
from relp_cli.methods.setup import Passes
from relp_cli.methods.space import Batch
from relp_cli.methods.table import METHODS
from relp_cli.methods.unfinished import Unfinished
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import space_for
from relp_cli.spaces.units import Block, Units
from relp_cli.tasks.metrics import METRICS

DOUBLE = torch.float64


def random(n: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize(("n", "scale", "temperature"), [(7, 1, 0.5), (500, 20, 0.5), (40, 100, 0.01), (5, 0, 0.5)])
def test_a_mask_has_its_size(n: int, scale: float, temperature: float) -> None:
    s = random(n, scale)
    for k in sorted({1, 2, n // 2, n - 1}):
        m = sized_mask(s, k, temperature)
        assert m.sum().item() == pytest.approx(k, abs=1e-9)
        assert (m[s.argsort()].diff() >= 0).all()
    assert (sized_mask(s, n, temperature) == 1).all()


@pytest.mark.parametrize("k", [1, 3, 8, 10])
def test_the_gradient_of_a_mask_is_that_of_its_threshold_too(k: int) -> None:
    """Against finite differences, and in closed form: m′(v − Σm′v/Σm′) for a gradient v at the mask."""
    s, v = random(11).requires_grad_(), random(11, seed=1)
    assert torch.autograd.gradcheck(lambda x: sized_mask(x, k, 0.5), (s,), eps=1e-6, atol=1e-8)
    m = sized_mask(s, k, 0.5)
    (got,) = torch.autograd.grad(m, s, v)
    slope = m.detach() * (1 - m.detach()) / 0.5
    close(got, slope * (v - (slope * v).sum() / slope.sum()))
    assert abs(got.sum().item()) < 1e-12  # adding a number to all scores changes nothing


def test_sizes_are_drawn_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    for sizes, below in (("uniform", 9 / 999), ("log", math.log(10) / math.log(1000))):
        drawn = torch.tensor([draw_size(1000, sizes, generator) for _ in range(4000)])
        assert (drawn.min() >= 1) & (drawn.max() <= 999)
        assert (drawn < 10).double().mean().item() == pytest.approx(below, abs=0.025)
    assert draw_size(1, "uniform", generator) == 1
    assert {draw_size(2, "log", generator) for _ in range(20)} == {1}


def test_hard_concrete_gates() -> None:
    """Their gradient, and P(z > 0) and P(z = 1) as shares of a fine grid of noise (Louizos et al., eq. 12)."""
    log_alpha = torch.linspace(-3, 3, 7, dtype=DOUBLE)
    grid = (torch.arange(20000, dtype=DOUBLE) + 0.5) / 20000
    z = torch.stack([gates(one.expand(20000), grid) for one in log_alpha])
    close(open_share(log_alpha), (z > 0).double().mean(1), 1e-4)
    close(torch.sigmoid(log_alpha - 2 / 3 * math.log(11)), (z == 1).double().mean(1), 1e-4)
    u = torch.full((7,), 0.4, dtype=DOUBLE)
    inside = (gates(log_alpha, u) > 0) & (gates(log_alpha, u) < 1)
    assert 2 <= inside.sum() < 7
    assert torch.autograd.gradcheck(lambda x: gates(x, u), (log_alpha.requires_grad_(),), eps=1e-7, atol=1e-7)


SPACES_AND_KINDS = [
    ("gpt2", ["head", "mlp_out"], {}),
    ("gemma2", ["resid_pre", "attn_out", "mlp_neuron"], {}),
    ("qwen2", ["head", "value", "mlp_neuron"], {}),
    ("gpt2", ["edges"], {}),
    ("pythia", ["edges"], {"positions": "keep"}),
    ("gemma2", ["edges"], {"positions": "keep"}),
    ("qwen2", ["edges"], {}),
    ("pythia", ["feature"], {"dictionary": "pythia"}),
    ("gpt2", ["feature"], {"dictionary": "gpt2"}),
]


def loaded(options: dict[str, Any]) -> dict[str, Any]:
    """With the random dictionaries of a family in place of its name."""
    return {name: dictionaries(value) if name == "dictionary" else value for name, value in options.items()}


def on_batch(c: Case, kinds: list[str], batch: Any = None, request: Request | None = None, **options: Any) -> Batch:
    batch, request = c.batch if batch is None else batch, request or Request()
    row = space_for(kinds)
    scorer = row.load_scorer()(c.model, [batch], kinds, request, {name: options.get(name) for name in row.options})
    scorer.prepare([batch], Passes())
    made: Batch = scorer.batch(batch, Passes(), None, None)
    return made


@pytest.mark.parametrize(("shape", "kinds", "options"), SPACES_AND_KINDS)
def test_a_hard_mask_is_an_evaluation_of_the_circuit(shape: str, kinds: list[str], options: dict[str, Any]) -> None:
    """And so is a soft one as T → 0; with all or nothing kept it is the run, and the run with all patched."""
    c, options = case(shape), loaded(options)
    with exact_float64(), double_by_default():
        on = on_batch(c, kinds, **options)
        changed = on.changed()
        n, k = int(changed.sum()), 12
        s = random(n, seed=3)
        kept = changed.new_zeros(changed.shape).masked_scatter(changed, s > s.sort(descending=True).values[k])
        circuit = Circuit(on.units, kept, c.batch.labels if len(kept) > 1 else ("*",), {})
        row = evaluate(
            c.model, [c.batch], circuit, "counterfactual", 0, "logit_diff", bootstrap=0,
            dictionary=options.get("dictionary"),
        ).iloc[0]  # fmt: skip
        soft = torch.zeros(changed.shape, dtype=DOUBLE).masked_scatter(changed, sized_mask(s, k, 1e-5))
        for mask in (kept.double(), soft):
            assert on.masked(mask).mean().item() == pytest.approx(row.F_C, abs=1e-9)
        assert on.masked(1 - kept.double()).mean().item() == pytest.approx(row.F_complement, abs=1e-9)
        assert on.masked(changed.double()).mean().item() == pytest.approx(row.F_M, abs=1e-9)
        assert on.masked(torch.zeros(changed.shape)).mean().item() == pytest.approx(row.F_empty, abs=1e-9)
        assert abs(row.F_C - row.F_M) > 1e-3


@pytest.mark.parametrize(("shape", "kinds", "options"), SPACES_AND_KINDS)
def test_the_gradient_of_a_masked_run(shape: str, kinds: list[str], options: dict[str, Any]) -> None:
    """Along random directions against central differences: nothing on the way is held constant."""
    c, options = case(shape), loaded(options)
    with exact_float64(), double_by_default():
        on = on_batch(c, kinds, **options)
        shape_ = on.changed().shape
        rng = torch.Generator().manual_seed(5)
        keep = torch.rand(shape_, generator=rng, dtype=DOUBLE).requires_grad_()
        (gradient,) = torch.autograd.grad(on.masked(keep).sum(), keep)
        for _ in range(3):
            way, h = torch.randn(shape_, generator=rng, dtype=DOUBLE), 1e-6
            with torch.no_grad():
                up, down = (on.masked(keep + sign * h * way).sum() for sign in (1, -1))
            assert ((up - down) / (2 * h)).item() == pytest.approx((gradient * way).sum().item(), rel=1e-6, abs=1e-7)
    assert gradient.abs().max() > 1e-4


def test_the_graph_of_a_masked_run_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A circle through autograd's nodes, which the collector does not see, would keep the differences of every step."""
    made: list[weakref.ref[Stack]] = []

    class Seen(Stack):
        def __init__(self, rows: Tensor) -> None:
            super().__init__(rows)
            made.append(weakref.ref(self))

    monkeypatch.setattr("relp_cli.edges.run.Stack", Seen)
    on = on_batch(case("gemma2"), ["edges"])
    for _ in range(2):
        on.masked(torch.full((1, len(on.units)), 0.5).requires_grad_()).sum().backward()
    gc.collect()
    assert [one() for one in made] == [None, None]


def test_a_masked_run_is_what_plain_torch_makes_of_it() -> None:
    """Heads and MLPs of a pre-norm model, mixed by hand in a forward pass without modules."""
    c = case("qwen2")
    weights, config, original, patch = c.prompts
    source = forward.forward(weights, config, patch)
    on = on_batch(c, ["head", "mlp_out"])
    keep = torch.rand(6, len(on.units), generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    masks = {kind: on.units.view(kind, keep) for kind in ("head", "mlp_out")}  # [layer, pos, unit]

    def mix(kind: str, layer: int) -> Any:
        m = masks[kind][layer] if kind == "mlp_out" else masks[kind][layer][..., None]
        return lambda value: m * value + (1 - m) * source[kind][layer]

    layers = range(config.num_hidden_layers)
    mixed = forward.forward(weights, config, original, patch={(k, n): mix(k, n) for k in masks for n in layers})
    with exact_float64():
        close(on.masked(keep), c.metric(mixed.logits))


class Micro(NodeBatch):
    """A model of `n` units whose L is a function of what is kept."""

    def __init__(self, n: int, metric: Any, setup: Any) -> None:
        super().__init__(setup)
        self.n, self.metric = n, metric

    @property
    def labels(self) -> tuple[str, ...]:
        return ("*",)

    @property
    def units(self) -> Units:  # type: ignore[override]
        return Units("nodes", (Block("mlp_out", 0, self.n),))

    def changed(self) -> Tensor:
        return torch.arange(self.n)[None] != 3  # one unit is the same in both runs

    def masked(self, keep: Tensor) -> Tensor:
        assert keep[0, 3] == (0 if self.setup.direction == "noising" else 1) or (keep == 1).all()
        value: Tensor = self.metric(keep[0] if self.setup.direction == "noising" else 1 - keep[0])
        return value.expand(2)

    def of_units(self, values: Tensor) -> Mapping[str, Tensor]:
        return {"all": values}


def micro(metric: Any, n: int = 6, direction: str = "noising") -> list[Micro]:
    c = case("gpt2")
    return [Micro(n, metric, Request(direction=direction).setup(c.model, c.batch, (), Passes()))]


def redundant(m: Tensor) -> Tensor:
    """Unit 0 does what unit 1 does, and better; 2 comes next, 4 and 5 are of no use and harm."""
    return 5 * (1 - (1 - m[0]) * (1 - 0.9 * m[1])) + m[2] - m[5]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("sizes", ["uniform", "log"])
def test_a_ranking_that_is_known_is_found(direction: str, sizes: str) -> None:
    """Of the redundant two one is first: of single patches neither has an effect that is large."""
    (result,) = learned(micro(redundant, direction=direction), LearnedParams(steps=300, sizes=sizes))
    scores = result.scores["all"][0]
    order = scores.argsort(descending=True).tolist()
    assert order[0] == 0
    assert order[-1] == 3
    assert scores[3] == 0
    assert scores[5] == 1  # the lowest that has a parameter
    assert order.index(2) < order.index(4)
    single = torch.tensor([redundant(torch.ones(6)) - redundant(1.0 * (torch.arange(6) != u)) for u in range(6)])
    assert single.argmax() == 2  # what patching one at a time says
    about = result.meta["learned"]
    assert (about["cells"], about["of"], about["steps"]) == (5, 6, 300)
    assert about["metric_last_tenth"] > about["metric_first_tenth"]


def test_pruning_keeps_what_matters_at_the_size_that_was_asked() -> None:
    def sum_of(m: Tensor) -> Tensor:
        return (m * torch.arange(20, 0, -1).sqrt()).sum()

    (result,) = hard_concrete(micro(sum_of, 20), HardConcreteParams(steps=600, size=0.3, start=None))
    about, scores = result.meta["learned"], result.scores["all"][0]
    assert about["expected_share"] == pytest.approx(0.3, abs=0.06)
    assert about["open"] == int((scores > about["threshold"]).sum())
    top = scores.argsort(descending=True)[:4].tolist()
    assert set(top) <= {0, 1, 2, 4, 5, 6, 7}


def test_scores_are_of_cells_that_change_and_of_the_seed() -> None:
    c = case("gpt2")
    batches = [pairs(3, 4, roles=("a", "b", "c", "end")), pairs(2, 5, seed=2, roles=("a", "b", "b2", "c", "end"))]
    first, again, other = (
        run(c, "learned", ["head", "mlp_out"], batches, steps=4, seed=seed, batch_size=2) for seed in (0, 0, 1)
    )
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, other.mean)
    assert not first.meta["signed"]
    for kind in ("head", "mlp_out"):
        zero = first[kind].mean == 0
        assert zero[:, 0].all()  # the first token is the same
        assert not zero[:, 1:].any()
    assert first.mean[first.mean > 0].min() == 1
    assert (first.variance[first.mean > 0].nan_to_num(0) < 1e-12).all()
    assert first.labels == ("a", "b", "b2", "c", "end")
    # 2 forward passes of each of 3 batches, 4 steps of one
    assert (first.meta["forwards_per_pair"], first.meta["backwards_per_pair"]) == (round(2 + 4 / 3, 3), round(4 / 3, 3))


def test_tied_positions_have_one_score() -> None:
    c = case("gpt2")
    batches = [pairs(3, 4, roles=("a", "b", "c", "end")), pairs(2, 5, seed=2, roles=("a", "b", "b2", "c", "end"))]
    got = run(c, "learned", ["head", "mlp_out"], batches, steps=3, tied=True)
    assert got.meta["learned"]["cells"] == 3 * (4 + 1)
    for kind in ("head", "mlp_out"):
        assert torch.equal(got[kind].mean, got[kind].mean[:, :1].expand_as(got[kind].mean))
    assert len(got.mean.unique()) == 15
    edges = [run(c, "learned", ["edges"], steps=3, tied=tied).mean for tied in (False, True)]
    assert torch.equal(*edges)  # which have no positions


@pytest.mark.parametrize("method", ["learned", "hard_concrete"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case("gpt2")
    whole = run(c, method, ["head"], steps=6)
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    monkeypatch.setattr(unfinished, "REST", 0.0)
    kept = Unfinished(tmp_path, "x")

    def stop(done: int, total: int, what: str) -> None:
        assert (total, what) == (6, "learning steps")
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(c, method, ["head"], steps=6, unfinished=kept, progress=stop)
    done: list[int] = []
    resumed = run(c, method, ["head"], steps=6, unfinished=kept, progress=lambda *at: done.append(at[0]))
    assert done[0] == 4  # three steps were kept
    assert torch.equal(resumed.mean, whole.mean)
    assert resumed.meta["learned"] == whole.meta["learned"]
    costs = ("forwards_per_pair", "backwards_per_pair")
    assert [resumed.meta[k] for k in costs] == [whole.meta[k] for k in costs]


def test_a_start_is_the_order_of_other_scores(tmp_path: Path) -> None:
    c = case("gpt2")
    exact = run(c, "act_patch", ["head", "mlp_out"])
    exact.save(tmp_path / "scores.safetensors")
    got = run(c, "learned", ["head"], steps=1, lr=1e-9, start=str(tmp_path))
    alive = got["head"].mean > 0
    support = -exact["head"].mean[alive]  # noising: what supports L is negative
    assert torch.equal(got["head"].mean[alive].argsort(), support.argsort())
    assert got["head"].mean[alive].max().item() == pytest.approx(1 + 2 * (1 - 1 / int(alive.sum())), abs=1e-6)
    for start, says in ((tmp_path / "none", "expected a run directory or a score file"), (tmp_path, "query")):
        with pytest.raises(RelpError, match=says):
            run(c, "learned", ["query" if start == tmp_path else "head"], steps=1, start=str(start))
    with pytest.raises(RelpError, match="do not have the same units"):
        run(case("gpt2", layers=2), "learned", ["head"], steps=1, start=str(tmp_path))


def test_what_cannot_be_learned_is_one_line() -> None:
    c = case("gpt2")
    with pytest.raises(RelpError, match="metric 'accuracy' has no gradient"):
        run(c, "learned", ["head"], metric="accuracy")
    same = pairs()
    with pytest.raises(RelpError, match="the source changes none of these units"):
        run(c, "learned", ["head"], [type(same)(same.original, same.original, same.answer, same.foil)])
    with pytest.raises(RelpError, match="'learned', parameter 'sizes'"):
        run(c, "learned", ["head"], sizes="all")
    assert "kl" in METRICS
    run(c, "hard_concrete", ["mlp_out"], steps=2, metric="kl")  # whose gradient is 0 at the run, but not at masked ones


def test_on_the_terminal(relp: Any) -> None:
    asked = ("score", "ioi", "--nodes", "mlp_out", "--pairs", 4)
    assert relp(*asked, "--method", "relp", "-o", "first").code == 0
    learn = (*asked, "--method", "learned", "--set", "steps=3")
    done = relp(*learn, "--start", "first", "--json", "-o", "run")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["spec"]["params"] == {"steps": 3, "start": "first"}
    assert not list(Path("run").glob("unfinished*"))
    assert json.loads(relp(*learn, "--start", "first", "--json", "-o", "run").out)["cached"]
    assert Scores.load("run/scores.safetensors").meta["params"]["start"] == "first"
    assert relp("evaluate", "run", "--sweep", "counts:1,4", "--pairs", 4).code == 0
    for more, says in (
        (("--start", "nowhere"), "run 'nowhere' does not exist"),
        (("--start", "first", "--nodes", "head"), "this run scored mlp_out, not head"),
        (("--set", "temperature=0"), "greater than 0"),
    ):
        done = relp(*learn, *more, "-o", "x")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert says in done.err
    assert "has no parameter 'start'" in relp(*asked, "--start", "first", "-o", "x").err
    for name in ("learned", "hard_concrete"):
        assert not METHODS[name].signed
