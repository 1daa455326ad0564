"""A program's weights, as an ordinary GPT-2 or Llama.

1. Each dimension of a feature is one of the residual stream. No head or MLP writes to dimensions that hold ±`LEVEL`, which is so
   much larger than all else that a norm divides by the same number in every run: x̂ = x·√d / (LEVEL·√c) with c such dimensions,
   up to ‖the rest‖²/LEVEL² (1e-9), and its weight undoes this. Every write is balanced by its negative sum in a dimension that
   nothing reads, so that LayerNorm has no mean to take away.
2. A head's query and key have a dimension per dimension of each match, its value one per dimension of each copy.
   The feature `one` is read from a dimension of that level.
3. Llama's rotary embedding turns no pair of dimensions but the first: its base is beyond float32. Nothing uses the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from relp_cli.errors import RelpError
from relp_cli.known.program import ONE, Coordinate, Head, Program

LEVEL = 2.0**20
D_HEAD = 16  # its root is exact in any precision, as is that of four heads together
STILL = 1e300  # a rotary base: 1/STILL^(i/d) is 0 in float32 for all i > 0


class _Layout:
    """Where features live. levels: dimensions that hold ±LEVEL; balance: the one that nothing reads."""

    def __init__(self, program: Program) -> None:
        self.width = program.n_heads * D_HEAD
        self.levels = {0: LEVEL, 1: -LEVEL, 2: LEVEL, 3: -LEVEL}
        self.balance = 4
        self.starts, start = {ONE: 0}, 5
        for name, width in program.features.items():
            self.starts[name], start = start, start + width
        if start > self.width:
            raise RelpError(f"program '{program.name}': its features need {start} dimensions of {self.width}")

    @property
    def norm_weight(self) -> float:
        return LEVEL * (len(self.levels) / self.width) ** 0.5

    def read(self, weights: Mapping[Coordinate, float]) -> Tensor:
        """A row that gives Σ weight·value on the stream, or on what the norms make of it."""
        row = torch.zeros(self.width, dtype=torch.float64)
        for (name, i), weight in weights.items():
            row[self.starts[name] + i] += weight / LEVEL if name == ONE else weight
        return row

    def write(self, weights: Mapping[Coordinate, float]) -> Tensor:
        """A column that adds weights, and nothing to the stream's sum."""
        column = torch.zeros(self.width, dtype=torch.float64)
        for (name, i), weight in weights.items():
            column[self.starts[name] + i] += weight
        column[self.balance] -= column.sum()
        return column


def compile_program(program: Program) -> PreTrainedModel:
    """A Hugging Face model in float32 that computes `program.run`'s logits. Raises RelpError for one that does not fit."""
    layout = _Layout(program)
    neurons = {mlp.layer: mlp.neurons for mlp in program.mlps}
    d_mlp = max([8, *(len(some) for some in neurons.values())])
    model = SHAPES[program.architecture](program, layout, d_mlp)
    weights = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.state_dict().items()}
    embedding = torch.stack([layout.write(row) for row in program.tokens])
    for at, value in layout.levels.items():
        embedding[:, at] = value
    unembedding = torch.stack([layout.read(program.unembed.get(t, {})) for t in range(len(program.tokens))])
    sizes = {"width": layout.width, "d_mlp": d_mlp}
    per_layer = [
        _attention(program, layout, layer) | _mlp(layout, neurons.get(layer, ()), **sizes)
        for layer in range(program.n_layers)
    ]
    positions = torch.stack([layout.write(row) for row in program.positions]) if program.positions else None
    named = NAMED[program.architecture](embedding, unembedding, positions, per_layer, layout.norm_weight)
    assert named.keys() <= weights.keys(), named.keys() - weights.keys()
    model.load_state_dict({name: (weights | named)[name].float() for name in weights})
    return model


def _attention(program: Program, layout: _Layout, layer: int) -> dict[str, Tensor]:
    """q, k, v: Float[head·d_head, d_model], o: Float[d_model, head·d_head]."""
    at = {n: torch.zeros(layout.width, layout.width, dtype=torch.float64) for n in ("q", "k", "v", "o")}
    usable = [i for i in range(D_HEAD) if program.architecture != "llama" or i % (D_HEAD // 2)]
    for head in program.heads:
        if head.layer == layer:
            _one_head(program, layout, head, at, [head.head * D_HEAD + i for i in usable])
    return at


def _one_head(program: Program, layout: _Layout, head: Head, at: dict[str, Tensor], rows: list[int]) -> None:
    width = {**program.features, ONE: 1}
    free = {"qk": iter(rows), "v": iter(rows)}
    try:
        for match in head.matches:
            for i in range(width[match.query]):
                row = next(free["qk"])
                at["q"][row] = layout.read({(match.query, i): match.strength * D_HEAD**0.5})
                at["k"][row] = layout.read({(match.key, i): 1.0})
        for copy in head.copies:
            for i in range(width[copy.source]):
                row = next(free["v"])
                at["v"][row] = layout.read({(copy.source, i): 1.0})
                at["o"][:, row] = layout.write({(copy.target, i): copy.scale})
    except StopIteration:
        raise RelpError(
            f"program '{program.name}': {head.name} needs more than {len(rows)} dimensions for its matches, or its copies"
        ) from None


def _mlp(layout: _Layout, neurons: Any, width: int, d_mlp: int) -> dict[str, Tensor]:
    """pre, gated: Float[d_mlp, d_model], out: Float[d_model, d_mlp]."""
    at = {
        "pre": torch.zeros(d_mlp, width, dtype=torch.float64),
        "gated": torch.zeros(d_mlp, width, dtype=torch.float64),
    }
    at["out"] = torch.zeros(width, d_mlp, dtype=torch.float64)
    for i, neuron in enumerate(neurons):
        at["pre"][i] = layout.read({**neuron.reads, (ONE, 0): neuron.bias})
        at["gated"][i] = layout.read({**neuron.gated, (ONE, 0): neuron.gated_bias})
        at["out"][:, i] = layout.write(neuron.writes)
    return at


def _gpt2(program: Program, layout: _Layout, d_mlp: int) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=len(program.tokens), n_positions=len(program.positions), n_embd=layout.width, n_layer=program.n_layers,
        n_head=program.n_heads, n_inner=d_mlp, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None,
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _llama(program: Program, layout: _Layout, d_mlp: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(program.tokens), hidden_size=layout.width, intermediate_size=d_mlp, head_dim=D_HEAD,
        num_hidden_layers=program.n_layers, num_attention_heads=program.n_heads, num_key_value_heads=program.n_heads,
        max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": STILL}, bos_token_id=None,
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _named_gpt2(
    embedding: Tensor, unembedding: Tensor, positions: Tensor | None, layers: list[dict[str, Tensor]], level: float
) -> dict[str, Tensor]:
    assert positions is not None
    norm = torch.full((embedding.shape[1],), level, dtype=torch.float64)
    named = {"transformer.wte.weight": embedding, "transformer.wpe.weight": positions, "lm_head.weight": unembedding,
             "transformer.ln_f.weight": norm}  # fmt: skip
    for n, at in enumerate(layers):
        named |= {
            f"transformer.h.{n}.{name}.weight": value
            for name, value in (
                ("ln_1", norm), ("ln_2", norm), ("attn.c_attn", torch.cat([at["q"], at["k"], at["v"]]).T),
                ("attn.c_proj", at["o"].T), ("mlp.c_fc", at["pre"].T), ("mlp.c_proj", at["out"].T),
            )
        }  # fmt: skip
    return named


def _named_llama(
    embedding: Tensor, unembedding: Tensor, positions: Tensor | None, layers: list[dict[str, Tensor]], level: float
) -> dict[str, Tensor]:
    assert positions is None
    norm = torch.full((embedding.shape[1],), level, dtype=torch.float64)
    named = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm, "lm_head.weight": unembedding}
    for n, at in enumerate(layers):
        named |= {
            f"model.layers.{n}.{name}.weight": value
            for name, value in (
                ("input_layernorm", norm), ("post_attention_layernorm", norm), ("self_attn.q_proj", at["q"]),
                ("self_attn.k_proj", at["k"]), ("self_attn.v_proj", at["v"]), ("self_attn.o_proj", at["o"]),
                ("mlp.gate_proj", at["pre"]), ("mlp.up_proj", at["gated"]), ("mlp.down_proj", at["out"]),
            )
        }  # fmt: skip
    return named


SHAPES: dict[str, Callable[[Program, _Layout, int], PreTrainedModel]] = {"gpt2": _gpt2, "llama": _llama}
NAMED: dict[str, Callable[..., dict[str, Tensor]]] = {"gpt2": _named_gpt2, "llama": _named_llama}
