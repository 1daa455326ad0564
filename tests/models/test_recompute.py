"""Layers that are computed again in the backward pass: the same bits, less memory, and never another computation in silence."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from features.folders import write_all_sites
from oracles.several import sequences
from oracles.wrapped import case, double_by_default, pairs, run
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import relp_cli as relp_api
from relp_cli.features.edges import feature_edges
from relp_cli.features.load import load_dictionaries
from relp_cli.lrp.context import lrp
from relp_cli.methods import memory
from relp_cli.methods.memory import Alive
from relp_cli.methods.room import Room
from relp_cli.models.load import load_model, wrap
from relp_cli.models.model import Model
from relp_cli.models.offload import resident
from relp_cli.models.recompute import _Call, recomputing, standing_in
from relp_cli.nodes.access import capture
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.spaces.scores import Scores
from relp_cli.tasks.pairs import PairBatch

NODES = ["resid_pre", "attn_out", "mlp_out", "head", "query", "value", "mlp_neuron"]
MIXED = [kind for kind in NODES if kind != "mlp_neuron"]  # of mixtures of experts
SCORINGS: dict[str, list[tuple[str, list[str], dict[str, Any]]]] = {
    "gpt2": [
        ("relp", NODES, {}),
        ("atp", NODES, {}),
        ("ig_inputs", NODES, {"steps": 3}),
        ("ig_activations", ["mlp_out"], {"steps": 2}),
        ("conductance", NODES, {"steps": 1}),
        ("conductance", ["edges"], {"steps": 1, "rule": "midpoint"}),
        ("atp_star", ["key", "mlp_out"], {}),
        ("eap_ig", ["edges"], {"steps": 2}),
    ],
    "gemma2": [
        ("relp+secant", NODES, {}),
        ("eap", ["edges"], {}),
        ("relp", NODES, {"blend": True, "rules": ("ln2", "act2")}),
        ("atp_star", ["query", "key"], {"metric": "kl", "direction": "denoising"}),
        ("relp+secant", ["edges"], {}),
    ],
    "qwen2": [("relp+epsilon", NODES, {}), ("relp_edges", ["edges"], {}), ("relp_ig", NODES, {"steps": 2})],
    "pythia": [
        ("relp", NODES, {}),
        ("relp_edges", ["edges"], {}),
        ("relp+ah", ["value", "mlp_neuron"], {}),
    ],  # attention and MLP side by side
    "mixtral": [("relp", MIXED, {}), ("eap", ["edges"], {})],
}


@contextmanager
def layers_again() -> Iterator[list[int]]:
    """Scorings inside compute layers again; yields the layers, in their order."""
    on, make, layers = Room.on, _Call._make_again, list[int]()

    def always(*args: Any, **keywords: Any) -> Room:
        return replace(on(*args, **keywords), recompute=True)

    def counted(call: _Call) -> None:
        layers.append(call.layer)
        make(call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Room, "on", always)
        patch.setattr(_Call, "_make_again", counted)
        yield layers


def same(compute: Any) -> list[int]:
    """Scores are the same bits, with layers computed again and without; returns the layers."""
    want = compute()
    with layers_again() as layers:
        got = compute()
    assert want.abs().max() > 1e-3
    assert torch.equal(got, want)
    return layers


@pytest.mark.parametrize("shape", SCORINGS)
def test_scores_are_the_same_bits(shape: str) -> None:
    for method, nodes, options in SCORINGS[shape]:
        layers = same(lambda: run(case(shape), method, nodes, keep_examples=True, **options).examples)  # noqa: B023
        assert set(layers) <= {0, 1, 2}
        assert {1, 2} <= set(layers), (method, nodes)
        if method == "relp":
            assert layers == [2, 1, 0] * (len(layers) // 3), "each once, from the last to the first"


def test_so_are_those_of_answers_of_several_tokens_and_of_features(tmp_path: Path) -> None:
    c, batch, _ = sequences("gemma2")
    assert same(lambda: run(c, "relp", NODES, [batch], metric="answer_logprob", keep_examples=True).examples)
    c = case("pythia")
    found = load_dictionaries(write_all_sites(tmp_path, 3, 32, 40), c.model)

    scores = run(c, "relp", ["feature"], dictionary=found, keep_examples=True)
    assert same(lambda: run(c, "relp", ["feature"], dictionary=found, keep_examples=True).examples)
    circuit = relp_api.select(scores["feature"], top_k=20)
    with double_by_default():
        want = feature_edges(c.model, [c.batch], circuit, dictionary=found)
        with recomputing(c.model):  # nothing asks for it there, but it would be right
            got = feature_edges(c.model, [c.batch], circuit, dictionary=found)
    assert len(want.index) > 6
    assert torch.equal(got.mean, want.mean)


def test_so_are_those_of_weights_that_are_fetched() -> None:
    """One layer's activations and one module's weights at a time."""
    model = load_model("tiny-qwen2", device_map="offload")
    batches = relp_api.load_task("ioi").pairs(model, n=2)
    assert same(lambda: relp_api.score(model, batches, "relp", ["mlp_neuron"]).mean)
    assert "forward" not in vars(model.component("blocks.0"))


@cache
def deep_model() -> tuple[Model, PairBatch]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=64, n_layer=8, n_head=4, n_inner=256)
    model = wrap(GPT2LMHeadModel(config), None, "deep")
    ids = torch.randint(64, (2, 1, 64))
    return model, PairBatch(ids[0], ids[1], ids[0][:, 0], ids[1][:, 0])


def test_what_is_alive_is_one_layers() -> None:
    model, batch = deep_model()
    for method, nodes in (("relp", ["resid_pre"]), ("atp", ["head"])):

        def alive() -> int:
            with Alive() as count:
                relp_api.score(model, [batch], method, nodes)  # noqa: B023
            return count.peak

        relp_api.score(model, [batch], method, nodes)  # once, rules are compared with what the model computes
        plain = alive()
        with layers_again() as layers:
            assert alive() < plain / 2, (method, nodes, plain)
        assert len(layers) == 8
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is _Call], "nothing is held by what hooks hold"


def graph(model: Model, stack: ExitStack) -> tuple[Tensor, Tensor]:
    """A value that a gradient leads back from, and where to, under hooks that are gone afterwards."""
    leaf = NODE_KINDS["resid_pre"]
    with torch.enable_grad(), lrp(model, ["ln", "identity"]), capture(model, [leaf]) as seen:
        logits = model.logits(case("gpt2").batch.original.to(torch.int64))
    stack.callback(seen.clear)
    return logits.sum(), seen["resid_pre"][0]


def test_the_hooks_are_those_that_stood() -> None:
    """Those of the forward pass are gone by then, and others may stand, also without `lrp` and `capture` knowing of it."""
    model = case("gpt2").model
    with ExitStack() as stack:
        (want,) = torch.autograd.grad(*graph(model, stack))
        stack.enter_context(recomputing(model))
        value, leaf = graph(model, stack)
        with model.hooks(
            [(f"blocks.{n}.{at}", torch.zeros_like) for n in range(3) for at in ("hook_in", "mlp.hook_in")]
        ):
            (got,) = torch.autograd.grad(value, leaf)
            assert all(len(model.point(f"blocks.{n}.hook_in")._forward_hooks) == 1 for n in range(3))
        assert torch.equal(got, want)


def test_another_computation_is_an_error_and_no_number() -> None:
    model = case("gpt2").model

    def backward(between: Any) -> None:
        with ExitStack() as stack:
            stack.enter_context(recomputing(model))
            value, leaf = graph(model, stack)
            between(stack)
            torch.autograd.grad(value, leaf)

    mlp = model.component("blocks.1.mlp").original_component
    with pytest.raises(
        RuntimeError, match=r"layer 1 was not computed the second time as the first time: .* were saved"
    ):
        backward(lambda stack: stack.enter_context(standing_in(mlp, lambda h: h)))
    with pytest.raises(RuntimeError, match="graph of layer 2 has ended: one stands at a time"):
        backward(lambda stack: graph(model, stack))
    given: list[Tensor] = []

    def twice(_: ExitStack) -> None:
        given[0].mul_(2)

    block = model.component("blocks.2")
    handle = block.register_forward_pre_hook(lambda _, args: given.append(args[0].detach()))
    try:
        with pytest.raises(RuntimeError, match="layer 2 cannot be computed again: what it was given was written over"):
            backward(twice)
    finally:
        handle.remove()
    gc.collect()
    assert not any("forward" in vars(model.component(f"blocks.{n}")) for n in range(3))


KB = 1000


@pytest.mark.parametrize(("free", "recompute", "tokens"), [(380, None, 0), (420, True, 8), (810, False, 8)])
def test_a_limit_by_hand(free: int, recompute: bool | None, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair takes 400 kB, or 200 with layers computed again, twice of which an allocator holds. Trying it takes no more."""
    monkeypatch.setattr(memory, "LIBRARIES", {"cpu": 0})
    monkeypatch.setattr(memory, "HELD", 2)
    most: list[int] = []

    def compute(batch: PairBatch, room: Room) -> None:
        kept = []
        for _ in range(20 if not room.recompute else 10):
            kept.append(torch.zeros(len(batch), 20 * KB // 4))
            most.append(sum(t.nbytes for t in kept))

    model = case("gpt2").model
    held = resident(model.hf)

    def chosen(recomputes: bool = True) -> memory.Plan:
        return memory.plan(held + free * KB, model, [pairs(3, 8)], compute, recomputes=recomputes)

    if recompute is None:
        with pytest.raises(
            Exception, match=r"at a time, layers computed again in the backward pass, takes up to \S+ kB|MB"
        ):
            chosen()
        return
    assert (chosen().recompute, chosen().tokens) == (recompute, tokens)
    assert max(most) <= (free / 2 + 20) * KB
    assert chosen().room.recompute is recompute
    if recompute:
        with pytest.raises(Exception, match="one pair of 8 tokens at a time takes up to"):
            chosen(recomputes=False)


def test_a_limit_chooses_it_and_says_so(relp: Any) -> None:
    """One pair of 180 tokens, whose graph does not fit: the command line's numbers are those of the default, to the bit."""
    words = [f"the {a} and the {b} went to the store ." for a in ("boy", "girl") for b in ("man", "woman")]
    text = " ".join(words * 4)
    rows = [{"original": f"{text} the boy", "patch": f"{text} the girls", "answer": "is", "foil": "are"}]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = ("long.jsonl", "--model", "tiny-qwen2", "--nodes", "mlp_out")
    plain = relp("score", *how, "-o", "plain")
    assert plain.code == 0, plain.err
    needs = relp("score", *how, "--memory", "10MB", "-o", "none")
    least = re.search(
        r"error: .* at a time, layers computed again in the backward pass, takes up to (\d+) MB", needs.err
    )
    assert least, needs.err
    limit = f"{int(least[1]) + 2}MB"
    said = json.loads(relp("score", *how, "--memory", limit, "--dry-run", "--json").out)["passes"]
    assert "128 tokens a pass (1 pairs), layers computed again in the backward pass, at most" in said
    done = relp("score", *how, "--memory", limit, "-o", "little")
    assert done.code == 0, done.err
    assert "layers were computed again in the backward pass" in done.err
    assert json.loads(Path("little/run.json").read_text())["scores"]["layers_recomputed"] is True
    assert "layers_recomputed" not in json.loads(Path("plain/run.json").read_text())["scores"]
    got, want = (Scores.load(Path(folder, "scores.safetensors")).mean for folder in ("little", "plain"))
    assert torch.equal(got, want)


def test_where_memory_runs_out_it_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    """After halving; said in the metadata, and kept to for the batches that follow."""
    c, tried = case("gpt2"), list[tuple[int, bool]]()
    whole = Model.logits

    def logits(self: Model, tokens: Tensor, *args: Any, **keywords: Any) -> Tensor:
        if torch.is_grad_enabled():
            plain = "forward" not in vars(self.component("blocks.0"))
            tried.append((len(tokens), plain))
            if plain:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, tokens, *args, **keywords)

    batches = [pairs(2, 40), pairs(1, 39, seed=2)]
    want = run(c, "relp", ["edges"], batches, batch_size=1)
    monkeypatch.setattr(Model, "logits", logits)
    got = run(c, "relp", ["edges"], batches)
    assert torch.equal(got.examples, want.examples)
    assert got.meta["layers_recomputed"] is True
    assert got.meta["out_of_memory_pairs_per_pass"] == 1
    assert "layers_recomputed" not in want.meta
    assert tried == [(2, True), (1, True), (1, True), (1, False), (1, False), (1, False)], (
        "what failed is not tried again"
    )
