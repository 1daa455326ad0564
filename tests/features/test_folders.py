"""A dictionary's settings and its tensors say the same, or it is refused by name; half precisions are up-cast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.wrapped import case, close

from relp_cli.errors import RelpError
from relp_cli.evaluation.evaluate import evaluate
from relp_cli.features.load import load_dictionaries
from relp_cli.spaces.features import feature_circuit
from relp_cli.spaces.sites import Site

from .folders import auto_encoder_state, write_learning, write_lens
from .formulas import LEARNING, LENS, K, auto_encoder, rand

MODEL = case("pythia").model


def refused(folder: Path) -> str:
    with pytest.raises(RelpError) as error:
        load_dictionaries(folder, MODEL)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def learning(folder: Path, name: str, buffer: Any = None, **trainer: Any) -> Path:
    write_learning(folder / "resid_out_layer1", LEARNING[name][0], None)
    content = {"trainer": {"dict_class": name, **trainer}, "buffer": buffer}
    (folder / "resid_out_layer1/config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_dim": 64}, "activation_dim is 64, but the tensors beside it have 32"),
        ({"dict_size": 41}, "dict_size is 41, but the tensors beside it have 40"),
        ({"k": K + 1}, f"k is {K + 1}, but the tensors beside it have {K}"),
        ({"buffer": {"d_submodule": 512}}, "d_submodule is 512, but the tensors beside it have 32"),
        ({"buffer": {"io": "in_and_out"}}, "buffer.io 'in_and_out' is not supported"),
        ({"submodule_name": "resid_post_layer_0"}, "resid_out_layer1, config.json says resid_out_layer0"),
        ({"submodule_name": "resid_post_layer_1", "layer": 2}, "'resid_post_layer_1' and layer 2 disagree"),
        ({"dict_size": [40]}, "trainer.dict_size: Input should be a valid integer"),
        ({"buffer": [1]}, "buffer: Input should be a valid dictionary"),
    ],
)
def test_dictionary_learning_settings(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    assert message in refused(learning(tmp_path, "AutoEncoderTopK", **config))


def test_settings_that_agree(tmp_path: Path) -> None:
    said = {"activation_dim": 32, "dict_size": 40, "k": K, "submodule_name": "resid_post_layer_1", "layer": 1}
    found = load_dictionaries(learning(tmp_path, "AutoEncoderTopK", **said, lm_name="EleutherAI/other"), MODEL)
    assert list(found) == [Site("resid", 1)]
    assert found.model == "EleutherAI/other"
    (tmp_path / "resid_out_layer1").rename(tmp_path / "trainer_0")  # the settings say the site
    assert list(load_dictionaries(tmp_path, MODEL)) == [Site("resid", 1)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_in": 64}, "d_in is 64, but the tensors beside it have 32"),
        ({"d_sae": 39}, "d_sae is 39, but the tensors beside it have 40"),
        ({"d_in": "32"}, "d_in: Input should be a valid integer"),
        ({"metadata": {"hook_name": "blocks.1.hook_mlp_out", "hook_layer": 0}}, "and hook_layer 0 disagree"),
        ({"metadata": []}, "metadata: Input should be"),
        ({"activation_fn": "topk", "architecture": "jumprelu"}, "'topk' is not supported for architecture jumprelu"),
        ({"activation_fn_kwargs": {"postact_fn": "Identity"}}, "activation_fn_kwargs.postact_fn is not supported"),
    ],
)
def test_saelens_settings(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    assert message in refused(write_lens(tmp_path / "any", {**LENS["standard"][0], **config}, LENS["standard"][1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_enc": rand(40, 32).mT.contiguous().mul(9).int()}, "W_enc is int32; expected float16"),
        ({"W_dec": rand(40, 32).to(torch.float8_e4m3fn)}, "W_dec is float8_e4m3fn; expected float16"),
        ({"W_enc": rand(40, 32)}, "W_enc has shape [40, 32], site mlp_out_layer1"),
        ({"b_enc": torch.full((40,), -torch.inf)}, "b_enc holds values that are not finite"),
        ({"W_skip": rand(32, 32)}, "has 'W_skip', which a standard SAE does not have"),
        ({"b_enc": rand(39)}, "b_enc has shape [39]"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: dict[str, torch.Tensor], message: str) -> None:
    config, state = LENS["standard"]
    assert message in refused(write_lens(tmp_path / "any", config, {**state, **change}))


def test_a_scaling_of_another_type(tmp_path: Path) -> None:
    config, state = LENS["topk scaled"]
    assert "scaling_factor: Input should be" in refused(write_lens(tmp_path / "any", {**config, "scale": [2]}, state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_up_cast_and_recorded(tmp_path: Path, dtype: torch.dtype) -> None:
    """Features are computed from the stored numbers in the model's precision, in float32 where that is narrower."""
    state = {name: value.to(dtype) for name, value in auto_encoder_state(32, 40, 0).items()}
    write_learning(tmp_path / "embed", state, "AutoEncoder")
    found = load_dictionaries(tmp_path, MODEL)
    assert found.stored == str(dtype).removeprefix("torch.")
    x = rand(3, 7, 32, seed=4)
    d = found[Site("embed", -1)]
    close(d.encode(x), auto_encoder({k: v.double() for k, v in state.items()}, x)[0], 1e-12)
    narrow = d.to(x.device, dtype)
    assert narrow.w_dec.dtype == torch.float32
    features, error = narrow.split(x.to(dtype))
    assert features.dtype == error.dtype == torch.float32
    torch.testing.assert_close(narrow.decode(features) + error, x.to(dtype).float())


def test_what_is_being_written_and_what_lies_beside_do_not_count(tmp_path: Path) -> None:
    config, state = LENS["standard"]
    write_lens(tmp_path / "a", config, state)
    before = load_dictionaries(tmp_path, MODEL).digest
    write_lens(tmp_path / ".a.partial", config, state)
    (tmp_path / "a/.cfg.json.x1").write_text("left by a run that was killed")
    assert load_dictionaries(tmp_path, MODEL).digest == before
    (tmp_path / "a/cfg.json").unlink()
    assert "cfg.json cannot be read: No such file" in refused(tmp_path)


def test_a_corpus_is_not_passed_over_by_feature_circuits() -> None:
    site = Site("mlp", 1)
    circuit = feature_circuit({site: torch.ones(1, 40).bool()}, {site: torch.ones(1).bool()}, ("*",))
    with pytest.raises(RelpError, match="only circuits of nodes are ablated with a corpus"):
        evaluate(MODEL, [case("pythia").batch], circuit, corpus=Path("corpus.txt"))
