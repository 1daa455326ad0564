"""Every loader reproduces, on random weights, the formula of its class; what does not fit is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles.wrapped import case, close
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.features.dictionary import Dictionary
from relp_cli.features.load import Dictionaries, load_dictionaries
from relp_cli.features.saelens import save_saelens
from relp_cli.spaces.sites import Site, all_sites, parse_site

from .folders import auto_encoder_state, write_all_sites, write_learning, write_lens
from .formulas import D_IN, LEARNING, LENS, lens, rand

X = rand(3, 7, D_IN, seed=20, scale=1.0)
MODEL = case("pythia").model


def only(found: Dictionaries):
    (loaded,) = found.values()
    return loaded


def same_units(d: Dictionary, formula: Callable[[Tensor], Tensor]) -> None:
    """`encode(x, units)` is those columns, with the formula's own gradient."""
    units, grads = [3, 0, 17], []
    for encode in (lambda x: d.encode(x, units), lambda x: d.encode(x)[..., units], lambda x: formula(x)[..., units]):
        x = X.clone().requires_grad_()
        close(encode(x), formula(X)[..., units], 1e-12)
        grads.append(torch.autograd.grad(encode(x).square().sum(), x)[0])
    assert grads[0].abs().max() > 0
    close(grads[0], grads[2], 1e-12)
    close(grads[1], grads[2], 1e-12)


def test_a_negative_threshold_is_a_relu() -> None:
    """relu(pre) · [pre > threshold], as both packages have it: nothing negative is ever active."""
    w, b = rand(D_IN, 9, seed=1), rand(9, seed=2)
    zero = torch.zeros(D_IN, dtype=torch.float64)
    d = Dictionary("jumprelu", "", w, b, w.T, zero, zero, threshold=torch.full((9,), -0.5, dtype=torch.float64))
    close(d.encode(X), (X @ w + b).clamp(min=0), 1e-12)


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("below", ["", "10_40"])
def test_dictionary_learning(tmp_path: Path, name: str, below: str) -> None:
    state, formula = LEARNING[name]
    write_learning(tmp_path / "resid_out_layer1" / below, state, name)
    found = load_dictionaries(tmp_path, MODEL)
    assert list(found) == [Site("resid", 1)]
    f, decoded = formula(state, X)
    assert 0 < (f > 0).double().mean() < 1
    loaded = only(found)
    close(loaded.encode(X), f, 1e-12)
    close(loaded.decode(loaded.encode(X)), decoded, 1e-12)
    features, error = loaded.split(X)
    close(loaded.decode(features) + error, X, 1e-12)
    same_units(loaded, lambda x: formula(state, x)[0])


@pytest.mark.parametrize(
    "name", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"]
)
def test_class_follows_from_the_tensors(tmp_path: Path, name: str) -> None:
    write_learning(tmp_path / "embed", LEARNING[name][0], None)
    assert only(load_dictionaries(tmp_path, MODEL)).label == name


@pytest.mark.parametrize("name", LENS)
def test_saelens(tmp_path: Path, name: str) -> None:
    config, state = LENS[name]
    write_lens(tmp_path / "any name", config, state)
    found = load_dictionaries(tmp_path, MODEL)
    assert list(found) == [Site("mlp", 1)]
    f, decoded = lens(config, state, X)
    assert 0 < (f > 0).double().mean() < 1
    close(only(found).encode(X), f, 1e-12)
    close(only(found).decode(f), decoded, 1e-12)
    same_units(only(found), lambda x: lens(config, state, x)[0])


def test_older_saelens_configurations(tmp_path: Path) -> None:
    config = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "normalize_activations": False,
              "hook_point": "blocks.1.hook_resid_pre", "metadata": None}  # fmt: skip
    write_lens(tmp_path / "sae", config, LENS["topk"][1])
    found = load_dictionaries(tmp_path / "sae", MODEL)
    assert list(found) == [Site("resid", 0)]
    close(only(found).encode(X), lens(*LENS["topk"], X)[0], 1e-12)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "temporal"}, "unknown SAE architecture 'temporal'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm' is not supported"),
        ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale' is not supported"),
        ({"normalize_activations": "expected_average_only_in"}, "activation_scaler.json"),
        ({"metadata": {"hook_name": "blocks.0.attn.hook_z"}}, "hook 'blocks.0.attn.hook_z' is no supported site"),
        ({"hook_head_index": 2}, "hook_head_index"),
        ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z'"),
        ({"hook_name_out": "blocks.1.hook_resid_post"}, "transcoders are not supported"),
        ({"activation_fn": "tanh-relu"}, "activation 'tanh-relu' is not supported"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor is not supported"),
        ({"architecture": "topk"}, "needs a whole number k"),
        ({"architecture": "gated"}, "needs the tensor 'b_gate'"),
        ({"metadata": {"hook_name": "blocks.7.hook_mlp_out"}}, "has 3 layers"),
    ],
)  # fmt: skip
def test_saelens_refusals(tmp_path: Path, config: dict[str, object], message: str) -> None:
    write_lens(tmp_path / "sae", {"architecture": "standard", **config}, LENS["standard"][1])
    with pytest.raises(RelpError) as error:
        load_dictionaries(tmp_path, MODEL)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_refusals(tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(RelpError, match=message):
            load_dictionaries(folder, MODEL)

    refused(tmp_path / "nowhere", "neither a folder nor shipped")
    refused(tmp_path, "no folder in it has ae.pt")
    ambiguous = write_learning(tmp_path / "a" / "embed", LEARNING["BatchTopKSAE"][0], None)
    refused(ambiguous, "fit AutoEncoderTopK or BatchTopKSAE; config.json must name")
    refused(
        write_learning(tmp_path / "b" / "embed", LEARNING["AutoEncoder"][0], "GatedAutoEncoder"),
        "misses 'decoder_bias'",
    )
    refused(
        write_learning(tmp_path / "c" / "embed", LEARNING["AutoEncoder"][0], "IdentityDict"), "unknown dictionary class"
    )
    refused(
        write_learning(tmp_path / "d" / "embed", auto_encoder_state(16, 40, 0), None),
        r"needs \[32, 40\] \(d_model 32\)",
    )
    refused(write_learning(tmp_path / "e" / "sae", auto_encoder_state(32, 40, 0), None), "for which site")
    (tmp_path / "f" / "embed").mkdir(parents=True)
    (tmp_path / "f" / "embed" / "ae.pt").write_bytes(b"nothing")
    refused(tmp_path / "f", "not a state dict of tensors saved by torch")
    write_learning(tmp_path / "g" / "embed" / "one", auto_encoder_state(32, 40, 0), None)
    write_learning(tmp_path / "g" / "embed" / "two", auto_encoder_state(32, 40, 0), None)
    refused(tmp_path / "g", "both for site embed")
    write_lens(tmp_path / "h" / "resid_out_layer0", *LENS["standard"])
    refused(tmp_path / "h", "the folder's name says site resid_out_layer0, cfg.json says mlp_out_layer1")


def test_position_embeddings_have_no_embed_site(tmp_path: Path) -> None:
    write_learning(tmp_path / "embed", auto_encoder_state(32, 40, 0), None)
    with pytest.raises(RelpError, match="adds position embeddings"):
        load_dictionaries(tmp_path, case("gpt2").model)


def test_all_sites_in_the_order_of_a_forward_pass(tmp_path: Path) -> None:
    found = load_dictionaries(write_all_sites(tmp_path / "pythia-70m-deduped", 3, 32, 40), MODEL)
    assert tuple(found) == all_sites(MODEL)
    assert [s.name for s in found][:4] == ["embed", "attn_out_layer0", "mlp_out_layer0", "resid_out_layer0"]
    for site in found:
        assert parse_site(site.name) == site == parse_site(site.hook)
    assert parse_site("attn_3") == Site("attn", 3)


def test_saved_dictionaries_load_again(tmp_path: Path) -> None:
    write_lens(tmp_path / "a", *LENS["topk"])
    first = only(load_dictionaries(tmp_path / "a", MODEL))
    save_saelens(tmp_path / "b" / "mlp_out_layer1", first, Site("mlp", 1).hook, "pythia", {"l0": 5.0})
    again = load_dictionaries(tmp_path / "b", MODEL)
    assert list(again) == [Site("mlp", 1)]
    torch.testing.assert_close(only(again).w_dec, first.w_dec, rtol=1e-3, atol=1e-3)
    assert only(again).k == 5


def test_shipped_dictionaries_say_that_they_are_of_the_shipped_model():
    """Their configuration and their card name its content; a copy that names another one is told of."""
    from relp_cli.features.load import SHIPPED, load_dictionaries
    from relp_cli.models.load import load_model

    model = load_model("tiny-pythia")
    assert load_dictionaries("tiny-pythia", model).model is None
    card = json.loads((SHIPPED / "tiny-pythia" / "card.json").read_text())
    assert card["revision"] == model.revision
