"""An addition of every sort is one row of a table, given here from outside the package; numbers show that all works with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.wrapped import case, close, run
from pydantic import ValidationError
from torch import Tensor
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from relp_cli.errors import RelpError
from relp_cli.evaluation.ablation_table import ABLATIONS, AblationRow
from relp_cli.evaluation.evaluate import evaluate
from relp_cli.evaluation.overlap import overlap
from relp_cli.lrp.rules import RULES, NormForm, Rule
from relp_cli.methods.nodes import Nodes
from relp_cli.methods.space import Batch, Point
from relp_cli.methods.table import METHODS, Method, Params, Result, methods_for
from relp_cli.models.families import FAMILIES, Family
from relp_cli.models.load import load_model
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind
from relp_cli.registry import Registry
from relp_cli.runs.spec import ScoreSpec
from relp_cli.scoring import score
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.nodes import NODES
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import SPACES, SpaceRow
from relp_cli.spaces.units import Units
from relp_cli.tasks.files import FORMS, Form
from relp_cli.tasks.metrics import METRICS, Metric
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.spec import TaskSpec
from relp_cli.tasks.task import load_task

Add = Callable[[Registry[Any], Any], None]


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Add:
    """Adds a row to a table for the length of a test."""

    def added(table: Registry[Any], row: Any) -> None:
        monkeypatch.setattr(table, "_rows", dict(table._rows))
        table.add(row.name, row)

    return added


def halfway(on: Batch, _: Params) -> Iterable[Point]:
    """The gradient with embeddings halfway to the source."""
    return [Point(moved={"blocks.0.hook_in": on.embedding_change / 2})]


def ones(on: Batch, _: Params) -> Result:
    return Result({k: torch.ones_like(v) for k, v in on.attribute([Point()]).scores.items()})


def test_an_estimator(add: Add) -> None:
    add(METHODS, Method("halfway", f"{__name__}:halfway:", "c(n)", "3 forward + 1 backward", "—", "this test"))
    add(METHODS, Method("ones", f"{__name__}:ones:", "1", "2 forward", "—", "—", ("nodes",), by="batch"))
    c = case("gpt2")
    for kind in ("mlp_neuron", "edges"):
        close(run(c, "halfway", [kind])[kind].mean, run(c, "ig_inputs", [kind], steps=1)[kind].mean)
    assert (run(c, "ones", ["head"])["head"].mean == 1).all()
    assert "halfway" in methods_for("features")
    assert "ones" not in methods_for("features")


class ShareParams(Params):
    """share: of the gradient."""

    share: float = 1.0


def part(_: Batch, params: ShareParams) -> Iterable[Point]:
    return [Point(weight=params.share)]


def test_an_option_of_a_method(add: Add, relp: Any, tmp_path: Path) -> None:
    add(METHODS, Method("part", f"{__name__}:part:ShareParams", "share · c(n)", "2 forward + 1 backward", "—", "—"))
    found = {}
    for name, arguments in {"atp": (), "part": ("--set", "share=0.25")}.items():
        done = relp(
            "score", "ioi", "--method", name, *arguments, "--nodes", "head", "--pairs", "4", "-o", tmp_path / name
        )
        assert done.code == 0, done.err
        found[name] = Scores.load(tmp_path / name / "scores.safetensors")
    close(found["part"].mean, found["atp"].mean / 4)
    assert found["part"].meta["params"] == {"share": 0.25}
    with pytest.raises(RelpError, match="'part' has no parameter 'shares'; did you mean 'share'"):
        run(case("gpt2"), "part", ["head"], shares=1)


def test_a_node_kind(add: Add) -> None:
    """AtP* and act_patch ask the row, not the name, how many units there are and whether layers contain them."""
    add(NODE_KINDS, NodeKind("stream", "blocks.{l}.hook_in", "vector", "resid_pre again", between_layers=True))
    add(NODE_KINDS, NodeKind("hidden", "blocks.{l}.mlp.out.hook_in", "unit", "neurons again", width="d_mlp"))
    c, again = case("pythia"), {"stream": "resid_pre", "hidden": "mlp_neuron"}
    for method in ("atp_star", "atp"):
        got = run(c, method, [*again, *again.values()])
        for kind, known in again.items():
            assert torch.equal(got[kind].mean, got[known].mean)
    tables = []
    for kind in ("hidden", "mlp_neuron"):
        circuit = select(run(c, "atp", [kind]), top_k=20)
        tables.append(evaluate(c.model, [c.batch], circuit, bootstrap=10))
    assert tables[0].equals(tables[1])


def test_a_rule(add: Add) -> None:
    add(RULES, Rule("sigma", "norm", lambda _x, inverse, *_: NormForm(inverse), "the LN-rule again", "this test"))
    c = case("qwen2")
    mine, known = (run(c, "relp", ["mlp_neuron"], rules=[name, "identity", "half"]) for name in ("sigma", "ln"))
    assert torch.equal(mine.mean, known.mean)
    assert mine.meta["rules"] == {"sigma" if k == "ln" else k: n for k, n in known.meta["rules"].items()}
    assert torch.equal(run(c, "relp+sigma", ["mlp_neuron"]).mean, known.mean)  # in place of the preset's rule of norms
    with pytest.raises(RelpError, match="rules 'ln' and 'sigma' both replace the norm"):
        run(c, "relp", rules=["ln", "sigma"])


def test_a_family(add: Add, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPTNeoConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32,
                          max_position_embeddings=16, attention_types=[[["global"], 2]])  # fmt: skip
    GPTNeoForCausalLM(config).save_pretrained(tmp_path / "model")
    before = load_model(str(tmp_path / "model"))
    assert (before.family.name, before.family.rules) == ("gpt_neo", ("ln", "identity"))
    add(FAMILIES, Family("neo", ("gpt_neo",), ("ln",)))
    model, pairs = load_model(str(tmp_path / "model")), [case("gpt2").batch]
    own, named = score(model, pairs, "relp"), score(before, pairs, "relp", rules=["ln"])
    assert torch.equal(own.mean, named.mean)
    assert (own.meta["family"], own.meta["rules"]) == ("neo", {"ln": 5})
    assert not torch.allclose(own.mean, score(before, pairs, "relp").mean)


def doubled(logits: Tensor, answer: Tensor, foil: Tensor, reference: Tensor | None = None) -> Tensor:
    assert reference is None or reference.shape == logits.shape
    return 2 * (logits.gather(1, answer) - logits.gather(1, foil))[:, 0]


def test_a_metric(add: Add) -> None:
    add(METRICS, Metric("doubled", f"{__name__}:doubled", True, True, False, "twice the logit difference"))
    c = case("gpt2")
    mine, known = (run(c, "atp", ["head"], metric=name) for name in ("doubled", "logit_diff"))
    close(mine.mean, 2 * known.mean)
    circuits = [select(scores, top_k=10) for scores in (mine, known)]
    assert torch.equal(circuits[0].mask, circuits[1].mask)
    own, other = (evaluate(c.model, [c.batch], circuit, bootstrap=10).iloc[0] for circuit in circuits)
    assert own.metric == "doubled"  # the one that the circuit was found with
    assert pytest.approx(2 * other.F_C) == own.F_C
    assert own.faithfulness == pytest.approx(other.faithfulness)
    assert TaskSpec(name="mine", metric="doubled", pairs="a.jsonl").metric == "doubled"
    with pytest.raises(ValidationError, match="did you mean 'doubled'"):
        TaskSpec(name="mine", metric="double", pairs="a.jsonl")
    broken = PairBatch(c.batch.original, c.batch.patch, c.batch.answer, c.batch.foil)
    with pytest.raises(RelpError, match="metric 'doubled' is nan"):
        METRICS["doubled"].fn(torch.full((len(broken), 50), torch.nan), broken.answer, broken.foil)


def test_a_task_format(add: Add, tmp_path: Path) -> None:
    model = load_model("tiny-gpt2")
    records = [
        {"original": f"When , {a} and Ryan went to the library . {a} gave a snack to",
         "patch": f"When , Ryan and {a} went to the library . Ryan gave a snack to",
         "answer": "Ryan", "foil": a, "split": "discovery"}
        for a in ("Mark", "Susan")
    ]  # fmt: skip
    keys = {"original": "base", "patch": "source", "answer": "base_label", "foil": "source_label", "split": "split"}
    other = [{keys[key]: value for key, value in record.items()} for record in records]
    files = {"known": records, "new": other}
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RelpError, match="missing key"):
        load_task(str(tmp_path / "new.jsonl"))
    add(FORMS, Form("interchange", "base", "source", "base_label", "source_label"))
    known, new = (load_task(str(tmp_path / f"{name}.jsonl")).pairs(model, 2, 0) for name in files)
    assert len(known) == len(new) == 1
    for field in ("original", "patch", "answer", "foil"):
        assert torch.equal(getattr(known[0], field), getattr(new[0], field))
    (tmp_path / "mixed.jsonl").write_text(json.dumps(records[0]) + "\n" + json.dumps(other[1]) + "\n")
    with pytest.raises(RelpError, match="mixes formats in one file: interchange, text"):
        load_task(str(tmp_path / "mixed.jsonl"))


def swapped(pairs: PairBatch, seed: int) -> Tensor:
    """Neighbours' patch prompts."""
    assert seed >= 0
    assert pairs.patch is not None
    return pairs.patch.flip(0)


def test_an_ablation(add: Add) -> None:
    """By the run of other prompts, and by a mean over other prompts, of nodes and of edges."""
    add(ABLATIONS, AblationRow("swapped", "the patch run of a neighbour", prompts=f"{__name__}:swapped"))
    add(ABLATIONS, AblationRow("mean_original", "mean over the originals", needs_patch=False, means=("original",)))
    c = case("pythia")
    flipped = replace(c.batch, patch=c.batch.patch.flip(0))
    originals = replace(c.batch, patch=c.batch.original)
    for kind in ("head", "edges"):
        circuit = select(run(c, "atp", [kind]), top_k=12)
        for mine, known, pairs in (("swapped", "counterfactual", flipped), ("mean_original", "mean", originals)):
            got, want = (
                evaluate(c.model, [batch], circuit, ablation, 1, bootstrap=10, batch_size=3).iloc[0]
                for batch, ablation in ((c.batch, mine), (pairs, known))
            )
            assert got.ablation == mine
            for column in ("F_M", "F_empty", "F_C", "F_complement", "faithfulness"):
                assert got[column] == pytest.approx(want[column], rel=1e-9)
            assert pytest.approx(evaluate(c.model, [c.batch], circuit, known, 1, bootstrap=10).iloc[0].F_C) != got.F_C
    with pytest.raises(RelpError, match="did you mean 'swapped'"):
        evaluate(c.model, [c.batch], circuit, "swaped")


ATTENTION = "attn_out"


def as_attention(found: Any) -> Any:
    return replace(found, units=replace(found.units, space="attention"))


class AttentionSpace(type(NODES)):  # type: ignore[misc]
    """Attention's outputs as units of their own: asked for by another name, and in files of their own type."""

    def keys(self, _: Units) -> tuple[str, ...]:
        return ("attention",)

    def view(self, scores: Scores, _: str) -> Any:
        return super().view(scores, ATTENTION)

    table = view

    def from_tensors(self, entries: Any, meta: Any) -> Scores:
        return as_attention(super().from_tensors({ATTENTION: entries["attention"]}, meta))

    def read(self, content: Any, labels: Any, meta: Any) -> Circuit:
        return as_attention(super().read(content, labels, meta))


ATTENTIONS = AttentionSpace()


class AttentionScorer(Nodes):
    def __init__(self, model: Any, pairs: Any, nodes: Any, request: Any, options: Any) -> None:
        assert nodes == ["attention"]
        super().__init__(model, pairs, [ATTENTION], request, options)
        self.units = replace(self.units, space="attention")


def test_a_space(add: Add, tmp_path: Path) -> None:
    """Scored by every method that serves any space, selected, saved, loaded and evaluated."""
    here = f"{__name__}:"
    add(SPACES, SpaceRow("attention", f"{here}ATTENTIONS", f"{here}AttentionScorer", "attention circuit",
                         "relp_cli.evaluation.node_circuits:NodeAblator", kinds=("attention",)))  # fmt: skip
    c = case("gpt2")
    methods = methods_for("attention")
    assert {"atp", "relp", "act_patch", "conductance"} <= set(methods)
    assert not {"eap", "atp_star", "acdc"} & set(methods)
    for method in ("atp", "relp", "act_patch", "ig_activations"):
        assert torch.equal(run(c, method, ["attention"])["attention"].mean, run(c, method, [ATTENTION])[ATTENTION].mean)
    scores, nodes = run(c, "atp", ["attention"]), run(c, "atp", [ATTENTION])
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert loaded.units == scores.units
    assert torch.equal(loaded.mean, scores.mean)
    circuit, known = (select(found, top_k=5) for found in (loaded, nodes))
    circuit.save(tmp_path / "circuit.json")
    assert json.loads((tmp_path / "circuit.json").read_text())["type"] == "attention circuit"
    again = Circuit.load(tmp_path / "circuit.json")
    assert again.units == scores.units
    assert torch.equal(again.mask, known.mask)
    mine, theirs = (evaluate(c.model, [c.batch], x, bootstrap=10, random_circuits=2) for x in (again, known))
    assert mine.equals(theirs)
    assert mine.exclude_layers.tolist() == [1]
    assert ScoreSpec(task="ioi", nodes=("attention",)).nodes == ("attention",)
    with pytest.raises(RelpError, match="a circuit of attention and one of nodes have no node in common"):
        overlap(again, known)
    with pytest.raises(RelpError, match="'atp_star' does not score attention"):
        run(c, "atp_star", ["attention"])
