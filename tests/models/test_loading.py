"""Loading: what a model must satisfy, what a folder must hold, and what happens without a network."""

import json
import shutil
import socket
import time
import types
from dataclasses import replace

import pytest
import torch
from oracles.make import SHAPES, exact_float64, random_model
from oracles.wrapped import case, close, pairs
from safetensors.torch import load_file, save_file

from relp_cli.errors import RelpError
from relp_cli.models.catalog import EMBEDDED, embedded_names
from relp_cli.models.checks import check_model
from relp_cli.models.families import FAMILIES, family_of
from relp_cli.models.load import load_model, wrap
from relp_cli.scoring import score
from relp_cli.tasks.encoder import Encoder

SIZES = {"gpt2": (False, False, False), "pythia": (False, True, False), "pythia-serial": (False, False, False)}
SIZES |= {"qwen2": (True, False, False), "llama": (True, False, False), "gemma2": (True, False, True)}


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_and_family_are_read_from_the_model(shape):
    model = case(shape).model
    s, kv = model.shape, 4 if shape in ("gpt2", "pythia", "pythia-serial") else 2
    assert (s.n_layers, s.d_model, s.n_heads, s.n_kv_heads, s.d_mlp, s.vocab) == (3, 32, 4, kv, 48, 50)
    assert s.d_head == (12 if shape == "gemma2" else 8)
    assert (s.gated, s.parallel, s.post_norm) == SIZES[shape]
    assert (s.attn_softcap, s.final_softcap) == ((2.0, 3.0) if shape == "gemma2" else (None, None))
    assert model.family.name == shape.partition("-")[0]
    assert model.family.rules == (("ln", "identity", "half") if s.gated else ("ln", "identity"))
    assert (model.bos, model.tokenizer) == (None, None)
    assert not model.hf.training
    assert not any(p.requires_grad for p in model.hf.parameters())


def test_unknown_types_get_the_rules_of_their_mlp():
    assert family_of("mistral", True).rules == FAMILIES["llama"].rules
    assert family_of("opt", False).rules == FAMILIES["gpt2"].rules
    assert family_of("gpt_neox", False) is FAMILIES["pythia"]


def fresh(shape="gpt2"):
    with exact_float64():
        return random_model(shape, 0)


def test_a_scaled_residual_is_refused():
    hf = fresh()
    block, inner = hf.transformer.h[1], hf.transformer.h[1].forward

    def scaled(*args, **kwargs):
        out = inner(*args, **kwargs)
        return (1.1 * out[0], *out[1:]) if isinstance(out, tuple) else 1.1 * out

    block.forward = scaled
    message = r"layer 1 does not satisfy resid_post = resid_pre \+ attn_out \+ mlp_out"
    with pytest.raises(RelpError, match=message):
        wrap(hf, None, "scaled")


@pytest.mark.parametrize(("shape", "attribute", "wrong"), [
    ("gpt2", "activation_function", "gelu"), ("pythia", "hidden_act", "relu"), ("qwen2", "hidden_act", "gelu"),
    ("gemma2", "hidden_activation", "silu"),
])  # fmt: skip
def test_an_activation_other_than_the_configured_is_refused(shape, attribute, wrong):
    hf = fresh(shape)
    setattr(hf.config, attribute, wrong)
    with pytest.raises(RelpError, match=rf"layer 0 does not satisfy MLP hidden = {wrong}"), exact_float64():
        wrap(hf, None, "other")


def test_a_layer_that_is_never_called_is_refused():
    c = case("gpt2")
    points = {**c.model.points, "blocks.2.hook_mlp_out": torch.nn.Identity()}
    with pytest.raises(RelpError, match=r"layer 2 never calls hook_mlp_out"), exact_float64():
        check_model(replace(c.model, points=points))


@pytest.fixture
def folder(tmp_path):
    """A saved GPT-2 shape without a tokenizer."""
    fresh().to(torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(name, message, **options):
    with pytest.raises(RelpError, match=message) as error:
        load_model(name, **options)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_without_a_tokenizer_loads_and_scores_token_ids(shape, tmp_path):
    fresh(shape).to(torch.float32).save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m")
    assert (model.tokenizer, model.bos, model.name, model.dtype) == (None, None, "m", torch.float32)
    assert len(model.revision) == 16
    got = score(model, [pairs()], "relp")["mlp_out"]
    want = score(case(shape, dtype=torch.float32).model, [pairs()], "relp")["mlp_out"]
    close(got.mean, want.mean, 1e-5)


def test_missing_and_mismatched_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    keys = [k for k in weights if k.endswith("h.1.mlp.c_fc.weight")]
    save_file({k: v for k, v in weights.items() if k not in keys}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"1 weights are missing or of the wrong shape \(first: .*h\.1\.mlp\.c_fc\.weight")
    other = weights | {k: torch.zeros(32, 40) for k in keys}
    save_file(other, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"cannot be loaded|wrong shape")


def test_a_cut_weights_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    refused(folder, "cannot be loaded")
    path.rename(folder / "pytorch_model.bin")
    refused(folder, "cannot be loaded")


def test_incomplete_folders_are_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    refused(folder, r"has no weights \(\*\.safetensors")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")
    refused(tmp_path / "nowhere", "does not exist")
    refused("./nowhere", "does not exist")


def test_a_tokenizer_that_cannot_be_read_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "tokenizer cannot be loaded")


def test_weights_and_config_make_the_revision(folder):
    first = load_model(folder).revision
    assert load_model(folder).revision == first
    weights = load_file(folder / "model.safetensors")
    weights[next(iter(weights))][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load_model(folder).revision != first


def test_a_hub_name_without_network_fails_fast_and_says_what_to_do(monkeypatch):
    def no_names(*_args, **_kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    started = time.perf_counter()
    message = refused("someone/some-model", "neither an embedded model nor a local folder")
    assert time.perf_counter() - started < 3
    assert "hf download someone/some-model --local-dir DIR" in message
    if embedded_names():
        assert f"did you mean '{embedded_names()[0]}'" in refused(embedded_names()[0] + "x", "neither an embedded")


def test_dtypes(folder):
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(folder, dtype=torch.float64).dtype == torch.float64
    refused(folder, "unknown dtype 'float23'; did you mean 'float32'", dtype="float23")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_list_where_a_tokenizer_belongs(tmp_path, name):
    shutil.copytree(EMBEDDED / "tiny-gpt2", tmp_path / "m")
    (tmp_path / "m" / name).write_text("[1, 2]")
    message = refused(
        tmp_path / "m", "its tokenizer cannot be loaded, tokenizer.json or tokenizer_config.json is broken"
    )
    assert "\n" not in message


def test_bos_follows_the_bridge_unless_asked():
    def model(bos, token):
        tokenizer = types.SimpleNamespace(bos_token_id=token)
        return wrap(fresh().to(torch.float32), tokenizer, "m", bos=bos).bos

    assert model(None, 7) == 7
    assert model(False, 7) is None
    assert model(None, None) is None
    with pytest.raises(RelpError, match="no BOS token; use --no-bos"):
        model(True, None)


@pytest.mark.parametrize("name", embedded_names())
def test_embedded_models_load_and_run(name):
    model = load_model(name, device="cpu")
    assert model.name == name
    assert model.tokenizer is not None
    assert sum(p.stat().st_size for p in (EMBEDDED / name).iterdir()) < 1.6e6
    words = model.tokenizer("The", add_special_tokens=False)["input_ids"]
    assert torch.isfinite(model.logits(torch.tensor([words]))).all()


@pytest.mark.parametrize(("file", "path", "value", "expected"), [
    ("config.json", ("activation_function",), -1, r"config\.json .*'activation_function': TypeError: Field .* expected str"),
    ("config.json", ("activation_function",), "x", r"config\.json or its weights are broken \(KeyError: 'x'\)"),
    ("config.json", ("layer_norm_epsilon",), -1.0, "model 'm' .*its logits are not finite even without relp"),
    ("config.json", ("n_head",), -1, "model 'm' .*cannot run even without relp, its configuration"),
    ("tokenizer_config.json", ("model_max_length",), "x", r"tokenizer\.json or tokenizer_config\.json is broken"),
    ("tokenizer_config.json", ("model_max_length",), [], r"tokenizer\.json or tokenizer_config\.json is broken"),
])  # fmt: skip
def test_a_value_of_the_wrong_kind_in_a_model_folder(tmp_path, file, path, value, expected):
    _edited(tmp_path / "m", file, path, value)
    assert "\n" not in refused(tmp_path / "m", expected)


def test_a_vocabulary_without_its_unknown_token(tmp_path):
    _edited(tmp_path / "m", "tokenizer.json", ("model", "vocab"), {})
    with pytest.raises(RelpError, match=r"the tokenizer of m cannot encode 'a', is tokenizer\.json broken"):
        Encoder(load_model(tmp_path / "m").tokenizer, "m", None).encode("a")


def _edited(folder, file, path, value):
    shutil.copytree(EMBEDDED / "tiny-gpt2", folder)
    content = json.loads((folder / file).read_text())
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (folder / file).write_text(json.dumps(content))
