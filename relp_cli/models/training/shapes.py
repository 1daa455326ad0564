"""The embedded models' configurations: each family's real features at d_model 64 with 4 heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

D_MODEL, HEADS, KV_HEADS, CONTEXT, BOS = 64, 4, 2, 64, 0


def gpt2(vocab: int, layers: int = 4) -> PreTrainedModel:
    """Learned positions, LayerNorm with biases, GELU (tanh), tied embeddings."""
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=CONTEXT,
        n_embd=D_MODEL,
        n_layer=layers,
        n_head=HEADS,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def pythia(vocab: int) -> PreTrainedModel:
    """Parallel residual, rotary on a quarter of each head's dimensions, biases, exact GELU, untied embeddings."""
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=D_MODEL,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        intermediate_size=4 * D_MODEL,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        hidden_act="gelu",
        use_parallel_residual=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    return GPTNeoXForCausalLM(config)


def qwen2(vocab: int) -> PreTrainedModel:
    """RMSNorm, rotary, biases on q, k and v, grouped keys and values, gated SiLU, tied embeddings."""
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=D_MODEL,
        intermediate_size=3 * D_MODEL,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        attention_dropout=0.0,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


GEMMA: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "intermediate_size": 3 * D_MODEL,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": D_MODEL // HEADS,
    "query_pre_attn_scalar": D_MODEL // HEADS,
    "max_position_embeddings": CONTEXT,
    "sliding_window": 8,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "pad_token_id": None,
}


def gemma2(vocab: int) -> PreTrainedModel:
    """Norms before and after each sublayer, softcaps on attention and logits, sliding window in every other layer."""
    config = Gemma2Config(vocab_size=vocab, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, **GEMMA)
    return Gemma2ForCausalLM(config)


def gemma3(vocab: int) -> PreTrainedModel:
    """Norms on queries and keys, norms before and after each sublayer, sliding window in every other layer."""
    config = Gemma3TextConfig(vocab_size=vocab, layer_types=["sliding_attention", "full_attention"] * 2, **GEMMA)
    return Gemma3ForCausalLM(config)


SHAPES: dict[str, Callable[[int], PreTrainedModel]] = {
    "tiny-gpt2": gpt2,
    "tiny-pythia": pythia,
    "tiny-qwen2": qwen2,
    "tiny-gemma2": gemma2,
    "tiny-gemma3": gemma3,
    "deep-gpt2": lambda vocab: gpt2(vocab, layers=12),
}
