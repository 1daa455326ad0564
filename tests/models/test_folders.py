"""What lies in a model folder is honoured or refused, never passed over and never run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from relp_cli.errors import RelpError
from relp_cli.models import folder as folders
from relp_cli.models.catalog import EMBEDDED
from relp_cli.models.folder import content_hash, split_revision
from relp_cli.models.load import load_model
from relp_cli.scoring import score
from relp_cli.tasks.pairs import PairBatch


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED / "tiny-gpt2", tmp_path / "mine"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fewer_layers(at: Path) -> None:
    edit(at / "config.json", n_layer=2)


def adapter(at: Path) -> None:
    (at / "adapter_config.json").write_text("{}")


def quantised(at: Path) -> None:
    edit(at / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def integers(at: Path) -> None:
    weights = load_file(at / "model.safetensors")
    name = next(k for k in weights if k.endswith("mlp.c_fc.weight"))
    save_file({**weights, name: weights[name].to(torch.int8)}, at / "model.safetensors", metadata={"format": "pt"})


def a_list(at: Path) -> None:
    (at / "config.json").write_text("[1, 2]")


@pytest.mark.parametrize(("change", "message"), [
    (fewer_layers, r"\d+ weights of its files have no place in the model that config.json describes \(first: .*h\.2\."),
    (adapter, r"holds an adapter .*merge it"), (quantised, r"weights are quantised \(gptq\)"),
    (integers, r"weight '.*mlp.c_fc.weight' is I8, expected floating point"), (a_list, "expected a JSON object, got list"),
])  # fmt: skip
def test_what_would_be_passed_over_is_refused(tiny: Path, change: Callable[[Path], None], message: str) -> None:
    change(tiny)
    with pytest.raises(RelpError, match=message) as refusal:
        load_model(tiny)
    assert "mine" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("known", [False, True])
def test_code_in_a_folder_is_never_run_nor_asked_about(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    trace = tmp_path / "was-run"
    (tiny / "planted.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nclass C: pass\nclass M: pass\nclass T: pass\n"
    )
    (tiny / "configuration_planted.py").write_text((tiny / "planted.py").read_text())
    edit(tiny / "config.json", auto_map={"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"})
    if not known:
        edit(tiny / "config.json", model_type="planted")
    edit(tiny / "tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.T", None]})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    if known:  # an architecture that Transformers has itself: its own code is used
        load_model(tiny)
    else:
        with pytest.raises(RelpError, match=r"brings its own code .*never run"):
            load_model(tiny)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"])
def test_the_hash_is_of_everything_that_determines_a_number(tiny: Path, name: str) -> None:
    before = content_hash(tiny)
    with (tiny / name).open("ab") as stream:
        stream.write(b" ")
    assert content_hash(tiny) != before
    (tiny / "README.md").write_text("words")
    assert content_hash(tiny) != before


def test_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_revision("gpt2@main", None) == ("gpt2", "main")
    assert split_revision("gpt2", "v1") == ("gpt2", "v1")
    monkeypatch.chdir(tmp_path)
    Path("a@b").mkdir()
    assert split_revision("a@b", None) == ("a@b", None)
    for name, revision in (("gpt2@", None), ("@main", None), ("gpt2@one", "two")):
        with pytest.raises(RelpError, match="expected NAME or NAME@REVISION"):
            split_revision(name, revision)
    with pytest.raises(RelpError, match="only models of the hub have revisions"):
        load_model("tiny-gpt2", revision="main")


def test_gguf_files_need_their_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    monkeypatch.setattr(folders, "find_spec", lambda _: None)
    with pytest.raises(RelpError, match=r"pip install 'relp-cli\[gguf\]'"):
        load_model(file)
    with pytest.raises(RelpError, match=r"model file .*other\.gguf' does not exist"):
        load_model(tmp_path / "other.gguf")


def test_another_default_dtype_changes_nothing() -> None:
    model = load_model("tiny-gpt2")
    pairs = [PairBatch(torch.tensor([[1, 5, 9, 4]]), torch.tensor([[1, 6, 9, 4]]), [3], [8])]
    want = {k: score(model, pairs, "relp", ["head", "mlp_out"])[k].mean for k in ("head", "mlp_out")}
    edges = score(model, pairs, "eap", ["edges"])["edges"].mean
    torch.set_default_dtype(torch.float64)
    try:
        for kind, mean in want.items():
            assert torch.equal(score(model, pairs, "relp", ["head", "mlp_out"])[kind].mean, mean)
        assert torch.equal(score(load_model("tiny-gpt2"), pairs, "eap", ["edges"])["edges"].mean, edges)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "sentencepiece.bpe.model", "tokenizer.model", "merges.txt"]
)
def test_what_decides_a_number_is_in_the_hash(tmp_path, name):
    """The index of sharded weights says which file a weight is read from; tokenizers have files of many names."""
    (tmp_path / "config.json").write_text("{}")
    seen = {content_hash(tmp_path)}
    for text in ("one", "two"):
        (tmp_path / name).write_text(text)
        seen.add(content_hash(tmp_path))
    assert len(seen) == 3
