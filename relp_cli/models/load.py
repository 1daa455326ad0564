"""Loading: embedded names, local Hugging Face folders and hub names, through TransformerLens's `TransformerBridge`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from relp_cli.errors import RelpError, nearest
from relp_cli.models.catalog import EMBEDDED, embedded_names
from relp_cli.models.checks import check_model
from relp_cli.models.families import family_of
from relp_cli.models.model import Model, Shape
from relp_cli.models.moe import CHOSEN

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    revision: str | None = None,
    bos: bool | None = None,
) -> Model:
    """Load a model by embedded name, local Hugging Face folder or hub name.

    Parameters are frozen, attention is eager (so that patterns exist), dropout is off, weights are the raw Hugging
    Face weights (nothing folded). `device` defaults to the GPU if there is one. `bos` overrides whether prompts start
    with the BOS token (default: TransformerLens's for this architecture).

    Raises: RelpError for an unknown name, a folder without complete weights, an unreachable hub, or an architecture
    whose residual stream is not the sum that every method here assumes.
    """
    torch_dtype = _dtype(dtype)
    try:
        target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise RelpError(f"device '{device}' is not available here ({_first_line(error)})") from error
    folder = _folder(str(name))
    hf, tokenizer = _from_pretrained(str(name), folder, torch_dtype, revision)
    version = _content_hash(folder) if folder else str(getattr(hf.config, "_commit_hash", None) or "unknown")
    label = str(name) if str(name) in embedded_names() or not folder else folder.name
    return wrap(hf, tokenizer, label, device=target, revision=version, bos=bos)


def wrap(
    hf: Any,
    tokenizer: Any,
    name: str,
    *,
    device: torch.device | str = "cpu",
    revision: str = "in-memory",
    bos: bool | None = None,
) -> Model:
    """A Model from a Hugging Face causal language model that is already in memory (its weights are frozen, not copied)."""
    hf.config._attn_implementation = "eager"
    hf.config._experts_implementation = "eager"  # grouped_mm, the default, has no float64
    hf.to(device).eval().requires_grad_(False)
    bridge = _bridge(hf, name)
    hf.requires_grad_(False)
    shape = _shape(hf.config, bridge)
    model = Model(
        name=name,
        hf=bridge.original_model,
        bridge=bridge,
        points={**bridge.hook_dict, "logits": torch.nn.Identity()},
        tokenizer=tokenizer,
        bos=_bos(tokenizer, bool(bridge.cfg.default_prepend_bos) if bos is None else bos, name, bos is not None),
        family=family_of(hf.config.model_type, shape.gated),
        shape=shape,
        revision=revision,
        dtype=next(hf.parameters()).dtype,
        device=torch.device(device),
        bos_asked=bos is not None,
    )
    check_model(model)
    return model


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise RelpError(f"unknown dtype '{dtype}'{nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def _folder(name: str) -> Path | None:
    """The local folder of an embedded name or a path; None for a hub name."""
    if name in embedded_names():
        return EMBEDDED / name
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RelpError(f"model folder '{name}' has no config.json; expected a Hugging Face model folder")
        if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
            raise RelpError(f"model folder '{name}' has no weights (*.safetensors or pytorch_model*.bin)")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RelpError(f"model folder '{name}' does not exist")
    return None


def _from_pretrained(name: str, folder: Path | None, dtype: torch.dtype, revision: str | None) -> tuple[Any, Any]:
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    where: str | Path = folder or name
    cached_only = folder is not None or not _hub_resolves()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,
                revision=revision,
                dtype=dtype,
                attn_implementation="eager",
                output_loading_info=True,
                local_files_only=cached_only,
            )
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
        raise _load_error(name, folder, error) from error
    hf, info = loaded
    incomplete = sorted(map(str, [*info.get("missing_keys", []), *info.get("mismatched_keys", [])]))
    if incomplete:
        raise RelpError(
            f"model '{name}': {len(incomplete)} weights are missing or of the wrong shape (first: {incomplete[0]}); "
            "Transformers would have filled them with random numbers"
        )
    if folder and not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return hf, None
    try:
        loader: Any = PreTrainedTokenizerFast if folder and _generic_tokenizer(folder) else AutoTokenizer
        return hf, loader.from_pretrained(where, revision=revision, local_files_only=cached_only)
    except Exception as error:  # a broken tokenizer.json ends in any exception, bare ones of its Rust library included
        raise RelpError(
            f"model '{name}': its tokenizer cannot be loaded, tokenizer.json or tokenizer_config.json is broken "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error


def _generic_tokenizer(folder: Path) -> bool:
    """Whether the folder names the generic tokenizer class. AutoTokenizer overrides it by model type (Qwen2: byte-level
    BPE whatever tokenizer.json says), which would silently change every token."""
    config = folder / "tokenizer_config.json"
    named = json.loads(config.read_text()).get("tokenizer_class") if config.is_file() else None
    return named in ("TokenizersBackend", "PreTrainedTokenizerFast")


def _hub_resolves() -> bool:
    """Whether the hub's host name resolves (or a proxy is set): without this, the hub client retries for 25 seconds."""
    from huggingface_hub.constants import ENDPOINT

    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _load_error(name: str, folder: Path | None, error: Exception) -> RelpError:
    if folder:
        return RelpError(f"model folder '{name}' cannot be loaded: {_first_line(error)}")
    near = nearest(name, embedded_names())
    hint = near if "did you mean" in near else f"; embedded models: {', '.join(embedded_names())}"
    return RelpError(
        f"model '{name}' is neither an embedded model nor a local folder, and the Hugging Face hub does not give it "
        f"({_first_line(error)}). Offline: fetch it elsewhere with `hf download {name} --local-dir DIR` and pass "
        f"--model DIR{hint}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _bridge(hf: Any, name: str) -> Any:
    """The bridge is built without a tokenizer: tokenisation is ours, and a folder without one serves token-id pairs."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, model_name=name)
        except (ValueError, KeyError, AttributeError) as error:
            raise RelpError(f"TransformerLens cannot wrap model '{name}': {_first_line(error)}") from error


def _bos(tokenizer: Any, wanted: bool, name: str, asked: bool) -> int | None:
    if tokenizer is None or not wanted:
        return None
    if tokenizer.bos_token_id is None:
        if asked:
            raise RelpError(f"model '{name}': its tokenizer has no BOS token; use --no-bos")
        return None
    return int(tokenizer.bos_token_id)


def _shape(config: Any, bridge: Any) -> Shape:
    cfg, points = bridge.cfg, bridge.hook_dict
    heads = int(cfg.n_heads)
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return Shape(
        n_layers=int(cfg.n_layers),
        d_model=int(cfg.d_model),
        n_heads=heads,
        n_kv_heads=int(getattr(cfg, "n_key_value_heads", None) or heads),
        d_head=int(getattr(cfg, "d_head", 0) or cfg.d_model // heads),
        d_mlp=int(cfg.d_mlp),
        vocab=int(config.vocab_size),
        gated="blocks.0.mlp.gate.hook_out" in points,  # of a mixture of experts: its router, and its experts are gated
        moe=f"blocks.0.{CHOSEN}" in points,
        parallel="blocks.0.hook_resid_mid" not in points,
        post_norm="blocks.0.ln2_post.hook_out" in points,
        attn_softcap=getattr(config, "attn_logit_softcapping", None),
        final_softcap=getattr(config, "final_logit_softcapping", None),
        activation=str(act or getattr(config, "activation_function", "unknown")),
    )


def _content_hash(folder: Path) -> str:
    """sha256 over the names and bytes of the weights and config: what makes two local folders the same model."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()[:16]
