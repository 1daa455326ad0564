"""Device maps: weights that are fetched for each call, and the numbers of the plain model, to the bit."""

import gc
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from oracles.make import random_model
from oracles.wrapped import pairs
from transformers import AutoModelForCausalLM

import relp_cli as relp
from relp_cli.errors import RelpError
from relp_cli.models import offload
from relp_cli.models.catalog import EMBEDDED
from relp_cli.models.load import load_model
from relp_cli.models.placement import arguments, placed
from relp_cli.scoring import score

COMPONENTS = ("resid_pre", "attn_out", "mlp_out", "head", "mlp_neuron")
SCORINGS = [
    ("atp", COMPONENTS), ("relp", COMPONENTS), ("relp+epsilon", ("mlp_out",)), ("relp+secant", ("mlp_neuron",)),
    ("eap", ("edges",)), ("relp_edges", ("edges",)), ("act_patch", ("attn_out",)),
]  # fmt: skip


@cache
def plain(name, task="ioi"):
    model = load_model(name)
    return model, relp.load_task(task).pairs(model, n=2)


def scored(model, batches, scorings=SCORINGS):
    return {
        (method, kind): score(model, batches, method, kinds)[kind].mean for method, kinds in scorings for kind in kinds
    }


def same(got, want):
    for key, value in want.items():
        assert value.abs().max() > 1e-5, f"{key}: a vacuous comparison"
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-gpt2"])  # queries, keys and values apart, and in one matrix
def test_offload_gives_every_methods_numbers_to_the_bit(name):
    model, batches = plain(name)
    away = load_model(name, device_map="offload")
    assert (away.fetches, model.fetches, away.revision) == (True, False, model.revision)
    matrices = {key for key, value in model.hf.named_parameters() if "mlp" in key and value.ndim == 2}
    assert len(matrices) >= 8
    assert {key for key, value in away.hf.named_parameters() if value.is_meta} >= matrices
    same(scored(away, batches), scored(model, batches))


def test_no_graph_holds_fetched_weights():
    model, batches = plain("tiny-qwen2")
    away = load_model("tiny-qwen2", device_map="offload")
    gc.collect()
    most, fetch = [0], offload.Fetched.fetch

    def counted(self, name):
        value = fetch(self, name)
        most[0] = max(most[0], len(offload._there))
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload.Fetched, "fetch", counted)
        kinds = [("relp", ("mlp_neuron",)), ("eap", ("edges",))]
        same(scored(away, batches, kinds), scored(model, batches, kinds))
    assert 1 <= most[0] <= 6, "queries', keys' and values' weights and biases, of one layer; not of all"
    assert not offload._there


def placing(n_layers):
    """Every second block of a Llama-like model on the disk."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return places | {f"model.layers.{n}": ("cpu", "disk")[n % 2] for n in range(n_layers)}


def test_places_module_by_module_mix_and_match():
    model, batches = plain("tiny-gemma2", "sva_simple")
    places = placing(model.shape.n_layers)
    mixed = load_model("tiny-gemma2", device_map=places)
    assert mixed.device_map == f"cpu: {4 + model.shape.n_layers // 2}, disk: {model.shape.n_layers // 2}"
    assert {k.split(".")[2] for k, v in mixed.hf.named_parameters() if v.is_meta} == {"1", "3"}
    kinds = [("relp", COMPONENTS), ("relp+secant", ("mlp_out",)), ("relp_edges", ("edges",))]
    same(scored(mixed, batches, kinds), scored(model, batches, kinds))
    with pytest.raises(RelpError, match=r"no module 'model.layer.1'; did you mean 'model.layers.1'\?"):
        load_model("tiny-gemma2", device_map=places | {"model.layer.1": "disk"})


def test_values_that_hooks_see_on_one_device_stay_on_the_way_of_the_gradient(monkeypatch):
    """Several devices cannot be had here; a move to the model's one is a copy, as it would be between two."""
    model, batches = plain("tiny-gemma2", "sva_simple")
    kinds = [("relp", COMPONENTS), ("relp_edges", ("edges",)), ("act_patch", ("attn_out",))]
    want, to = scored(model, batches, kinds), torch.Tensor.to

    def moved(value, *args, **kwargs):
        return value.clone() if args == (model.device,) else to(value, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", moved)
    for key, got in scored(replace(model, spread=True), batches, kinds).items():
        assert (got - want[key]).abs().max() <= 2e-6 * want[key].abs().max(), key  # gradients add up in another order


def test_where_everything_fits_auto_and_balanced_are_the_plain_model():
    model, batches = plain("tiny-qwen2")
    for name in ("auto", "balanced"):
        by_map = load_model("tiny-qwen2", device_map=name)
        assert (by_map.device_map, by_map.fetches, by_map.spread) == (name, False, False)
        same(scored(by_map, batches, SCORINGS[:1]), scored(model, batches, SCORINGS[:1]))
        assert score(by_map, batches, "atp", ["mlp_out"]).meta["device_map"] == name


def test_experts_are_fetched_too(tmp_path):
    hf = random_model("mixtral", 0).float()
    hf.save_pretrained(tmp_path)
    model, away = load_model(tmp_path), load_model(tmp_path, device_map="offload")
    assert any("experts" in key and value.is_meta for key, value in away.hf.named_parameters())
    kinds = [("atp", ("mlp_out", "head")), ("relp", ("resid_pre", "mlp_out")), ("act_patch", ("mlp_out",))]
    same(scored(away, [pairs()], kinds), scored(model, [pairs()], kinds))


def test_a_model_that_others_placed_is_taken_as_it_is(tmp_path):
    model, batches = plain("tiny-qwen2")
    places = placing(model.shape.n_layers)

    def placed_model():
        return AutoModelForCausalLM.from_pretrained(
            EMBEDDED / "tiny-qwen2", dtype=torch.float32, device_map=places, offload_folder=str(tmp_path)
        )

    taken = load_model(placed_model(), tokenizer=model.tokenizer)
    assert (taken.device_map, taken.fetches) == ("cpu: 6, disk: 2", True)
    assert taken.revision == load_model(loaded()).revision, "the weights' hash is of the weights, wherever they are"
    same(scored(taken, batches, SCORINGS[:2]), scored(model, batches, SCORINGS[:2]))
    with pytest.raises(
        RelpError, match="device= cannot move model 'tiny-qwen2', whose modules a device map has placed"
    ):
        load_model(placed_model(), device="cpu")


def loaded():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny-qwen2", dtype=torch.float32)


def test_what_cannot_be_is_one_line():
    with pytest.raises(RelpError, match="device= and device_map= both say where the model is: give one of them"):
        load_model("tiny-gpt2", device="cpu", device_map="auto")
    with pytest.raises(RelpError, match=r"unknown device map 'ballanced'; did you mean 'balanced'\?"):
        load_model("tiny-gpt2", device_map="ballanced")
    with pytest.raises(RelpError, match="device_map= goes with a name: a model that is in memory is where it is"):
        load_model(object(), device_map="offload")
    with pytest.raises(RelpError, match="--device cuda and --device-map auto both say where the model is"):
        placed("cuda", "auto")
    assert [arguments(placed(None, p)) for p in ("offload", None)] == [{"device_map": "offload"}, {"device": None}]


def test_a_run_records_the_map_and_keeps_its_hash(relp):
    assert relp("score", "ioi", "--device-map", "ofload").err.endswith("did you mean 'offload'?\n")
    both = relp("score", "ioi", "--device", "cpu", "--device-map", "offload")
    assert (both.code, both.err.count("\n")) == (2, 1)
    assert "both say where the model is" in both.err
    away = ("--device-map", "offload")
    for name, how in (("plain", ()), ("away", away), ("half", (*away, "--dtype", "bfloat16"))):
        assert relp("score", "ioi", "--pairs", 2, "-o", name, *how).code == 0
    records = {name: json.loads(Path(name, "run.json").read_text()) for name in ("plain", "away", "half")}
    assert records["plain"]["hash"] == records["away"]["hash"] != records["half"]["hash"]
    assert "device_map" not in records["plain"]["scores"]
    for name, dtype in (("away", "float32"), ("half", "bfloat16")):
        assert (records[name]["scores"]["device_map"], records[name]["scores"]["dtype"]) == ("offload", dtype)
    assert "already done" in relp("score", "ioi", "--pairs", 2, "-o", "away").err
    done = relp("compare", "half", "plain", "--reference", "relp", "--json")
    rows = {row["kind"]: row for row in json.loads(done.out)["rows"]}
    assert set(rows) == {"resid_pre", "attn_out", "mlp_out"}
    for row in rows.values():
        assert (row["method"], row["reference"]) == ("relp bfloat16", "relp float32")
        assert 0.999 < row["pcc"] < 1
