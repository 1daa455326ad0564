"""Loading: embedded names, local Hugging Face folders and hub names, through TransformerLens's `TransformerBridge`."""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from relp_cli.errors import RelpError, nearest
from relp_cli.files import read_object
from relp_cli.models.bridging import bos_of, bridge_of, first_line, forget_patterns, narrow_rotary, shape_of
from relp_cli.models.catalog import EMBEDDED, embedded_names
from relp_cli.models.checks import check_forward, check_model, flat_points, mlp_form, probe, unscaled_norms
from relp_cli.models.families import family_of
from relp_cli.models.folder import content_hash, local_path, split_revision
from relp_cli.models.loaded import loaded_of, weights_hash
from relp_cli.models.model import Model
from relp_cli.models.offload import (
    Spare,
    adopt,
    check_modules,
    device_map_of,
    device_of,
    devices_of,
    is_placed,
)
from relp_cli.models.placement import check_device_map, written
from relp_cli.models.scaled import contributions

# Weights of other parts of a checkpoint: pictures, next-token heads of training, buffers that are computed anew.
ELSEWHERE = re.compile(r"vision|multi_modal|audio|mtp|inv_freq|masked_bias|attn\.bias$|attention\.bias$|position_ids")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str | Path | Any,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    bos: bool | None = None,
    tokenizer: Any = None,
) -> Model:
    """Load a model by embedded name, local Hugging Face folder, .gguf file, or hub name (with a revision: `name@revision`).
    Or take one that is in memory: a Hugging Face model (with `tokenizer=`, else token-id pairs only) or a TransformerBridge.

    Parameters are frozen, attention is eager (so that patterns exist), dropout is off, weights are the raw Hugging
    Face weights (nothing folded). `device` defaults to the GPU if there is one. `bos` overrides whether prompts start
    with the BOS token (default: TransformerLens's for this architecture). `dtype` is float32 unless given.

    device_map, in place of `device`: "auto" or "balanced" (Transformers' own, over the GPUs there are, then main memory, then
    the disk), "offload" (the blocks' matrices are fetched from main memory or disk for each call), or {module: device, "cpu"
    or "disk"}. The numbers are those of the plain model.

    A model in memory is not copied: it is frozen, put in eval mode and wrapped for good, and it stays in its dtype and on its
    device (unless `device` is given). Its checks are those at loading; the logits of a bridge, which has replaced the modules
    already, have no plain ones to be held against. Its revision is a hash of its weights.

    Raises: RelpError for an unknown name, a device beside a device map, a model that cannot be taken, a folder without complete
    weights, an unreachable hub, or an architecture whose residual stream is not the sum that every method here assumes.
    """
    if device is not None and device_map is not None:
        raise RelpError("device= and device_map= both say where the model is: give one of them")
    if not isinstance(name, str | Path):
        if device_map is not None:
            raise RelpError("device_map= goes with a name: a model that is in memory is where it is")
        return _in_memory(name, dtype, device, revision, bos, tokenizer)
    if isinstance(device_map, str):
        check_device_map(device_map)
    if tokenizer is not None:
        raise RelpError(f"tokenizer= goes with a model that is in memory; '{name}' has its own")
    torch_dtype = _dtype("float32" if dtype is None else dtype)
    target = usable_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    name, revision = split_revision(str(name), revision)
    local = local_path(name)
    if local is not None and revision is not None:
        raise RelpError(f"--revision {revision}: '{name}' is on this disk, only models of the hub have revisions")
    if device_map is not None and local is not None and local.is_file():
        raise RelpError(f"model '{name}': a GGUF file has no device map; convert it into a Hugging Face folder first")
    hf, tokenizer = _from_pretrained(name, local, torch_dtype, revision, device_map, target)
    version = content_hash(local) if local else str(getattr(hf.config, "_commit_hash", None) or revision or "unknown")
    label = local.name if local and name not in embedded_names() else name + (f"@{revision}" if revision else "")
    if device_map is not None:
        target = device_of(hf)
    return wrap(hf, tokenizer, label, device=target, revision=version, bos=bos, device_map=device_map)


def _in_memory(
    given: Any, dtype: Any, device: str | torch.device | None, revision: str | None, bos: bool | None, tokenizer: Any
) -> Model:
    for key, value in (("dtype", dtype), ("revision", revision)):
        if value is not None:
            raise RelpError(f"{key}= goes with a name; a model that is in memory has its own")
    model = loaded_of(given, tokenizer)
    places = getattr(model.hf, "hf_device_map", None) if is_placed(model.hf) else None
    if places and device is not None:
        raise RelpError(f"device= cannot move model '{model.name}', whose modules a device map has placed")
    target = model.device if device is None else usable_device(device)
    adopt(model.hf)
    version = weights_hash(model.hf)
    return wrap(
        model.hf, model.tokenizer, model.name, device=target, revision=version, bos=bos, wrapped=model.bridge,
        device_map=places,
    )  # fmt: skip


def usable_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise RelpError(f"device '{device}' is not available here ({first_line(error)})") from error
    return target


def wrap(
    hf: Any,
    tokenizer: Any,
    name: str,
    *,
    device: torch.device | str = "cpu",
    revision: str = "in-memory",
    bos: bool | None = None,
    wrapped: Any = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> Model:
    """A Model from a Hugging Face causal language model that is already in memory (its weights are frozen, not copied).

    wrapped: its bridge, where it has one. device_map: what it was loaded by, if by one; it is not moved then.
    Raises: RelpError where TransformerLens cannot wrap it, or computes something else than the model does, or where it is
    not what rules and methods assume (`checks`).
    """
    hf.config._attn_implementation = "eager"
    hf.config._experts_implementation = "eager"  # grouped_mm, the default, has no float64
    if device_map is None and not is_placed(hf):
        hf.to(device)
    adopt(hf)
    hf.eval().requires_grad_(False)
    tokens, plain = probe(hf, name)
    bridge = bridge_of(hf, name) if wrapped is None else wrapped
    hf.requires_grad_(False)
    shape = shape_of(hf, bridge)
    narrow_rotary(bridge, next(hf.parameters()).dtype)
    forget_patterns(bridge)
    model = Model(
        name=name,
        hf=bridge.original_model,
        bridge=bridge,
        points={
            **bridge.hook_dict,
            **contributions(bridge.hook_dict, shape.n_layers, shape.residual_multiplier),
            "logits": torch.nn.Identity(),
        },
        tokenizer=tokenizer,
        bos=bos_of(tokenizer, bool(bridge.cfg.default_prepend_bos) if bos is None else bos, name, bos is not None),
        family=family_of(hf.config.model_type, shape.gated),
        shape=shape,
        revision=revision,
        dtype=next(hf.parameters()).dtype,
        device=torch.device(device),
        device_map=None if device_map is None else written(device_map),
        fetches=any(p.is_meta for p in hf.parameters()),
        spread=len(devices_of(hf)) > 1,
        bos_asked=bos is not None,
    )
    check_forward(model, tokens, plain)
    model = replace(model, flat=flat_points(model), unscaled_norms=unscaled_norms(model))
    model = replace(model, shape=replace(shape, **mlp_form(model)))
    check_model(model)
    return model


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise RelpError(f"unknown dtype '{dtype}'{nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def _from_pretrained(
    name: str,
    local: Path | None,
    dtype: torch.dtype,
    revision: str | None,
    device_map: str | Mapping[str, Any] | None,
    device: torch.device,
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # that weights are elsewhere was asked for
    # trust_remote_code=False: code in a folder is neither run nor asked about on stdin.
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": local or name, "revision": revision, "trust_remote_code": False,
        "local_files_only": local is not None or not _hub_resolves(),
    }  # fmt: skip
    if local is not None and local.is_file():
        where |= {"pretrained_model_name_or_path": local.parent, "gguf_file": local.name}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spare = None if device_map is None else Spare()
            placing = {} if spare is None else _placing(where, dtype, device_map, device, spare.path)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **where, dtype=dtype, attn_implementation="eager", output_loading_info=True, **placing
            )
    except RelpError:
        raise
    except Exception as error:  # each configuration, file format and package fails in a way of its own
        raise _load_error(name, local, error) from error
    hf, info = loaded
    hf._spare = spare  # it goes when the model goes
    _must_be_complete(name, info)
    folder = local if local is not None and local.is_dir() else None
    if folder and not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return hf, None
    return hf, _tokenizer(name, folder, where)


def _placing(
    where: dict[str, Any], dtype: torch.dtype, device_map: Any, device: torch.device, folder: str
) -> dict[str, Any]:
    """What `from_pretrained` is told of a device map."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    if device_map == "offload" or not isinstance(device_map, str):
        with init_empty_weights():
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**where), dtype=dtype)
        if device_map == "offload":
            device_map = device_map_of(empty, device)
        check_modules(device_map, empty)
    return {"device_map": device_map, "offload_folder": folder}


def load_tokenizer(name: str) -> Any:
    """The tokenizer of an embedded model, a local folder (which needs no weights) or a hub name (`name@revision`).

    Raises: RelpError where there is none, or where it gives no character offsets (not a fast one).
    """
    name, revision = split_revision(name, None)
    path = EMBEDDED / name if name in embedded_names() else Path(name).expanduser()
    folder = path if path.is_dir() else None
    if folder is None:
        local_path(name)  # a mistyped path or embedded name is refused in the same words as a model's
    where = {
        "pretrained_model_name_or_path": folder or name, "revision": revision, "trust_remote_code": False,
        "local_files_only": folder is not None or not _hub_resolves(),
    }  # fmt: skip
    return _tokenizer(name, folder, where)


def _tokenizer(name: str, folder: Path | None, where: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        loader: Any = PreTrainedTokenizerFast if folder and _generic_tokenizer(folder) else AutoTokenizer
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = loader.from_pretrained(**where)
            tokenizer("")  # settings of the wrong type are only found in use
            return tokenizer
    except Exception as error:  # a broken tokenizer.json ends in any exception, bare ones of its Rust library included
        if folder is None and isinstance(error, OSError):
            raise RelpError(
                f"no tokenizer of '{name}': it is neither an embedded model nor a local folder, and the hub does not give it "
                f"({first_line(error)}); offline, name a folder with its tokenizer.json"
            ) from error
        raise RelpError(
            f"model '{name}': its tokenizer cannot be loaded, tokenizer.json or tokenizer_config.json is broken "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _must_be_complete(name: str, info: dict[str, Any]) -> None:
    """Raises RelpError unless the file's weights are the model's, all of them."""
    incomplete = sorted(map(str, [*info.get("missing_keys", []), *info.get("mismatched_keys", [])]))
    if incomplete:
        raise RelpError(
            f"model '{name}': {len(incomplete)} weights are missing or of the wrong shape (first: {incomplete[0]}); "
            "Transformers would have filled them with random numbers"
        )
    unused = sorted(str(key) for key in info.get("unexpected_keys", []) if not ELSEWHERE.search(str(key)))
    if unused:
        raise RelpError(
            f"model '{name}': {len(unused)} weights of its files have no place in the model that config.json describes "
            f"(first: {unused[0]}); Transformers would have ignored them"
        )


def _generic_tokenizer(folder: Path) -> bool:
    """Whether the folder names the generic tokenizer class. AutoTokenizer overrides it by model type (Qwen2: byte-level
    BPE whatever tokenizer.json says), which would silently change every token."""
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return not (folder / "config.json").is_file()  # tokenizer.json alone says all there is
    return read_object(config).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")


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


def _load_error(name: str, local: Path | None, error: Exception) -> RelpError:
    if local:
        if "trust_remote_code" in str(error):
            return RelpError(
                f"model folder '{name}' brings its own code (auto_map in config.json), which is never run; expected an "
                "architecture that Transformers itself has"
            )
        said = " ".join(str(error).split())[:240]  # what is wrong with a key stands in the lines after its name
        return RelpError(
            f"model folder '{name}' cannot be loaded, config.json or its weights are broken ({type(error).__name__}: {said})"
        )
    near = nearest(name, embedded_names())
    hint = near if "did you mean" in near else f"; embedded models: {', '.join(embedded_names())}"
    return RelpError(
        f"model '{name}' is neither an embedded model nor a local folder, and the Hugging Face hub does not give it "
        f"({first_line(error)}). Offline: fetch it elsewhere with `hf download {name} --local-dir DIR` and pass "
        f"--model DIR{hint}"
    )
