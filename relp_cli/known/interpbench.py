"""InterpBench cases (Gupta et al. 2024) that their user has turned into safetensors and JSON; nothing is ever unpickled.

A folder with
model.safetensors  the state of a TransformerLens model, by its names (`blocks.0.attn.W_Q`)
config.json        its configuration (n_layers, n_heads, d_model, d_head, d_mlp, d_vocab, n_ctx, act_fn, normalization_type, …)
edges.json         the circuit: [writer, reader] pairs of `input`, `a0.h1`, `m0`, `logits`. A head that reads is named as a whole:
                   their models are trained by heads, and what q, k and v do of a head's part is not known
pairs.jsonl        pairs of token ids (`original_ids`, `patch_ids`, `answer_id`, `foil_id`), read at the last position
becomes a GPT-2. Where the model has no norms, as most of theirs, GPT-2's are made linear by dimensions of a large constant
(`compile`).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from relp_cli.errors import RelpError, RunFailed, unknown
from relp_cli.files import read_json, read_object
from relp_cli.known.case import Case, write_case
from relp_cli.known.compile import LEVEL
from relp_cli.known.make import save_model
from relp_cli.known.program import INPUT, LOGITS, Pair, node_of
from relp_cli.spaces.graph import Graph
from relp_cli.tasks.files import read_pairs

LEVELS = (LEVEL, -LEVEL, LEVEL, -LEVEL)  # where there are no norms: dimensions behind the model's own, and a balance
NORMS = (None, "LN", "LNPre")
ACTIVATIONS = ("gelu", "gelu_new", "relu")
IGNORED = re.compile(r"\.(mask|IGNORE)$")  # buffers


class _Config(BaseModel):
    """What is read of a TransformerLens configuration. Its other keys are of no consequence here, but those of `REFUSED`."""

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    d_vocab_out: int = -1
    act_fn: str = "gelu"
    normalization_type: str | None = None
    eps: float = 1e-5


# Key → the values that change nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "attention_dir": ("causal",), "positional_embedding_type": ("standard",), "parallel_attn_mlp": (False,),
    "attn_only": (False,), "use_local_attn": (False,), "gated_mlp": (False,), "final_rms": (False,),
    "post_embedding_ln": (False,), "scale_attn_by_inverse_layer_idx": (False,), "use_attn_scale": (True,),
    "use_normalization_before_and_after": (False,),
    "attn_scores_soft_cap": (-1, -1.0, None), "output_logits_soft_cap": (-1, -1.0, None),
}  # fmt: skip


def import_case(folder: Path, out: Path) -> Case:
    """Reads such a folder and writes the case `out`, which must not exist yet.

    Raises: RelpError for a file that is missing or not as described, and for a model that GPT-2 cannot be.
    """
    if out.exists():
        raise RelpError(f"cannot write the case {out}: it exists already")
    config = _read_config(folder / "config.json")
    edges = _read_edges(folder / "edges.json", Graph(config.n_layers, config.n_heads))
    pairs = _read_pairs(folder / "pairs.jsonl", config)
    model = _gpt2(config, _read_weights(folder / "model.safetensors"), folder / "model.safetensors")
    about = f"InterpBench case {folder.resolve().name}"
    if config.normalization_type:
        about += "; its output bias, the same in every run, is left out"
    nodes = {name for edge in edges for name in map(node_of, edge.split("->"))} - {INPUT, LOGITS}
    case = Case(
        folder.resolve().name, "imported", about, f"imported from {folder}",
        tuple(sorted(nodes)), tuple(sorted(edges)), "logit_diff", out,
    )  # fmt: skip
    try:
        save_model(model, out)
        write_case(case, pairs)
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise RunFailed(f"writing {out} failed: {error.strerror or error}") from error
    return case


def _read_config(path: Path) -> _Config:
    content = read_object(path, "TransformerLens configuration")
    for key, good in REFUSED.items():
        if key in content and content[key] not in good:
            raise RelpError(f"{path}: {key}: expected {good[0]}, got {content[key]}: GPT-2 has no such thing")
    try:
        config = _Config(**content)
    except ValidationError as error:
        first = error.errors()[0]
        raise RelpError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if config.act_fn not in ACTIVATIONS:
        raise unknown("act_fn", config.act_fn, ACTIVATIONS, f"{path}: ")
    if config.normalization_type not in NORMS:
        raise unknown("normalization_type", str(config.normalization_type), map(str, NORMS), f"{path}: ")
    if config.normalization_type and config.n_heads * config.d_head != config.d_model:
        raise RelpError(
            f"{path}: with norms, expected n_heads · d_head = d_model, got {config.n_heads} · {config.d_head}"
        )
    if config.d_vocab_out == 1:
        raise RelpError(f"{path}: d_vocab_out is 1: an output that is one number has no logit difference")
    return config


def _read_edges(path: Path, graph: Graph) -> tuple[str, ...]:
    """`writer->reader`, heads as readers whole or by q, k and v, but not some this and some that way."""
    content = read_json(path, "edges")
    if not isinstance(content, list) or not content or not all(isinstance(e, list) and len(e) == 2 for e in content):
        raise RelpError(f"{path}: expected a list of [writer, reader] pairs")
    readers = {*graph.readers, *map(node_of, graph.readers)}
    edges = []
    for number, (writer, reader) in enumerate(content):
        if str(writer) not in graph.writers:
            raise unknown("writer", str(writer), graph.writers, f"{path}: edge {number}: ")
        if str(reader) not in readers:
            raise unknown("reader", str(reader), readers, f"{path}: edge {number}: ")
        edges.append(f"{writer}->{reader}")
    if len({"<" in edge for edge in edges if "->a" in edge}) > 1:
        raise RelpError(f"{path}: some heads read as a whole and some by q, k or v; expected one or the other")
    return tuple(dict.fromkeys(edges))


def _read_pairs(path: Path, config: _Config) -> tuple[Pair, ...]:
    pairs: list[Pair] = []
    outputs = config.d_vocab if config.d_vocab_out < 1 else config.d_vocab_out
    for raw in read_pairs(path):
        original, patch = raw.ids or ((), None)
        if patch is None or raw.outcome_ids is None:
            raise RelpError(f"{raw.where}expected token ids: original_ids, patch_ids, answer_id, foil_id")
        answer, foil = raw.outcome_ids
        if len(answer) != 1 or len(foil) != 1 or max(*answer, *foil) >= outputs:
            raise RelpError(f"{raw.where}answer_id, foil_id: expected one id each, from 0 to {outputs - 1}")
        if len(original) != len(patch) or len(original) > config.n_ctx or max(*original, *patch) >= config.d_vocab:
            raise RelpError(
                f"{raw.where}original_ids, patch_ids: expected as many ids each, at most {config.n_ctx}, from 0 to "
                f"{config.d_vocab - 1}"
            )
        pairs.append(Pair(original, patch, answer[0], foil[0]))
    return tuple(dict.fromkeys(pairs))


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return {name: value.double() for name, value in load_file(path).items() if not IGNORED.search(name)}
    except (OSError, SafetensorError) as error:
        raise RelpError(f"{path}: cannot be read as safetensors ({error})") from error


def _gpt2(config: _Config, weights: dict[str, Tensor], path: Path) -> GPT2LMHeadModel:
    heads, linear = config.n_heads, config.normalization_type is None
    d_head, width = config.d_head, config.d_model
    if linear:
        while heads * d_head < config.d_model + len(LEVELS) + 1:
            d_head += 1
        width = heads * d_head
    outputs = config.d_vocab if config.d_vocab_out < 1 else config.d_vocab_out
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=max(config.d_vocab, outputs), n_positions=config.n_ctx, n_embd=width, n_layer=config.n_layers,
            n_head=heads, n_inner=config.d_mlp, activation_function=config.act_fn, layer_norm_epsilon=config.eps, embd_pdrop=0.0,
            attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
        )
    )  # fmt: skip
    _Filling(config, weights, path, model, d_head).fill()
    return model


class _Filling:
    """Puts a TransformerLens model's weights where GPT-2 has them, padded with zeros where it is wider."""

    def __init__(
        self, config: _Config, weights: dict[str, Tensor], path: Path, model: GPT2LMHeadModel, d_head: int
    ) -> None:
        self.config, self.weights, self.path, self.model, self.d_head = config, weights, path, model, d_head
        self.linear = config.normalization_type is None
        self.used: set[str] = set()

    def fill(self) -> None:
        """Raises RelpError for weights that are missing, of another shape, or of no use."""
        c, new = (
            self.config,
            {name: torch.zeros_like(v, dtype=torch.float64) for name, v in self.model.state_dict().items()},
        )
        put = {"transformer.wte.weight": self.writes(self.take("embed.W_E", c.d_vocab, c.d_model)),
               "transformer.wpe.weight": self.writes(self.take("pos_embed.W_pos", c.n_ctx, c.d_model))}  # fmt: skip
        if self.linear:
            put["transformer.wte.weight"][:, c.d_model : c.d_model + len(LEVELS)] = torch.tensor(
                LEVELS, dtype=torch.float64
            )
        for n in range(c.n_layers):
            put |= {f"transformer.h.{n}.{name}": value for name, value in self.block(f"blocks.{n}.").items()}
        put |= {f"transformer.ln_f.{name}": value for name, value in self.norm("ln_final").items()}
        out = c.d_vocab if c.d_vocab_out < 1 else c.d_vocab_out
        bias = self.take("unembed.b_U", out, missing=0.0)
        put["lm_head.weight"] = self.reads(self.take("unembed.W_U", c.d_model, out)).T
        if self.linear:
            put["lm_head.weight"][:, c.d_model] = bias / LEVEL
        strange = sorted(self.weights.keys() - self.used)
        if strange:
            raise RelpError(f"{self.path}: {len(strange)} weights have no place in GPT-2 (first: {strange[0]})")
        for name, value in put.items():
            new[name][tuple(slice(0, size) for size in value.shape)] = value
        self.model.load_state_dict({name: value.float() for name, value in new.items()})

    def block(self, at: str) -> dict[str, Tensor]:
        c, heads, width = self.config, self.config.n_heads, self.model.config.n_embd
        qkv = torch.zeros(width, 3, heads, self.d_head, dtype=torch.float64)
        bias = torch.zeros(3, heads, self.d_head, dtype=torch.float64)
        for i, part in enumerate("QKV"):
            scale = (self.d_head / c.d_head) ** 0.5 if part == "Q" else 1.0  # GPT-2 divides by its own heads' root
            qkv[: c.d_model, i, :, : c.d_head] = scale * self.take(
                f"{at}attn.W_{part}", heads, c.d_model, c.d_head
            ).movedim(0, 1)
            bias[i, :, : c.d_head] = scale * self.take(f"{at}attn.b_{part}", heads, c.d_head, missing=0.0)
        out = torch.zeros(heads, self.d_head, width, dtype=torch.float64)
        out[:, : c.d_head] = self.writes(self.take(f"{at}attn.W_O", heads, c.d_head, c.d_model))
        named = {
            "attn.c_attn.weight": qkv.flatten(1), "attn.c_attn.bias": bias.flatten(), "attn.c_proj.weight": out.flatten(0, 1),
            "attn.c_proj.bias": self.writes(self.take(f"{at}attn.b_O", c.d_model, missing=0.0)),
            "mlp.c_fc.weight": self.reads(self.take(f"{at}mlp.W_in", c.d_model, c.d_mlp)),
            "mlp.c_fc.bias": self.take(f"{at}mlp.b_in", c.d_mlp, missing=0.0),
            "mlp.c_proj.weight": self.writes(self.take(f"{at}mlp.W_out", c.d_mlp, c.d_model)),
            "mlp.c_proj.bias": self.writes(self.take(f"{at}mlp.b_out", c.d_model, missing=0.0)),
        }  # fmt: skip
        norms = {"ln_1": self.norm(f"{at}ln1"), "ln_2": self.norm(f"{at}ln2")}
        return named | {f"{norm}.{name}": value for norm, both in norms.items() for name, value in both.items()}

    def norm(self, name: str) -> dict[str, Tensor]:
        c, width = self.config, self.model.config.n_embd
        if self.linear:
            level = LEVEL * (len(LEVELS) / width) ** 0.5
            return {"weight": torch.full((width,), level, dtype=torch.float64)}
        one = 1.0 if c.normalization_type == "LNPre" else None
        return {
            "weight": self.take(f"{name}.w", c.d_model, missing=one),
            "bias": self.take(f"{name}.b", c.d_model, missing=0.0),
        }

    def writes(self, values: Tensor) -> Tensor:
        """[..., d_model] as [..., width]: balanced, so that LayerNorm has no mean to take away."""
        if not self.linear:
            return values
        wide = torch.zeros(*values.shape[:-1], self.model.config.n_embd, dtype=torch.float64)
        wide[..., : values.shape[-1]] = values
        wide[..., self.config.d_model + len(LEVELS)] = -values.sum(-1)
        return wide

    def reads(self, values: Tensor) -> Tensor:
        """[d_model, n] as [width, n]."""
        wide = torch.zeros(self.model.config.n_embd, values.shape[1], dtype=torch.float64)
        wide[: len(values)] = values
        return wide

    def take(self, name: str, *shape: int, missing: float | None = None) -> Tensor:
        if name not in self.weights:
            if missing is None:
                raise RelpError(f"{self.path}: weight '{name}' is missing")
            return torch.full(shape, missing, dtype=torch.float64)
        self.used.add(name)
        value = self.weights[name]
        if tuple(value.shape) != shape:
            raise RelpError(f"{self.path}: weight '{name}' has shape {list(value.shape)}, expected {list(shape)}")
        return value
