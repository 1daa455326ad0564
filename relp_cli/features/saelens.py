"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, of versions before and after 6; reading and writing.

Formulas: https://github.com/jbloomAus/SAELens, `sae_lens/saes/`. What a folder asks for beyond them is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from relp_cli.errors import RelpError, unknown
from relp_cli.features.dictionary import Dictionary
from relp_cli.features.sites import parse_site
from relp_cli.files import write_atomically
from relp_cli.models.model import Model

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
# architecture → form of the encoder; BatchTopK keeps what is above one threshold once it is trained
FORMS = {"standard": "relu", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu", "gated": "gated"}
_REASONS = {
    "layer_norm": "its decoder depends on each activation's mean and norm, so features alone do not reconstruct it",
    "constant_norm_rescale": "its decoder depends on each activation's norm, so features alone do not reconstruct it",
    "expected_average_only_in": f"the folder has no {SCALER} with the scaling factor; fold it into the weights",
}


def load_saelens(folder: Path) -> tuple[Dictionary, str | None]:
    """The dictionary of one folder, and the hook name that its configuration gives (None where it gives none).

    Raises: RelpError, naming the setting, for architectures, activations, normalisations and hooks that are not supported.
    """
    config = _config(folder)
    architecture, k = _architecture(folder, config)
    state = _state(folder)
    hook = _hook(folder, config)
    _refuse(folder, config, state)
    names = {"W_enc", "W_dec", "b_dec", *(("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",))}
    names |= {"threshold"} if architecture == "jumprelu" else set()
    if missing := sorted(names - state.keys()):
        raise RelpError(
            f"dictionary {folder}: a {architecture} SAE needs the tensor '{missing[0]}', {WEIGHTS} has none"
        )
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
    return Dictionary(FORMS[architecture], f"SAELens {architecture}", **common, **parts), hook


def other_model(folder: Path, model: Model) -> list[str]:
    """[the model that a folder's metadata names], where that is not this one; [] for folders that do not say.

    Ours say their model's revision. Others' names are matched loosely ("gpt2-small" and "gpt2" are the same).
    """
    if not (folder / CONFIG).is_file():
        return []
    config = _config(folder)
    about = {**config, **(config.get("metadata") or {})}
    name = str(about.get("model_name") or "")
    if about.get("revision"):
        return [name] if about["revision"] != model.revision else []
    theirs, mine = (n.rpartition("/")[2].lower() for n in (name, model.name))
    return [name] if theirs and theirs not in mine and mine not in theirs else []


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise RelpError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RelpError(f"{folder / CONFIG}: expected a JSON object")
    return content


def _architecture(folder: Path, config: Mapping[str, Any]) -> tuple[str, int | None]:
    """The architecture, and k where it keeps the k largest. Older folders say "standard" with activation topk."""
    architecture = str(config.get("architecture", "standard"))
    if architecture not in FORMS:
        raise unknown("SAE architecture", architecture, FORMS, f"{folder / CONFIG}: ")
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    if activation == "topk" and architecture == "standard":
        architecture = "topk"
    elif activation not in ("relu", "topk"):
        raise RelpError(f"{folder / CONFIG}: activation '{activation}' is not supported; expected relu or topk")
    if architecture != "topk":
        return architecture, None
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise RelpError(f"{folder / CONFIG}: a topk SAE needs a whole number k ≥ 1, got {k!r}")
    return architecture, k


def _state(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise RelpError(f"dictionary {folder / WEIGHTS} cannot be read: {error}") from error


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
    return None if hook is None else str(hook)


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
        factor = json.loads(path.read_text()).get("scaling_factor")
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
    """Write a relu or topk dictionary (b_in = b_dec) as SAELens does, in half precision; `about` goes into the metadata."""
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
        folder / WEIGHTS, save({name: t.detach().cpu().half().contiguous() for name, t in tensors.items()})
    )
    write_atomically(folder / CONFIG, json.dumps(config, indent=1) + "\n")
