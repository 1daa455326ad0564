"""Imported cases: weights in TransformerLens's layout against a plain forward pass; refusals; scores by whole heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles.wrapped import close
from safetensors.torch import save_file
from torch import Tensor

from relp_cli.evaluation.known_circuits import Question, by_heads, judge, largest
from relp_cli.known.case import read_case
from relp_cli.models.load import load_model

CONFIG = {
    "n_layers": 2, "n_heads": 4, "d_model": 12, "d_head": 3, "d_mlp": 10, "d_vocab": 7, "d_vocab_out": 4, "n_ctx": 5,
    "act_fn": "gelu", "normalization_type": None, "attention_dir": "causal", "use_attn_result": True,
}  # fmt: skip
EDGES = [["input", "a0.h1"], ["a0.h1", "m0"], ["m0", "a1.h2"], ["a1.h2", "logits"]]


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng) / 2

    d, h, e, m = (config[k] for k in ("d_model", "n_heads", "d_head", "d_mlp"))
    out = {"embed.W_E": some(config["d_vocab"], d), "pos_embed.W_pos": some(config["n_ctx"], d),
           "unembed.W_U": some(d, config["d_vocab_out"]), "unembed.b_U": some(config["d_vocab_out"])}  # fmt: skip
    for n in range(config["n_layers"]):
        parts = {f"attn.W_{p}": (h, d, e) for p in "QKV"} | {f"attn.b_{p}": (h, e) for p in "QKV"}
        parts |= {"attn.W_O": (h, e, d), "attn.b_O": (d,), "mlp.W_in": (d, m), "mlp.b_in": (m,), "mlp.W_out": (m, d),
                  "mlp.b_out": (d,)}  # fmt: skip
        out |= {f"blocks.{n}.{name}": some(*shape) for name, shape in parts.items()}
        out[f"blocks.{n}.attn.mask"] = torch.ones(5, 5)
    if config["normalization_type"] == "LN":
        for name in ["ln_final", *(f"blocks.{n}.{ln}" for n in range(config["n_layers"]) for ln in ("ln1", "ln2"))]:
            out |= {f"{name}.w": 1 + some(d) / 2, f"{name}.b": some(d)}
    return out


def forward(config: dict[str, Any], float32: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The model as TransformerLens defines it: logits [batch, pos, vocab out]."""
    w = {name: value.double() for name, value in float32.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        if config["normalization_type"] is None:
            return x
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.w"] + w[f"{name}.b"]

    x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][: tokens.shape[1]]
    for n in range(config["n_layers"]):
        at = f"blocks.{n}."
        y = norm(x, f"{at}ln1")
        for head in range(config["n_heads"]):
            q, k, v = (y @ w[f"{at}attn.W_{p}"][head] + w[f"{at}attn.b_{p}"][head] for p in "QKV")
            scores = (q @ k.mT / config["d_head"] ** 0.5).masked_fill(torch.ones(5, 5).triu(1) == 1, -torch.inf)
            x = x + scores.softmax(-1) @ v @ w[f"{at}attn.W_O"][head]
        x = x + w[f"{at}attn.b_O"]
        hidden = F.gelu(norm(x, f"{at}ln2") @ w[f"{at}mlp.W_in"] + w[f"{at}mlp.b_in"])
        x = x + hidden @ w[f"{at}mlp.W_out"] + w[f"{at}mlp.b_out"]
    return norm(x, "ln_final") @ w["unembed.W_U"] + w["unembed.b_U"]


def folder(
    at: Path, config: dict[str, Any] | None = None, edges: Any = EDGES, drop: str = "", pairs: Any = None
) -> Path:
    config = CONFIG if config is None else config
    at.mkdir()
    kept = {name: value for name, value in weights(config).items() if name != drop}
    save_file(kept, at / "model.safetensors")
    (at / "config.json").write_text(json.dumps(config))
    (at / "edges.json").write_text(json.dumps(edges))
    record = {"original_ids": [0, 1, 2, 3, 4], "patch_ids": [0, 5, 2, 6, 4], "answer_id": 1, "foil_id": 2}
    (at / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs or [record, record | {"answer_id": 0}]))
    return at


@pytest.mark.parametrize("norm", [None, "LN"])
def test_an_imported_model_computes_what_it_did(relp: Any, tmp_path: Path, norm: str | None) -> None:
    config = CONFIG | {"normalization_type": norm}
    done = relp("import", folder(tmp_path / "7", config), "-o", "case")
    assert done.code == 0, done.err
    tokens = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(1))
    want = forward(config, weights(config), tokens)
    logits = load_model(str(tmp_path / "case"), dtype="float64").logits(tokens, all_positions=True)[..., :4]
    bias = weights(config)["unembed.b_U"].double() if norm else 0.0  # GPT-2 has none behind a norm
    close(logits + bias, want, 1e-6)
    case = read_case(str(tmp_path / "case"))
    assert case.nodes == ("a0.h1", "a1.h2", "m0")
    assert "a0.h1->m0" in (case.edges or ())
    assert ("left out" in case.about) == bool(norm)


def test_edges_by_whole_heads(relp: Any, tmp_path: Path) -> None:
    names = ["input->a0.h0<q>", "input->a0.h1<q>", "input->a0.h0<v>", "input->m0"]
    parts = by_heads(names)
    assert parts == {"input->a0.h0": [0, 2], "input->a0.h1": [1], "input->m0": [3]}
    assert largest(np.array([[1.0, 2, 3, 4], [5, 0, 2, 1]]), parts).tolist() == [[3, 2, 4], [5, 0, 1]]
    assert relp("import", folder(tmp_path / "7")).code == 0
    table = judge([read_case("cases/7")], Question(("act_patch",), ("edges",), bootstrap=10))
    # input → 4 heads, m0, 4 heads, m1, logits: 11; layer 0's heads → m0 and those 6: 28; m0 → 6; 4 heads → m1, logits: 8; m1: 1
    assert table.n_units[0] == 11 + 28 + 6 + 8 + 1
    assert table.n_circuit[0] == 4


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"config": CONFIG | {"attention_dir": "bidirectional"}}, "attention_dir: expected causal, got bidirectional"),
        ({"config": CONFIG | {"act_fn": "solu"}}, "unknown act_fn 'solu'"),
        ({"config": CONFIG | {"normalization_type": "RMS"}}, "unknown normalization_type 'RMS'"),
        ({"config": CONFIG | {"normalization_type": "LN", "d_head": 4}}, "expected n_heads · d_head = d_model"),
        ({"config": CONFIG | {"d_vocab_out": 1}}, "d_vocab_out is 1"),
        ({"config": {k: v for k, v in CONFIG.items() if k != "n_layers"}, "drop": ""}, "n_layers: Field required"),
        ({"drop": "blocks.1.mlp.W_in"}, "weight 'blocks.1.mlp.W_in' is missing"),
        ({"edges": [["input", "a0.h9"]]}, "unknown reader 'a0.h9'"),
        ({"edges": [["inptu", "m0"]]}, "unknown writer 'inptu'; did you mean 'input'"),
        ({"edges": [["input", "a0.h1"], ["input", "a0.h2<q>"]]}, "some heads read as a whole"),
        ({"edges": {}}, "expected a list of [writer, reader] pairs"),
        ({"pairs": [{"original": "a", "patch": "b", "answer": "c", "foil": "d"}]}, "expected token ids"),
        ({"pairs": [{"original_ids": [0], "patch_ids": [1], "answer_id": 1, "foil_id": 4}]}, "from 0 to 3"),
        (
            {"pairs": [{"original_ids": [0, 1], "patch_ids": [1], "answer_id": 1, "foil_id": 2}]},
            "as many ids each, at most 5",
        ),
        ({"pairs": [{"original_ids": [0], "patch_ids": [7], "answer_id": 1, "foil_id": 2}]}, "at most 5, from 0 to 6"),
    ],
)
def test_bad_folders(relp: Any, tmp_path: Path, made: dict[str, Any], said: str) -> None:
    config = made.get("config", CONFIG)
    at = folder(
        tmp_path / "bad",
        CONFIG if "n_layers" not in config else config,
        **{k: v for k, v in made.items() if k != "config"},
    )
    (at / "config.json").write_text(json.dumps(config))
    done = relp("import", at, "-o", "case")
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "case").exists()


def test_nothing_is_overwritten_or_passed_over(relp: Any, tmp_path: Path) -> None:
    at = folder(tmp_path / "7")
    assert relp("import", at, "-o", "7").code == 2
    assert "--model is for circuits" in relp("import", at, "--model", "tiny-gpt2").err
    (at / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be read as safetensors" in relp("import", at, "-o", "case").err
    save_file({**weights(CONFIG), "blocks.0.attn.W_X": torch.ones(1)}, at / "model.safetensors")
    assert "1 weights have no place in GPT-2 (first: blocks.0.attn.W_X)" in relp("import", at, "-o", "case").err
