"""A model that is in memory already: a Hugging Face model, or a TransformerBridge around one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relp_cli.errors import RelpError
from relp_cli.models.offload import device_of, named_weights


@dataclass(frozen=True)
class Loaded:
    """What `load_model` needs of it. bridge: None where there is none yet."""

    hf: Any
    tokenizer: Any
    name: str
    device: torch.device
    bridge: Any = None


def loaded_of(given: Any, tokenizer: Any) -> Loaded:
    """Raises: RelpError for what is neither, has no language-model head, whose weights were folded, or that is wrapped."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

    bridge = given if isinstance(given, TransformerBridge) else None
    if bridge is not None and bridge.compatibility_mode:
        raise RelpError(
            "this TransformerBridge is in compatibility mode, its weights may be folded: give it as boot_transformers makes it"
        )
    hf: Any = given if bridge is None else bridge.original_model
    if not isinstance(hf, PreTrainedModel):
        raise RelpError(
            "expected a model's name, a folder, a Hugging Face model (AutoModelForCausalLM) or a TransformerBridge, got a "
            f"{type(hf).__name__}"
        )
    path = str(hf.name_or_path or "")
    name = (Path(path).name if Path(path).exists() else path) or type(hf).__name__
    if hf.get_output_embeddings() is None:
        raise RelpError(f"{type(hf).__name__} has no language-model head: load it with AutoModelForCausalLM")
    if bridge is None and any(type(part).__module__.startswith("transformer_lens.") for part in hf.modules()):
        raise RelpError(
            f"model '{name}' is wrapped already, by an earlier load_model or a TransformerBridge: use what that returned"
        )
    own = None if bridge is None else bridge.tokenizer
    tokenizer = own if tokenizer is None else tokenizer
    if tokenizer is not None and not callable(getattr(tokenizer, "convert_ids_to_tokens", None)):
        raise RelpError(f"tokenizer: expected a Hugging Face tokenizer, got a {type(tokenizer).__name__}")
    return Loaded(hf, tokenizer, name, device_of(hf), bridge)


def weights_hash(hf: nn.Module) -> str:
    """sha256 over the names and bytes of all parameters: tells apart what has one name and was trained on."""
    digest = hashlib.sha256()
    for name, values in named_weights(hf):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"weights-{digest.hexdigest()[:16]}"
