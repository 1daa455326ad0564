"""Selection by hand, and circuits as files."""

import json

import pytest
import torch

from relp_cli.errors import RelpError
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.files import tensor_hash
from relp_cli.spaces.nodes import node_circuit
from relp_cli.spaces.scores import KindScores
from relp_cli.spaces.top import circuit_table
from relp_cli.spaces.units import ANY_POSITION

T, F = True, False
VALUES = torch.tensor([[3.0, -1.0], [0.5, -3.0], [0.0, 2.0]], dtype=torch.float64)


def scores(mean=VALUES, kind="mlp_out", examples=None, labels=None, **meta):
    mean = torch.as_tensor(mean)
    labels = labels or tuple(str(i) for i in range(mean.shape[1]))
    n = torch.full((mean.shape[1],), 2)
    return KindScores(kind, mean, torch.zeros_like(mean), n, labels, "position", examples, None, meta)


def kept(circuit, kind="mlp_out"):
    return circuit.masks[kind].tolist()


@pytest.mark.parametrize(("how", "want"), [
    ({"threshold": -1}, [[T, T], [T, T], [T, T]]),
    ({"threshold": 0}, [[T, T], [T, T], [F, T]]),
    ({"threshold": 1}, [[T, F], [F, T], [F, T]]),
    ({"threshold": 3}, [[F, F], [F, F], [F, F]]),
    ({"threshold": float("inf")}, [[F, F], [F, F], [F, F]]),
    ({"fraction": 0.5}, [[T, F], [F, T], [F, T]]),  # of mean |L| = 3
    ({"top_k": 0}, [[F, F], [F, F], [F, F]]),
    ({"top_k": 1}, [[T, F], [F, F], [F, F]]),  # |3| ties with |−3|: the first one
    ({"top_k": 3}, [[T, F], [F, T], [F, T]]),
    ({"top_k": 6}, [[T, T], [T, T], [T, T]]),
    ({"top_p": 0.3}, [[T, F], [F, F], [F, F]]),  # of Σ|score| = 9.5
    ({"top_p": 0.6}, [[T, F], [F, T], [F, F]]),
    ({"top_p": 6 / 9.5}, [[T, F], [F, T], [F, F]]),
    ({"top_p": 0.64}, [[T, F], [F, T], [F, T]]),
    ({"top_p": 1}, [[T, T], [T, T], [F, T]]),
    ({"threshold": 0, "sign": "positive"}, [[T, F], [T, F], [F, T]]),
    ({"threshold": -1, "sign": "negative"}, [[F, T], [F, T], [F, F]]),
    ({"threshold": 1, "sign": "negative"}, [[F, F], [F, T], [F, F]]),
    ({"top_k": 5, "sign": "negative"}, [[F, T], [F, T], [F, F]]),
    ({"top_p": 0.5, "sign": "negative"}, [[F, F], [F, T], [F, F]]),
    ({"threshold": -1, "from_layer": 1}, [[F, F], [T, T], [T, T]]),
    ({"top_k": 2, "from_layer": 2}, [[F, F], [F, F], [T, T]]),
])  # fmt: skip
def test_by_hand(how, want):
    circuit = select(scores(mean_abs_metric=3.0), **how)
    assert kept(circuit) == want
    assert circuit.n_nodes == sum(map(sum, want))
    assert circuit.n_possible == 6


def test_selecting_leaves_the_scores_alone():
    s = scores()
    before = s.mean.clone()
    select(s, top_k=2, from_layer=1)
    assert torch.equal(s.mean, before)


def test_sums_over_positions_are_in_everywhere_or_nowhere():
    circuit = select(scores(), threshold=2, aggregate="sum")  # sums 2, −2.5, 2
    assert kept(circuit) == [[F], [T], [F]]
    assert circuit.labels == ANY_POSITION
    assert kept(select(scores(), top_k=1, aggregate="sum", sign="positive")) == [[T], [F], [F]]


def test_a_sum_over_positions_is_the_mean_of_each_pairs_own():
    """Position b is in one pair of two: pairs sum to 5 and 2, positions' means to 1.5 + 4."""
    examples = torch.tensor([[[1.0, 4.0]], [[2.0, 0.0]]])
    mean, present = torch.tensor([[1.5, 4.0]], dtype=torch.float64), torch.tensor([[T, T], [T, F]])
    view = KindScores(
        "mlp_out", mean, mean, torch.tensor([2, 1]), ("a", "b"), "role", examples, present, {"n_pairs": 2}
    )
    whole = view.whole
    for some, want in (
        (whole, 3.5),
        (whole.weighed(torch.tensor([1.0, 3.0])), 2.75),
        (whole.among(present[:, 1]), 5.0),
    ):
        assert some.summed(some.mean).tolist() == [want]
        assert kept(select(some, threshold=want - 0.1, aggregate="sum")) == [[T]]
        assert kept(select(some, threshold=want + 0.1, aggregate="sum")) == [[F]]
    assert circuit_table(whole, select(whole, top_k=1, aggregate="sum")).score.tolist() == [3.5]


def test_union_over_examples():
    examples = torch.tensor([[[2.0, 0.0]], [[-1.0, 0.5]]])  # two examples, one layer, two positions
    s = scores(examples.mean(0).double(), examples=examples)
    assert kept(select(s, threshold=0.9)) == [[F, F]]  # means 0.5 and 0.25
    assert kept(select(s, threshold=0.9, union=True)) == [[T, F]]
    assert kept(select(s, threshold=0.4, union=True)) == [[T, T]]
    assert kept(select(s, threshold=0.9, union=True, sign="negative")) == [[T, F]]
    assert kept(select(s, threshold=1.4, union=True, aggregate="sum")) == [[T]]  # sums 2 and −0.5
    with pytest.raises(RelpError, match="needs per-example scores"):
        select(scores(), threshold=1, union=True)


def test_kinds_are_ranked_together():
    heads = scores([[[0.5, 4.0]]], kind="head", labels=("a",))
    mixed = {"mlp_out": scores([[2.0]], labels=("a",)), "head": heads}
    circuit = select(mixed, top_k=2)
    assert (kept(circuit), kept(circuit, "head")) == ([[T]], [[[F, T]]])
    tied = {"mlp_out": scores([[2.0]], labels=("a",)), "head": scores([[[2.0, -2.0]]], kind="head", labels=("a",))}
    circuit = select(tied, top_k=2)
    assert (kept(circuit), kept(circuit, "head")) == ([[T]], [[[T, F]]])
    with pytest.raises(RelpError, match="different position axes"):
        select({"mlp_out": scores([[2.0]], labels=("b",)), "head": heads}, top_k=1)


@pytest.mark.parametrize("k", range(0, 25, 4))
def test_top_k_is_exact_under_many_ties(k):
    mean = torch.randint(-2, 3, (4, 3, 2), generator=torch.Generator().manual_seed(k)).double()
    circuit = select(scores(mean, kind="head"), top_k=k)
    assert circuit.n_nodes == k
    if 0 < k < 24:
        inside, outside = mean.abs()[circuit.masks["head"]], mean.abs()[~circuit.masks["head"]]
        assert inside.min() >= outside.max()


@pytest.mark.parametrize("sign", ["absolute", "positive", "negative"])
@pytest.mark.parametrize(
    "how", [{"top_k": 1}, {"top_k": 5}, {"top_k": 12}, {"top_k": 24}, {"top_p": 0.4}, {"top_p": 1.0}]
)
def test_the_threshold_that_is_told_selects_the_same_nodes(how, sign):
    mean = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()
    circuit = select(scores(mean), **how, sign=sign)
    again = select(scores(mean), threshold=circuit.meta["selection"]["tau"], sign=sign)
    assert torch.equal(again.masks["mlp_out"], circuit.masks["mlp_out"])
    assert "ties" not in circuit.meta["selection"]


def test_ties_are_told():
    tied = scores(torch.tensor([[3.0, 2.0, 2.0], [2.0, 1.0, -2.0]]))
    told = select(tied, top_k=2).meta["selection"]
    assert told["ties"] == 3
    assert select(tied, threshold=told["tau"]).n_nodes == 5


@pytest.mark.parametrize("p", [0.01, 0.25, 0.5, 0.9, 1.0])
def test_top_p_is_the_fewest_nodes(p):
    mean = torch.randint(-2, 3, (4, 6), generator=torch.Generator().manual_seed(0)).double()
    chosen = mean.abs()[select(scores(mean), top_p=p).masks["mlp_out"]]
    total = mean.abs().sum()
    assert chosen.sum() >= p * total * (1 - 1e-9)
    assert chosen.sum() - chosen.min() < p * total


def test_scores_of_zero_hold_nothing():
    assert select(scores(torch.zeros(2, 2)), top_p=0.5).n_nodes == 0
    assert select(scores(torch.zeros(2, 2)), threshold=0).n_nodes == 0
    assert select(scores(torch.zeros(2, 2)), top_k=3).n_nodes == 3


@pytest.mark.parametrize(("how", "message"), [
    ({}, "exactly one of .* got none"),
    ({"threshold": 1, "top_k": 2}, "exactly one of .* got threshold, top_k"),
    ({"threshold": float("nan")}, "threshold is not a number"),
    ({"fraction": 0.1}, "do not say the metric's mean size"),
    ({"top_k": 7}, "whole number from 0 to 6"),
    ({"top_k": -1}, "whole number from 0 to 6"),
    ({"top_k": 1.5}, "whole number from 0 to 6"),
    ({"top_p": 0}, r"in \(0, 1\]"),
    ({"top_p": 1.01}, r"in \(0, 1\]"),
    ({"threshold": 1, "sign": "positiv"}, "unknown sign 'positiv'; did you mean 'positive'"),
    ({"threshold": 1, "aggregate": "mean"}, "unknown aggregate 'mean'"),
    ({"top_k": 1, "union": True}, "union over examples needs a threshold"),
])  # fmt: skip
def test_refusals(how, message):
    with pytest.raises(RelpError, match=message):
        select(scores(), **how)


def test_provenance_goes_with_the_circuit():
    circuit = select(scores(method="relp", model="m", revision="r", metric="logit_diff", seconds=3), top_k=2)
    assert {k: circuit.meta[k] for k in ("method", "model", "revision", "metric")} == {
        "method": "relp", "model": "m", "revision": "r", "metric": "logit_diff",
    }  # fmt: skip
    assert "seconds" not in circuit.meta
    assert circuit.meta["scores"] == tensor_hash(VALUES)
    assert select(scores(), threshold=circuit.meta["selection"]["tau"]).n_nodes == 2
    assert tensor_hash(VALUES) != tensor_hash(VALUES + 1) != tensor_hash(VALUES.T + 1)


# --- Circuit


def heads(p=0.5, seed=0, layers=4):
    mask = torch.rand(layers, 3, 5, generator=torch.Generator().manual_seed(seed)) < p
    return Circuit.from_mask("head", mask, ("a", "b", "c"))


def edited(text, layer):
    content = json.loads(text)
    content["nodes"]["head"]["layer"][0] = layer
    return json.dumps(content)


def test_files_give_the_circuit_back(tmp_path):
    mixed = node_circuit(
        {"head": heads().masks["head"], "mlp_out": torch.rand(4, 3) < 0.5}, ("a", "b", "c"), {"tau": 0.1}
    )
    mixed.save(tmp_path / "c.json")
    again = Circuit.load(tmp_path / "c.json")
    assert (again.labels, again.meta, list(again.masks)) == (mixed.labels, mixed.meta, list(mixed.masks))
    assert all(torch.equal(again.masks[k], mixed.masks[k]) for k in mixed.masks)
    empty = Circuit.from_mask("mlp_out", torch.zeros(2, 2, dtype=torch.bool))
    empty.save(tmp_path / "e.json")
    assert torch.equal(Circuit.load(tmp_path / "e.json").masks["mlp_out"], empty.masks["mlp_out"])
    select(scores(), threshold=float("inf")).save(tmp_path / "inf.json")
    assert Circuit.load(tmp_path / "inf.json").meta["selection"]["tau"] == float("inf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "e.json", "inf.json"]


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda text: text[: len(text) // 2], RelpError, "not valid JSON"),
    (lambda _: "[]", RelpError, "expected a relp circuit"),
    (lambda text: text.replace('"schema": 1', '"schema": 99'), RelpError, "expected a relp circuit"),
    (lambda text: text.replace('"head"', '"haed"', 1), RelpError, "unknown node kind 'haed'"),
    (lambda text: json.dumps(json.loads(text) | {"labels": ["a"]}), RelpError, "3 positions for 1 labels"),
    (lambda text: text.replace('"layer": [', '"layer": [9, '), RelpError, "circuit file .*head"),
    (lambda text: text.replace('"pos": [', '"positions": ['), RelpError, "circuit file .*head"),
    (lambda text: text.replace("4,\n    3,", '"four",\n    3,'), RelpError, "circuit file .*head"),
    (lambda text: edited(text, layer=-1), RelpError, "greater than or equal to 0"),
    (lambda text: edited(text, layer=1.5), RelpError, "valid integer"),
    (lambda text: edited(text, layer=4), RelpError, "head needs a shape and columns"),
    (lambda text: json.dumps(json.loads(text) | {"n_nodes": 7}), RelpError, "n_nodes says 7, but there are"),
    (lambda text: json.dumps(json.loads(text) | {"meta": []}), RelpError, "meta: Input should be a valid dictionary"),
    (lambda text: json.dumps(json.loads(text) | {"meta": {"model": [1]}}), RelpError, r"meta\.model: expected text, got \[1\]"),
])  # fmt: skip
def test_files_that_are_no_circuit(tmp_path, change, error, message):
    path = tmp_path / "c.json"
    heads().save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(error, match=message) as caught:
        Circuit.load(path)
    assert caught.value.exit_code == 2


def test_missing_file(tmp_path):
    with pytest.raises(RelpError, match="No such file"):
        Circuit.load(tmp_path / "none.json")


def test_masks_are_checked():
    for mask, message in ((torch.ones(2, 3), "boolean mask"), (torch.ones(2, 3, 4) > 0, r"\[layer, pos\]")):
        with pytest.raises(RelpError, match=message):
            Circuit.from_mask("mlp_out", mask)
    with pytest.raises(RelpError, match="2 positions for 1 labels"):
        Circuit.from_mask("mlp_out", torch.ones(2, 2) > 0, ("a",))
    assert Circuit.from_mask("mlp_out", torch.ones(2, 3) > 0).labels == ("0", "1", "2")


def test_complement_holds_the_other_nodes():
    c = heads()
    assert torch.equal(c.complement().masks["head"], ~c.masks["head"])
    assert c.n_nodes + c.complement().n_nodes == c.n_possible == 60


def test_random_circuits_have_the_same_size_and_are_uniform():
    c = heads(0.3)
    counts = torch.zeros(4, 3, 5)
    for seed in range(400):
        drawn = c.random_like(seed, from_layer=1)
        assert drawn.masks["head"][1:].sum() == c.masks["head"][1:].sum()
        assert torch.equal(drawn.masks["head"][0], c.masks["head"][0])
        counts += drawn.masks["head"]
    share = counts[1:] / 400
    expected = c.masks["head"][1:].double().mean()
    assert (share - expected).abs().max() < 5 * (expected * (1 - expected) / 400).sqrt()
    assert torch.equal(c.random_like(3).masks["head"], c.random_like(3).masks["head"])
    assert not torch.equal(c.random_like(3).masks["head"], c.random_like(4).masks["head"])
