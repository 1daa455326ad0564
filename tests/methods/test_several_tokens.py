"""Answers of several tokens: L is read off two runs of a prompt, and so are scores, evaluations and what the model does."""

import json
from pathlib import Path

import pytest
import torch
from oracles import scores as S
from oracles.forward import forward
from oracles.make import exact_float64
from oracles.several import POS, following, logprob, sequences, summed
from oracles.wrapped import close, run

import relp_cli as relp
from relp_cli.errors import RelpError
from relp_cli.evaluation.behaviour import behaviour
from relp_cli.models.resume import WAYS, way_of
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.parts import parts_of

KINDS = ("resid_pre", "mlp_out", "key")
METRIC = "answer_logprob"


@pytest.mark.parametrize(("shape", "direction"), [("gpt2", "noising"), ("gemma2", "denoising")])
def test_scores_equal_the_oracle(shape, direction):
    """Exact patching, AtP, RelP with the preset and integrated gradients, pair by pair."""
    c, batch, sides = sequences(shape)
    o, p = batch.original, batch.patch
    rules = set(c.model.family.rules)

    def side(function, *more, **keywords):
        return lambda tokens, sign: function(
            c.weights, c.config, following(o, tokens), following(p, tokens), logprob(tokens, sign), *more,
            kinds=KINDS, direction=direction, **keywords,
        )  # fmt: skip

    cells = {
        "act_patch": (side(S.act_patch), {"chunk_tokens": 4000}),
        "atp": (side(S.atp), {}),
        "relp": (side(S.relp, rules), {}),
        "ig_inputs": (side(S.ig_inputs, 3), {"steps": 3}),
    }
    for method, (oracle, options) in cells.items():
        got = run(c, method, KINDS, [batch], metric=METRIC, direction=direction, batch_size=3, **options)
        want = summed(oracle, sides)
        order = [got.labels.index(label) for label in (*batch.roles, "answer:1", "answer:2", "foil:1")]
        assert len(order) == len(got.labels)
        for kind in KINDS:
            close(got[kind].examples[:, :, order], want[kind])
            close(got[kind].variance[:, order], want[kind].var(0))
            assert want[kind][:, :, POS:].abs().max() > 1e-4 or kind == "resid_pre", "a vacuous comparison"
        assert got.meta["n_pairs"] == 4
    start = o if direction == "noising" else p
    values = sum(logprob(t, s)(forward(c.weights, c.config, following(start, t)).logits) for t, s in sides)
    if direction == "noising":
        assert got.meta["mean_metric"] == pytest.approx(values.mean().item(), abs=1e-12)


def test_two_runs_cost_twice_one():
    c, batch, _ = sequences("gpt2")
    single = PairBatch(batch.original, batch.patch, batch.answer[:, 0, 0], batch.foil[:, 0, 0], batch.roles)
    one, two = (run(c, "relp", ["mlp_out"], [b], metric=METRIC).meta for b in (single, batch))
    assert two["forwards_per_pair"] == 2 * one["forwards_per_pair"]
    assert two["backwards_per_pair"] == 2 * one["backwards_per_pair"]


def test_of_single_tokens_it_is_the_logit_difference():
    """log-softmax takes the same from both; also where they are given as sequences of one, in two runs."""
    c, batch, _ = sequences("gpt2", 1, 1)
    single = PairBatch(batch.original, batch.patch, batch.answer[:, 0], batch.foil[:, 0], batch.roles)
    want = run(c, "act_patch", KINDS, [single], chunk_tokens=4000)
    for b in (single, batch):
        got = run(c, "act_patch", KINDS, [b], metric=METRIC, chunk_tokens=4000)
        for kind in KINDS:
            close(got[kind].examples, want[kind].examples)


def test_edges_and_an_evaluation_equal_the_oracle():
    """All edges that leave the input have its whole gradient; the last MLP's one edge is its exact effect at all positions. F of
    a circuit is the sum of both runs' F.
    """
    c, batch, sides = sequences("gpt2")
    o, p = batch.original, batch.patch
    eap, exact = (run(c, method, ["edges"], [batch], metric=METRIC)["edges"] for method in ("atp", "act_patch"))
    resid = summed(
        lambda t, s: S.atp(c.weights, c.config, following(o, t), following(p, t), logprob(t, s), ("resid_pre",)), sides
    )["resid_pre"]
    close(eap.mean[eap.writers.index("input")].sum(), resid[:, 0].sum(-1).mean())
    effect = 0
    for tokens, sign in sides:
        (run_, other), metric = ((following(x, tokens) for x in (o, p)), logprob(tokens, sign))
        last = forward(c.weights, c.config, other)["mlp_out"][-1]
        patched = forward(c.weights, c.config, run_, patch={("mlp_out", 2): lambda _, last=last: last})
        effect = effect + metric(patched.logits) - metric(forward(c.weights, c.config, run_).logits)
    close(exact.mean[exact.writers.index("m2"), exact.readers.index("logits")], effect.mean())
    assert effect.abs().min() > 1e-3
    circuit = relp.select(run(c, "atp", ["mlp_out", "head"], [batch], metric=METRIC), top_k=20)
    for ablation in ("mean", "zero", "counterfactual"):
        name = {"counterfactual": "patch"}.get(ablation, ablation)
        row = relp.evaluate(c.model, [batch], circuit, ablation, exclude_layers=0, batch_size=3).iloc[0]
        want = dict.fromkeys(("F_M", "F_C", "F_empty", "F_complement"), 0.0)
        for tokens, sign in sides:
            side = "answer" if sign > 0 else "foil"
            here = [*batch.roles, *(f"{side}:{i}" for i in range(1, tokens.shape[1]))]
            at = [circuit.labels.index(label) for label in here]
            masks = {kind: mask[:, at] for kind, mask in circuit.masks.items()}
            part = S.faithfulness(
                c.weights, c.config, following(o, tokens), following(p, tokens), logprob(tokens, sign), masks, 0, name
            )
            want = {key: value + part[key] for key, value in want.items()}
        for key, value in want.items():
            assert row[key] == pytest.approx(value, abs=1e-9), (ablation, key)
        gap = want["F_M"] - want["F_empty"]
        assert row.faithfulness == pytest.approx((want["F_C"] - want["F_empty"]) / gap, abs=1e-9)
        assert row.n_pairs == 4
    with pytest.raises(RelpError, match="resample"):
        relp.evaluate(c.model, [batch], circuit, "resample")


def test_what_the_model_does():
    c, batch, sides = sequences("gemma2")
    with exact_float64():
        seen = behaviour(c.model, [batch], METRIC)
    values = sum(logprob(t, s)(forward(c.weights, c.config, following(batch.original, t)).logits) for t, s in sides)
    assert seen.metric_original == pytest.approx(values.mean().item(), abs=1e-9)
    assert seen.correct[0].tolist() == (values > 0).tolist()
    greedy, prompts = [], batch.original
    for _ in range(3):  # what it writes by itself
        greedy.append(forward(c.weights, c.config, prompts).logits[:, -1].argmax(-1))
        prompts = torch.cat([prompts, greedy[-1][:, None]], 1)
    own = torch.stack(greedy, 1)
    own[1, 2] = (own[1, 2] + 1) % 50
    none = PairBatch(batch.original, batch.patch, own[:, None], torch.full((4, 1, 1), -1), batch.roles)
    with exact_float64():
        assert behaviour(c.model, [none], METRIC).correct[0].tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"metric": "logit_diff"}, "answer_logprob"),
        ({"metric": "prob_diff"}, "answer_logprob"),
        ({"metric": "kl", "method": "act_patch"}, "answer_logprob"),
        ({"metric": METRIC, "method": "atp_star"}, "do not add up"),
        ({"metric": METRIC, "method": "delta"}, "do not add up"),
        ({"metric": METRIC, "method": "learned"}, "do not add up"),
    ],
)
def test_what_cannot_read_them_refuses(asked, says):
    c, batch, _ = sequences("gpt2")
    with pytest.raises(RelpError, match=says):
        relp.score(c.model, [batch], asked.get("method", "atp"), nodes=["mlp_out"], metric=asked["metric"])


def test_batches_are_checked():
    _, batch, _ = sequences("gpt2")
    ids, none = batch.original, torch.full((4, 1, 1), -1)
    with pytest.raises(RelpError, match="both be"):
        PairBatch(ids, None, batch.answer, batch.foil[:, 0])
    with pytest.raises(RelpError, match="never padded"):
        PairBatch(ids, None, torch.tensor([1, -1]).expand(4, 1, 2), none)
    with pytest.raises(RelpError, match="have a foil or none"):
        parts_of([batch, PairBatch(ids, None, batch.answer, none)])
    with pytest.raises(RelpError, match="'answer:1' is the name"):
        parts_of([PairBatch(ids, None, batch.answer, none, ("answer:1", *"abcde"))])


def test_patched_runs_still_start_in_the_middle():
    c, batch, _ = sequences("gpt2")
    (part, _) = parts_of([batch])
    with exact_float64():
        assert way_of(c.model.reading(part.read), part.original) == WAYS[0]


PAIRS = [
    ("Then, Mary went to", "Then, John went to", "the store", "school"),
    ("Then, Lisa went to", "Then, Mark went to", "the school", "store"),
    ("Today, Anna went to", "Today, Paul went to", "the park", "the store"),
]


def test_texts_become_sequences():
    """One batch for each pair of lengths; the tokens are those that follow the prompt's."""
    model = relp.load_model("tiny-gpt2")
    names = ("originals", "patches", "answers", "foils")
    batches = relp.pairs_from(
        model, **dict(zip(names, map(list, zip(*PAIRS, strict=True)), strict=True)), metric=METRIC
    )
    assert [(len(b), b.n_pos, *b.answer.shape[1:], b.foil.shape[2]) for b in batches] == [
        (2, 6, 1, 2, 1),
        (1, 6, 1, 2, 2),
    ]
    ids = model.tokenizer("the store school park")["input_ids"]
    assert batches[0].answer.tolist() == [[[ids[0], ids[1]]], [[ids[0], ids[2]]]]
    assert batches[1].foil.tolist() == [[[ids[0], ids[1]]]]
    single = relp.pairs_from(model, ["Then, Mary went"], ["Then, John went"], ["to"], ["the"], metric=METRIC)
    assert single[0].answer.tolist() == [model.tokenizer("to")["input_ids"]]  # none is a sequence: one run
    for answers, foils, says in (
        (["the store"], ["the"], "begins with the other"),
        ([["the store", "school"]], ["park"], "one answer"),
        (["the Quetzalcoatl"], ["park"], "not in the vocabulary"),
    ):
        with pytest.raises(RelpError, match=says):
            relp.pairs_from(model, ["Then, Mary went to"], ["Then, John went to"], answers, foils, metric=METRIC)


def test_files_templates_and_the_command_line(relp):
    keys = ("original", "patch", "answer", "foil")
    Path("p.jsonl").write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in PAIRS))
    refused = relp("score", "p.jsonl", "--split", "all")
    assert refused.code == 2
    assert "is not a single token of tiny-gpt2" in refused.err
    assert "metric answer_logprob" in refused.err
    done = relp("score", "p.jsonl", "--split", "all", "--metric", METRIC, "-o", "r", "--json")
    assert done.code == 0, done.err
    assert json.loads(Path("r/run.json").read_text())["scores"]["metric"] == METRIC
    ids = {"original_ids": [2, 3], "patch_ids": [4, 3], "answer_id": [5, 6], "foil_id": 7}
    Path("i.jsonl").write_text(json.dumps(ids))
    refused = relp("score", "i.jsonl", "--metric", METRIC, "--split", "all")
    assert refused.code == 2
    assert "give answers of several tokens as text" in refused.err
    places = ("store", "school", "park", "museum", "market", "beach", "station")
    task = {
        "name": "t", "metric": METRIC, "slots": {"A": "names", "P": {"values": [f"the {p}" for p in places]}},
        "templates": ["Then, {A} saw {P}. {A2=A} went to"], "patch": {"P": "other"}, "answer": "{P}",
    }  # fmt: skip
    Path("t.yaml").write_text(json.dumps(task))
    assert relp("score", "t.yaml", "--pairs", 20, "-o", "s", "--method", "relp", "--nodes", "mlp_out").code == 0
    exact = ("score", "t.yaml", "--pairs", 2, "--method", "act_patch", "--nodes", "attn_out", "--json")
    dry, done = (json.loads(relp(*exact, *more).out) for more in (("--dry-run",), ("-o", "e")))
    runs = round(2 * done["scores"]["forwards_per_pair"])
    assert dry["forwards"].startswith(f"at most {runs:,} patched runs of one pair")
    assert relp("circuit", "s", "--top-k", 9).code == 0
    done = relp("evaluate", "s", "--pairs", 5, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"][0]["metric"] == METRIC
    shown = relp("show", "t.yaml", "--examples", 1).out
    assert "(2 tokens), foil 'the" in shown
