"""What TransformerLens's bridge around a Hugging Face model says of it: its shape, its BOS token, and where it is mended."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from relp_cli.errors import RelpError
from relp_cli.models.checks import longest
from relp_cli.models.model import Shape
from relp_cli.models.moe import CHOSEN


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def bridge_of(hf: Any, name: str) -> Any:
    """The bridge is built without a tokenizer: tokenisation is ours, and a folder without one serves token-id pairs."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, model_name=name)
        except Exception as error:  # each adapter fails in its own way on a configuration that it does not know
            raise RelpError(f"TransformerLens cannot wrap model '{name}': {first_line(error)}") from error


def narrow_rotary(bridge: Any, dtype: torch.dtype) -> None:
    """Rotated queries and keys in the model's dtype, as Hugging Face has them: for OLMo the bridge leaves them in float32,
    which its next product with bfloat16 values refuses.
    """
    if dtype in (torch.float32, torch.float64):
        return
    for name, point in bridge.hook_dict.items():
        if name.endswith((".hook_rot_q", ".hook_rot_k")):
            point.register_forward_hook(lambda _m, _a, value: value.to(dtype))


def forget_patterns(bridge: Any) -> None:
    """Where queries, keys and values are one matrix, the bridge keeps each layer's last pattern, which nothing reads: as large as
    positions², all layers' at once, with the graph that leads to it.
    """
    for block in bridge.blocks:
        attention: Any = getattr(block, "attn", None)
        if hasattr(attention, "_pattern"):
            attention.register_forward_hook(lambda module, *_: setattr(module, "_pattern", None))


def bos_of(tokenizer: Any, wanted: bool, name: str, asked: bool) -> int | None:
    if tokenizer is None or not wanted:
        return None
    if tokenizer.bos_token_id is None:
        if asked:
            raise RelpError(f"model '{name}': its tokenizer has no BOS token; use --no-bos")
        return None
    return int(tokenizer.bos_token_id)


def shape_of(hf: Any, bridge: Any) -> Shape:
    cfg, points, config = bridge.cfg, bridge.hook_dict, hf.config.get_text_config()
    heads = int(cfg.n_heads)
    named = (
        getattr(config, key, None) for key in ("hidden_activation", "hidden_act", "activation_function", "activation")
    )
    learned = "pos_embed.hook_out" in points
    return Shape(
        n_layers=int(cfg.n_layers),
        d_model=int(cfg.d_model),
        n_heads=heads,
        n_kv_heads=int(getattr(cfg, "n_key_value_heads", None) or heads),
        d_head=int(getattr(cfg, "d_head", 0) or cfg.d_model // heads),
        d_mlp=int(cfg.d_mlp),
        vocab=int(hf.get_input_embeddings().weight.shape[0]),
        gated="blocks.0.mlp.gate.hook_out" in points,  # of a mixture of experts: its router, and its experts are gated
        moe=f"blocks.0.{CHOSEN}" in points,
        parallel="blocks.0.hook_resid_mid" not in points,
        post_norm="blocks.0.ln2_post.hook_out" in points,
        attn_softcap=getattr(config, "attn_logit_softcapping", None),
        final_softcap=getattr(config, "final_logit_softcapping", None),
        activation=str(next((name for name in named if name), "unknown")),
        clip_qkv=getattr(config, "clip_qkv", None) or getattr(getattr(config, "attn_config", None), "clip_qkv", None),
        positions=longest(config),
        learned_positions=learned,
        residual_multiplier=float(getattr(config, "residual_multiplier", None) or 1.0),
    )
