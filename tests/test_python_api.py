"""The Python entry points as notebooks use them: what they take, that their numbers are the same, and their refusals."""

# ruff: noqa: ARG005 - the rows of one table take the same arguments

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

import relp_cli as relp
from relp_cli.models.catalog import EMBEDDED
from relp_cli.tasks import formulas


@cache
def model():
    return relp.load_model("tiny-gpt2")


@cache
def pairs(task="sva_across_pp", n=6):
    return relp.load_task(task).pairs(model(), n)


@pytest.mark.parametrize("method", ["relp", "act_patch"])
def test_a_function_as_metric_gives_the_named_metrics_scores_to_the_last_bit(method):
    def margin(logits, answer, foil):
        return (logits.gather(1, answer) - logits.gather(1, foil))[:, 0]

    named = relp.score(model(), pairs(), method, nodes=["head", "mlp_out"])
    own = relp.score(model(), pairs(), method, nodes=["head", "mlp_out"], metric=margin)
    assert torch.equal(named.mean, own.mean)
    assert torch.equal(named.variance, own.variance)
    assert own.meta["metric"] == "own:margin"


def test_a_function_with_a_reference_is_kl_where_it_computes_kl():
    def divergence(logits, answer, foil, reference):
        return formulas.kl(logits, answer, foil, reference)

    named = relp.score(model(), pairs(), "act_patch", "mlp_out", metric="kl")
    own = relp.score(model(), pairs(), "act_patch", "mlp_out", metric=divergence)
    assert torch.equal(named.mean, own.mean)
    with pytest.raises(relp.RelpError, match="gradient exactly 0 at the original"):
        relp.score(model(), pairs(), "atp", "mlp_out", metric=divergence)


def test_a_function_evaluates_a_circuit_as_the_named_metric_does():
    circuit = relp.select(relp.score(model(), pairs(), nodes="head"), top_k=5)
    named = relp.evaluate(model(), pairs(), circuit, metric="prob_diff", bootstrap=50)
    own = relp.evaluate(model(), pairs()[0], circuit, metric=formulas.prob_diff, bootstrap=50)
    assert named[["faithfulness", "F_M", "F_C", "F_empty"]].equals(own[["faithfulness", "F_M", "F_C", "F_empty"]])


def test_one_batch_and_one_kind_may_stand_alone():
    one = relp.score(model(), pairs()[0], nodes="mlp_neuron")
    assert list(one) == ["mlp_neuron"]
    assert torch.equal(one.mean, relp.score(model(), list(pairs()), nodes=["mlp_neuron"]).mean)


def loaded():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny-gpt2", dtype=torch.float32)


def test_a_model_in_memory_scores_as_the_one_that_is_loaded_by_name():
    want = relp.score(model(), pairs(), nodes=["head", "mlp_out"])
    hf = loaded()
    taken = relp.load_model(hf, tokenizer=model().tokenizer)
    assert (taken.name, taken.bos, taken.dtype) == ("tiny-gpt2", model().bos, torch.float32)
    again = relp.load_task("sva_across_pp").pairs(taken, 6)
    assert torch.equal(relp.score(taken, again, nodes=["head", "mlp_out"]).mean, want.mean)
    bridged = relp.load_model(taken.bridge, tokenizer=model().tokenizer)
    assert torch.equal(relp.score(bridged, again, nodes=["head", "mlp_out"]).mean, want.mean)
    with pytest.raises(relp.RelpError, match="wrapped already"):
        relp.load_model(hf)
    with pytest.raises(relp.RelpError, match="found on revision"):
        relp.evaluate(taken, again, relp.select(want, top_k=3))


def test_other_weights_of_one_name_have_another_revision():
    hf = loaded()
    hf.transformer.h[0].mlp.c_fc.bias.data[0] += 1
    changed, taken = relp.load_model(hf), relp.load_model(loaded())
    assert changed.name == taken.name
    assert changed.revision != taken.revision


@pytest.mark.parametrize("task", ["ioi", "sva_across_pp"])
def test_pairs_from_a_tasks_texts_are_the_tasks_pairs(task):
    built = relp.load_task(task).build(model(), 20)
    texts = built.text_pairs
    made = relp.pairs_from(
        model(),
        originals=[pair.original for pair in texts],
        patches=[pair.patch for pair in texts],
        answers=[pair.answer for pair in texts],
        foils=[pair.foil[0] for pair in texts],
        roles=[{role: (start, end) for role, start, end in pair.roles} for pair in texts],
    )
    for got, want in zip(made, built.batches, strict=True):
        assert got.roles == want.roles
        for name in ("original", "patch", "answer", "foil"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name


def test_a_role_may_be_named_by_its_text():
    (batch,) = relp.pairs_from(model(), ["The author above the desks"], answers=["does"], roles=[{"S": "author"}])
    assert batch.roles is not None
    assert batch.roles[2] == "S"
    assert batch.patch is None
    assert (batch.foil == -1).all()


A, B = "The author above the desks", "The authors above the desks"
TEXTS = {
    "originals: expected a list": lambda m: relp.pairs_from(m, A, [B], ["does"]),
    "no answers": lambda m: relp.pairs_from(m, [A], [B]),
    "1 patches for 2 originals": lambda m: relp.pairs_from(m, [A, A], [B], ["does", "does"]),
    "item 1: original and patch are the same": lambda m: relp.pairs_from(m, [A, A], [B, A], ["does", "does"]),
    "item 0: original and patch have different": lambda m: relp.pairs_from(m, [A], [B + " the"], ["does"]),
    "item 0: .*zebra": lambda m: relp.pairs_from(m, ["The zebra"], answers=["does"]),
    r"answers\[1\]": lambda m: relp.pairs_from(m, [A, A], answers=["does", 3]),
    "item 0: answer 'does do' is not a single": lambda m: relp.pairs_from(m, [A], answers=["does do"]),
    r"roles\[0\]: 'the cat' is 0 times": lambda m: relp.pairs_from(m, [A], answers=["does"], roles=[{"S": "the cat"}]),
    r"patches\[0\]": lambda m: relp.pairs_from(m, [A], [None], ["does"]),
}
SCORES = {
    "got a NoneType": lambda m, p: relp.score(None, p),
    r"relp.load_model\(model, tokenizer": lambda m, p: relp.score(m.hf, p),
    "pairs: expected PairBatches, got a str": lambda m, p: relp.score(m, "ioi"),
    r"pairs\[1\]: expected a PairBatch, got a PromptPair": lambda m, p: relp.score(
        m, [p[0], relp.PromptPair(A, B, ("does",), ("do",))]
    ),
    "no prompt pairs": lambda m, p: relp.score(m, []),
    "at least one node kind": lambda m, p: relp.score(m, p, nodes=[]),
    "node kind 'mlp_outs'; did you mean 'mlp_out'": lambda m, p: relp.score(m, p, nodes="mlp_outs"),
    "no keyword 'metrc'; did you mean 'metric'": lambda m, p: relp.score(m, p, metrc="kl"),
    "no parameter 'stps'; did you mean 'steps'": lambda m, p: relp.score(m, p, "ig_inputs", stps=3),
    "expected the name of a method": lambda m, p: relp.score(m, p, 3),
    "batch_size: expected": lambda m, p: relp.score(m, p, batch_size=0),
    "no patch prompt": lambda m, p: relp.score(m, relp.PairBatch(p[0].original, None, p[0].answer, p[0].foil)),
    "expected the name of a metric": lambda m, p: relp.score(m, p, metric=3),
    "it takes 1 values": lambda m, p: relp.score(m, p, metric=lambda logits: logits),
    "one float per example": lambda m, p: relp.score(m, p, metric=lambda logits, a, f: logits),
    "has no gradient": lambda m, p: relp.score(m, p, metric=lambda logits, a, f: logits[:, 0].detach()),
    "every score is exactly 0": lambda m, p: relp.score(m, p, metric=lambda logits, a, f: logits[:, 0] * 0),
    "was a function of a Python session": lambda m, p: relp.score(m, p, metric="own:margin"),
    "expected scores": lambda m, p: relp.select(None, top_k=3),
    "did you mean 'top_k'": lambda m, p: relp.select(relp.score(m, p), topk=3),
    "expected a circuit": lambda m, p: relp.evaluate(m, p, None),
    "expected a model's name": lambda m, p: relp.load_model(None),
    "dtype= goes with a name": lambda m, p: relp.load_model(m.hf, dtype="float32"),
    "tokenizer= goes with a model": lambda m, p: relp.load_model("tiny-gpt2", tokenizer=m.tokenizer),
    "a task's name or a path": lambda m, p: relp.load_task(None),
    "all rows of one length": lambda m, p: relp.PairBatch([[1, 2], [3]], None, [1, 2], [3, 4]),
}


@pytest.mark.parametrize("says", TEXTS)
def test_texts_that_cannot_be_used_are_named(says):
    with pytest.raises(relp.RelpError, match=says) as error:
        TEXTS[says](model())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("says", SCORES)
def test_misuse_is_one_line(says):
    with pytest.raises(relp.RelpError, match=says) as error:
        SCORES[says](model(), pairs())
    assert "\n" not in str(error.value)


def test_representations_are_short():
    assert (
        repr(model()) == "Model(tiny-gpt2: gpt2, 4 layers, 4 heads, d_model 64, d_mlp 256, 489 tokens, float32 on cpu)"
    )
    assert repr(pairs()[0]).startswith("PairBatch(6 pairs of 6 tokens, with patch prompts, roles bos start S PREP")


def test_types_are_shipped():
    from importlib.resources import files

    assert (files("relp_cli") / "py.typed").is_file()


@cache
def scores():
    return relp.score(model(), pairs(), nodes=["head", "mlp_out"])


def test_a_frame_has_the_tensors_numbers():
    view = scores()["head"]
    frame = view.to_pandas()
    mean, labels = view.mean, list(view.labels)
    assert len(frame) == len(view) == mean.numel()
    for row in frame.itertuples():
        at = row.layer, labels.index(row.position), row.unit
        assert row.score == mean[at].item()
        assert row.se == pytest.approx((view.variance[at] / 6).sqrt().item(), rel=1e-6)
    assert len(scores().to_pandas()) == len(view) + len(scores()["mlp_out"])
    assert [row.score for row in view] == frame.score.tolist()
    assert list(scores()) == ["head", "mlp_out"]


def test_a_frame_of_edges_has_the_matrices_numbers():
    edges = relp.score(model(), pairs(), "eap")["edges"]
    rows = {row.unit: row.score for row in edges}
    assert len(rows) == len(edges) == int(edges.mask.sum())
    for name, score in rows.items():
        writer, reader = name.split("->")
        assert score == edges.mean[edges.writers.index(writer), edges.readers.index(reader)].item()


def test_the_strongest_are_those_of_the_largest_size():
    sizes = sorted((abs(value) for value in scores().mean.tolist()), reverse=True)
    assert scores().top(7).score.abs().tolist() == sizes[:7]
    circuit = relp.select(scores(), top_k=7)
    assert circuit.top(3, scores()).equals(scores().top(3))
    for wrong in (0, -1, "3", 2.5):
        with pytest.raises(relp.RelpError, match="number of units from 1 up"):
            scores().top(wrong)


def test_a_circuits_rows_are_its_mask():
    circuit = relp.select(scores(), top_k=7)
    rows = {(row.kind, row.layer, row.position, row.unit) for row in circuit}
    masks = circuit.masks
    want = {("head", la, circuit.labels[p], u) for la, p, u in masks["head"].nonzero().tolist()}
    want |= {("mlp_out", la, circuit.labels[p], None) for la, p in masks["mlp_out"].nonzero().tolist()}
    assert rows == want
    assert len(circuit) == len(rows) == 7
    empty = relp.select(scores(), threshold=float("inf"))
    assert len(empty) == 0
    assert empty
    assert list(empty) == []


def test_what_notebooks_show_is_short_and_escaped():
    edges = relp.score(model(), pairs(), "eap")
    circuit = relp.select(edges, top_k=12)
    for thing in (scores(), scores()["head"], edges, edges["edges"], circuit, relp.select(scores(), top_k=7)):
        assert len(repr(thing)) < 160, repr(thing)
        assert "\n" not in repr(thing)
        assert thing._repr_html_().count("<tr") <= 11
    assert "m3-&gt;logits" in edges._repr_html_()
    marked = replace(scores(), labels=("<b>x</b>", *scores().labels[1:]), meta={"method": "<i>\x1b[1m"})
    page = replace(marked, mean=-torch.arange(len(marked.mean)).flip(0).double())._repr_html_()
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;" in page
    assert "\x1b" not in page


def test_figures_are_of_matplotlib():
    edges = relp.score(model(), pairs(), "eap")
    circuit = relp.select(edges, top_k=12)
    drawn = [scores().plot(), scores()["mlp_out"].plot(), edges.plot(), circuit.plot(edges)]
    kept = relp.select(scores(), top_k=7)
    drawn.append(kept.plot())
    assert all(isinstance(figure, Figure) for figure in drawn)
    assert all(figure._repr_png_().startswith(b"\x89PNG") for figure in drawn[:1])  # what a notebook shows
    shown = [axes.get_images()[0].get_array() for axes in drawn[-1].axes if axes.get_images()]
    assert (shown[0] == kept.masks["head"].sum(-1).numpy()).all()
    assert (shown[1] == kept.masks["mlp_out"].numpy()).all()
    with pytest.raises(relp.RelpError, match=r"circuit.plot\(scores\)"):
        circuit.plot()
