"""Tiny Hugging Face models in float64, every parameter random, and a scope in which HF really computes in float64."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SHAPES = ("gpt2", "pythia", "pythia-serial", "qwen2", "llama", "gemma2")
MOE: dict[str, dict[str, Any]] = {  # mixtures of experts; what each adds to grouped queries
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
                  "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8,
                  "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


FLOAT, DOUBLE, FLOAT32 = torch.Tensor.float, torch.Tensor.double, torch.float32
LOAD = SourceFileLoader.exec_module


class exact_float64:
    """Whoever asks for float32 gets float64: `torch.float32` is float64, `Tensor.float` is `Tensor.double`.

    HF hard-codes float32 in RMSNorm, in the softmax of NeoX/Qwen2/Llama/Gemma-2 and in the rotary tables, so that a
    "float64" model has float32 islands (errors of 1e-7 to 1e-6 in the logits). Use around whatever runs such a model.
    Names, not calls, are replaced: a mode that sees every operation would cost as much as the operations.
    """

    depth = 0

    def __enter__(self) -> None:
        exact_float64.depth += 1
        _exact(True)

    def __exit__(self, *_: object) -> None:
        exact_float64.depth -= 1
        _exact(exact_float64.depth > 0)


def _exact(on: bool) -> None:
    torch.float32 = torch.float = torch.float64 if on else FLOAT32
    torch.Tensor.float = DOUBLE if on else FLOAT  # type: ignore[method-assign]
    SourceFileLoader.exec_module = _load if on else LOAD  # type: ignore[method-assign]


def _load(loader: SourceFileLoader, module: ModuleType) -> None:
    """A module first imported in the meantime keeps its constants and defaults beyond it: they are what is written."""
    _exact(False)
    try:
        LOAD(loader, module)
    finally:
        _exact(True)


def _config(shape: str, layers: int) -> PreTrainedConfig:
    size: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    gqa = size | {"num_key_value_heads": 2}
    if shape == "gpt2":
        return GPT2Config(
            vocab_size=50,
            n_embd=32,
            n_layer=layers,
            n_head=4,
            n_inner=48,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    if shape in ("pythia", "pythia-serial"):
        return GPTNeoXConfig(
            **size,
            use_parallel_residual=shape == "pythia",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        )
    if shape == "qwen2":
        return Qwen2Config(**gqa)
    if shape == "llama":
        return LlamaConfig(**gqa)
    if shape == "gemma2":  # window shorter than the prompts, caps that bite, head_dim ≠ d/heads ≠ query_pre_attn_scalar
        return Gemma2Config(
            **gqa, head_dim=12, query_pre_attn_scalar=20, sliding_window=3, attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )  # fmt: skip
    if shape in MOE:
        return CONFIG_MAPPING[shape](**gqa, **MOE[shape])
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join((*SHAPES, *MOE))}")


def random_model(shape: str, seed: int, bias: bool = True, layers: int = 3) -> PreTrainedModel:
    """d 32, 4 heads (2 key/value heads where grouped), d_mlp 48, vocabulary 50; eval mode, eager attention.

    HF initialises biases to 0 and norm weights to 1 (Gemma-2: 0); here all are random. bias=False: all biases zero.
    Take `state_dict()` before a TransformerBridge wraps the model: wrapping renames the keys in place.
    """
    config = _config(shape, layers)
    with exact_float64():  # exact rotary tables
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    if shape in MOE:
        model.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    model.requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
        if name.endswith("bias"):
            p.copy_(0.3 * noise * bias)
        elif p.ndim == 1:
            p.copy_((shape != "gemma2") + 0.3 * noise)
        elif name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight", "embed_in.weight")):
            p.copy_(noise * (0.2 if shape == "gemma2" else 0.7))
        else:  # Conv1D stores [in out], Linear [out in], experts [expert out in]
            fan_in = p.shape[0] if shape == "gpt2" else p.shape[-1]
            p.copy_(1.5 * noise / fan_in**0.5)
    return model
