"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, of versions before and after 6; reading and writing.

Formulas: https://github.com/jbloomAus/SAELens, `sae_lens/saes/`. What a folder asks for beyond them is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, FiniteFloat
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from relp_cli.errors import RelpError, unknown
from relp_cli.features.dictionary import Dictionary
from relp_cli.features.folder import Settings, agree, dtype_name, floats, read_object
from relp_cli.files import write_atomically
from relp_cli.spaces.sites import parse_site

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
# architecture → form of the encoder; BatchTopK keeps what is above one threshold once it is trained
FORMS = {"standard": "relu", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu", "gated": "gated"}
_REASONS = {
    "layer_norm": "its decoder depends on each activation's mean and norm, so features alone do not reconstruct it",
    "constant_norm_rescale": "its decoder depends on each activation's norm, so features alone do not reconstruct it",
    "expected_average_only_in": f"the folder has no {SCALER} with the scaling factor; fold it into the weights",
}
# What a file may hold besides an architecture's own tensors.
_OTHER = {"scaling_factor", "finetuning_scaling_factor"}


class _Metadata(Settings):
    model_name: str | None = None
    revision: str | None = None
    hook_name: str | None = None
    hook_point: str | None = None
    hook_layer: int | None = None
    hook_name_out: str | None = None


class _Config(_Metadata):
    """The settings that are read, of versions before and after 6."""

    architecture: str = "standard"
    d_in: int | None = None
    d_sae: int | None = None
    activation_fn: str | None = None
    activation_fn_str: str | None = None
    activation_fn_kwargs: dict[str, Any] | None = None
    k: int | float | None = None
    normalize_activations: str | bool | None = None
    reshape_activations: str | None = None
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool | None = None
    finetuning_scaling_factor: bool | None = None
    metadata: _Metadata | None = None
    meta: _Metadata | None = None


class _Scaler(Settings):
    scaling_factor: FiniteFloat | None = Field(default=None, gt=0)


def load_saelens(folder: Path) -> tuple[Dictionary, str | None]:
    """The dictionary of one folder, and the hook name that its configuration gives (None where it gives none).

    Raises: RelpError, naming the setting, for architectures, activations, normalisations and hooks that are not supported.
    """
    config = _config(folder)
    architecture, k = _architecture(folder, config)
    state, stored = _state(folder)
    hook = _hook(folder, config)
    _refuse(folder, config, state)
    names = {"W_enc", "W_dec", "b_dec", *(("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",))}
    names |= {"threshold"} if architecture == "jumprelu" else set()
    optional = {"threshold", "topk_threshold"} if architecture == "batchtopk" else set()
    if missing := sorted(names - state.keys()):
        raise RelpError(
            f"dictionary {folder}: a {architecture} SAE needs the tensor '{missing[0]}', {WEIGHTS} has none"
        )
    if extra := sorted(state.keys() - names - optional - _OTHER):
        raise RelpError(f"dictionary {folder}: {WEIGHTS} has '{extra[0]}', which a {architecture} SAE does not have")
    threshold = state.get("threshold", state.get("topk_threshold"))
    if architecture == "batchtopk" and threshold is None:
        raise RelpError(f"dictionary {folder}: a batchtopk SAE needs its threshold ('threshold' or 'topk_threshold')")
    common = _common(config, state, _scaling(folder, config), architecture)
    if architecture == "gated":
        parts: dict[str, Any] = {
            "gate_bias": state["b_gate"],
            "mag_scale": state["r_mag"].exp(),
            "mag_bias": state["b_mag"],
        }
    elif threshold is not None:
        parts = {"threshold": threshold.to(common["b_enc"].dtype).expand_as(common["b_enc"])}
    else:
        parts = {"k": k}
    found = Dictionary(FORMS[architecture], f"SAELens {architecture}", **common, **parts, stored=stored)
    agree(folder / CONFIG, {"d_in": (config.get("d_in"), found.d_in), "d_sae": (config.get("d_sae"), found.n_features)})
    return found, hook


def owner(folder: Path) -> tuple[str, str]:
    """The model whose a folder says it is, and its revision; "" for what it does not say."""
    config = _config(folder)
    about = {**config, **(config.get("metadata") or {})}
    return about.get("model_name") or "", about.get("revision") or ""


def _config(folder: Path) -> dict[str, Any]:
    return read_object(folder / CONFIG, _Config)


def _architecture(folder: Path, config: Mapping[str, Any]) -> tuple[str, int | None]:
    """The architecture, and k where it keeps the k largest. Older folders say "standard" with activation topk."""
    architecture = str(config.get("architecture", "standard"))
    if architecture not in FORMS:
        raise unknown("SAE architecture", architecture, FORMS, f"{folder / CONFIG}: ")
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    if activation == "topk" and architecture == "standard":
        architecture = "topk"
    known = ("relu", "topk") if architecture == "topk" else ("relu",)
    if activation not in known:
        raise RelpError(f"{folder / CONFIG}: activation '{activation}' is not supported for architecture "
                        f"{architecture}; expected {' or '.join(known)}")  # fmt: skip
    more = config.get("activation_fn_kwargs") or {}
    if odd := sorted(more.keys() - {"k"}):
        raise RelpError(f"{folder / CONFIG}: activation_fn_kwargs.{odd[0]} is not supported; expected k alone")
    if architecture != "topk":
        return architecture, None
    k = config.get("k", more.get("k"))
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise RelpError(f"{folder / CONFIG}: a topk SAE needs a whole number k ≥ 1, got {k!r}")
    return architecture, k


def _state(folder: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors in float32 at least, and the dtype that W_dec is stored in."""
    path = folder / WEIGHTS
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RelpError(f"dictionary {path} cannot be read: {error}") from error
    return floats(path, state), dtype_name(state["W_dec"]) if "W_dec" in state else ""


def _hook(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The hook name. Raises RelpError for SAEs of single heads, of reshaped activations, and for transcoders."""
    metadata = config.get("metadata") or config.get("meta") or {}
    settings = {**metadata, **config}
    hook = settings.get("hook_name") or settings.get("hook_point")
    if settings.get("hook_head_index") is not None or settings.get("hook_point_head_index") is not None:
        raise RelpError(f"{folder / CONFIG}: hook_head_index is set; SAEs of single heads are not supported")
    if config.get("reshape_activations", "none") not in ("none", None):
        raise RelpError(f"{folder / CONFIG}: reshape_activations '{config['reshape_activations']}' is not supported")
    out = settings.get("hook_name_out")
    if out not in (None, hook):
        raise RelpError(f"{folder / CONFIG}: reads {hook} and writes {out}; transcoders are not supported")
    if hook is not None and parse_site(str(hook)) is None:
        raise RelpError(
            f"{folder / CONFIG}: hook '{hook}' is no supported site; expected hook_embed, blocks.N.hook_attn_out, "
            "blocks.N.hook_mlp_out, blocks.N.hook_resid_post or blocks.N.hook_resid_pre"
        )
    if hook is None:
        return None
    layer, said = re.match(r"blocks\.(\d+)\.", hook), settings.get("hook_layer")
    if layer and said is not None and said != int(layer[1]):
        raise RelpError(f"{folder / CONFIG}: hook '{hook}' and hook_layer {said} disagree")
    return str(hook)


def _refuse(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    scale = state.get("scaling_factor", state.get("finetuning_scaling_factor"))
    if config.get("finetuning_scaling_factor") or (scale is not None and not bool((scale == 1).all())):
        raise RelpError(f"{folder / CONFIG}: finetuning_scaling_factor is not supported")


def _scaling(folder: Path, config: Mapping[str, Any]) -> float:
    """What activations are multiplied with before the SAE and divided by behind it."""
    setting = config.get("normalize_activations") or "none"
    setting = "expected_average_only_in" if setting is True else setting
    if setting == "none":
        return 1.0
    path = folder / SCALER
    if setting == "expected_average_only_in" and path.is_file():
        factor = read_object(path, _Scaler).get("scaling_factor")
        return 1.0 if factor is None else float(factor)
    reason = _REASONS.get(setting, f"known: none, {', '.join(_REASONS)}")
    raise RelpError(f"{folder / CONFIG}: normalize_activations '{setting}' is not supported: {reason}")


def _common(
    config: Mapping[str, Any], state: Mapping[str, Tensor], scaling: float, architecture: str
) -> dict[str, Any]:
    """Weights with the scaling factor, and where asked the decoder's norms, folded in."""
    w_enc, w_dec, b_dec = state["W_enc"], state["W_dec"], state["b_dec"]
    b_enc = state["b_enc"] if architecture != "gated" else torch.zeros_like(state["b_gate"])
    if config.get("rescale_acts_by_decoder_norm") and architecture in ("topk", "batchtopk"):
        norms = w_dec.norm(dim=1)
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms[:, None]
    if scaling != 1:
        w_enc, w_dec, b_dec = w_enc * scaling, w_dec / scaling, b_dec / scaling
    b_in = b_dec if config.get("apply_b_dec_to_input", True) else torch.zeros_like(b_dec)
    return {"w_enc": w_enc, "b_enc": b_enc, "w_dec": w_dec, "b_dec": b_dec, "b_in": b_in}


def save_saelens(folder: Path, d: Dictionary, hook: str, model_name: str, about: Mapping[str, Any]) -> None:
    """Write a relu or topk dictionary (b_in = b_dec) as SAELens does, in float32; `about` goes into the metadata."""
    architecture = {"relu": "standard", "topk": "topk"}[d.form]
    config: dict[str, Any] = {
        "architecture": architecture, "d_in": d.d_in, "d_sae": d.n_features, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"model_name": model_name, "hook_name": hook, "sae_lens_version": "6.0.0", **about},
    }  # fmt: skip
    if d.k is not None:
        config |= {"k": d.k, "rescale_acts_by_decoder_norm": False}
    tensors = {"W_enc": d.w_enc, "b_enc": d.b_enc, "W_dec": d.w_dec, "b_dec": d.b_dec}
    write_atomically(
        folder / WEIGHTS, save({name: t.detach().cpu().float().contiguous() for name, t in tensors.items()})
    )
    write_atomically(folder / CONFIG, json.dumps(config, indent=1) + "\n")
