"""Folders of the `dictionary_learning` package: `ae.pt` (a state dict) and `config.json`.

The class is the config's `trainer.dict_class`; where there is none (Marks et al.'s), it follows from the tensors' names.
Formulas: https://github.com/saprmarks/dictionary_learning, `dictionary.py` and `trainers/`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relp_cli.errors import RelpError, unknown
from relp_cli.features.dictionary import Dictionary
from relp_cli.features.folder import Settings, agree, dtype_name, floats, read_object
from relp_cli.spaces.sites import SITE_KINDS, Site

State = Mapping[str, Tensor]
WEIGHTS, CONFIG = "ae.pt", "config.json"
COUNTS = ("k", "group_sizes")  # tensors that hold counts
# submodule_name, as the package's own scripts write it
_SUBMODULE = re.compile(r"(?P<kind>attn|attention|mlp|resid)(?:_out|_post)?_layer_?(?P<layer>\d{1,6})")


class _Trainer(Settings):
    dict_class: str | None = None
    activation_dim: int | None = None
    dict_size: int | None = None
    k: int | None = None
    layer: int | None = None
    submodule_name: str | None = None
    lm_name: str | None = None


class _Buffer(Settings):
    d_submodule: int | None = None
    io: str | None = None


class _Config(_Trainer):
    trainer: _Trainer | None = None
    buffer: _Buffer | None = None


@dataclass(frozen=True)
class DictClass:
    """One class: the tensors of its state dict (`optional` ones may be missing), and how they make a Dictionary."""

    name: str
    tensors: frozenset[str]
    build: Callable[[State], Dictionary]
    optional: frozenset[str] = frozenset()


def _linear(s: State) -> dict[str, Any]:
    return {"w_enc": s["encoder.weight"].mT, "w_dec": s["decoder.weight"].mT}


def _auto_encoder(s: State) -> Dictionary:
    return Dictionary("relu", "AutoEncoder", **_linear(s), b_enc=s["encoder.bias"], b_dec=s["bias"], b_in=s["bias"])


def _auto_encoder_new(s: State) -> Dictionary:
    bias = s["decoder.bias"]
    return Dictionary(
        "relu", "AutoEncoderNew", **_linear(s), b_enc=s["encoder.bias"], b_dec=bias, b_in=torch.zeros_like(bias)
    )


def _gated(s: State) -> Dictionary:
    """Features are multiplied with the norms of their decoder rows, by which decoding divides."""
    norms, b = s["decoder.weight"].norm(dim=0), s["decoder_bias"]
    return Dictionary(
        "gated", "GatedAutoEncoder", w_enc=s["encoder.weight"].T, w_dec=unit_rows(s["decoder.weight"].T),
        b_enc=torch.zeros_like(norms), b_dec=b, b_in=b, f_scale=norms,
        gate_bias=s["gate_bias"], mag_scale=s["r_mag"].exp(), mag_bias=s["mag_bias"],
    )  # fmt: skip


def _top_k(s: State) -> Dictionary:
    common = {**_linear(s), "b_enc": s["encoder.bias"], "b_dec": s["b_dec"], "b_in": s["b_dec"]}
    return Dictionary("topk", "AutoEncoderTopK", **common, k=_whole(s["k"]))


def _whole(k: Tensor) -> int:
    if k.numel() != 1 or k.item() != int(k.item()):
        raise ValueError(f"expected one whole number k, got {k.tolist()}")
    return int(k.item())


def _batch_top_k(s: State) -> Dictionary:
    """In use, BatchTopK keeps what is above one threshold."""
    common = {**_linear(s), "b_enc": s["encoder.bias"], "b_dec": s["b_dec"], "b_in": s["b_dec"]}
    return Dictionary("jumprelu", "BatchTopKSAE", **common, threshold=s["threshold"].expand_as(s["encoder.bias"]))


def _matryoshka(s: State) -> Dictionary:
    return Dictionary(
        "jumprelu", "MatryoshkaBatchTopKSAE", w_enc=s["W_enc"], b_enc=s["b_enc"], w_dec=s["W_dec"], b_dec=s["b_dec"],
        b_in=s["b_dec"], threshold=s["threshold"].expand_as(s["b_enc"]),
    )  # fmt: skip


def _jump_relu(s: State) -> Dictionary:
    """b_dec is not taken from the input; features carry the norms of their decoder rows."""
    return Dictionary(
        "jumprelu", "JumpReluAutoEncoder", w_enc=s["W_enc"], b_enc=s["b_enc"], w_dec=unit_rows(s["W_dec"]),
        b_dec=s["b_dec"], b_in=torch.zeros_like(s["b_dec"]), threshold=s["threshold"], f_scale=s["W_dec"].norm(dim=1),
    )  # fmt: skip


def unit_rows(w_dec: Tensor) -> Tensor:
    """Rows divided by their norms; rows of zeros stay."""
    norms = w_dec.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, w_dec / norms, w_dec)


_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
_WEIGHTS = {"W_enc", "b_enc", "W_dec", "b_dec"}
_GATES = {"decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"}
CLASSES = {
    row.name: row
    for row in (
        DictClass("AutoEncoder", frozenset(_LINEAR | {"bias"}), _auto_encoder),
        DictClass("AutoEncoderNew", frozenset(_LINEAR | {"decoder.bias"}), _auto_encoder_new),
        DictClass("GatedAutoEncoder", frozenset(_GATES), _gated),
        DictClass("AutoEncoderTopK", frozenset(_LINEAR | {"b_dec", "k"}), _top_k, frozenset({"threshold"})),
        DictClass("BatchTopKSAE", frozenset(_LINEAR | {"b_dec", "threshold"}), _batch_top_k, frozenset({"k"})),
        DictClass("JumpReluAutoEncoder", frozenset(_WEIGHTS | {"threshold"}), _jump_relu),
        DictClass(
            "MatryoshkaBatchTopKSAE", frozenset(_WEIGHTS | {"threshold", "group_sizes"}), _matryoshka, frozenset({"k"})
        ),
    )
}


def load_dictionary_learning(folder: Path) -> tuple[Dictionary, Site | None]:
    """The dictionary of one folder, and the site that its configuration gives (None where it gives none).

    Raises: RelpError for an unreadable file, an unknown class, tensors that are not those of the class or not of the sizes
    that the configuration states, and dictionaries that read one activation and write another.
    """
    path, config = folder / WEIGHTS, settings(folder)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead it to
        raise RelpError(
            f"dictionary {path} is not a state dict of tensors saved by torch ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise RelpError(f"dictionary {path}: expected a state dict of tensors")
    row = _class_of(folder, frozenset(state), config.get("dict_class"))
    found = row.build(floats(path, state, COUNTS))
    said = {
        "activation_dim": (config.get("activation_dim"), found.d_in),
        "d_submodule": (config.get("d_submodule"), found.d_in),
        "dict_size": (config.get("dict_size"), found.n_features),
        "k": (config.get("k") if found.form == "topk" else None, found.k),
    }
    agree(folder / CONFIG, said)
    if config.get("io") not in (None, "out"):
        raise RelpError(
            f"{folder / CONFIG}: buffer.io '{config['io']}' is not supported; expected out (what a module adds)"
        )
    return replace(found, stored=dtype_name(state[next(n for n in state if n not in COUNTS)])), _site(folder, config)


def settings(folder: Path) -> dict[str, Any]:
    """What config.json says, of the trainer and of the activations it had; {} where there is none."""
    if not (folder / CONFIG).is_file():
        return {}
    config = read_object(folder / CONFIG, _Config)
    return {**(config.get("buffer") or {}), **(config.get("trainer") or config)}


def _site(folder: Path, config: Mapping[str, Any]) -> Site | None:
    """The site that submodule_name names, if it does. Raises RelpError where `layer` says another."""
    match = _SUBMODULE.fullmatch(config.get("submodule_name") or "")
    if match is None:
        return None
    if config.get("layer") not in (None, int(match["layer"])):
        raise RelpError(f"{folder / CONFIG}: submodule_name '{match[0]}' and layer {config['layer']} disagree")
    kind = "attn" if match["kind"] == "attention" else match["kind"]
    assert kind in SITE_KINDS
    return Site(kind, int(match["layer"]))


def _class_of(folder: Path, names: frozenset[str], said: str | None) -> DictClass:
    if said is not None:
        asked = said.rpartition(".")[2].rstrip("'>")
        if asked not in CLASSES:
            raise unknown("dictionary class", asked, CLASSES, f"{folder}/{CONFIG}: ")
        row = CLASSES[asked]
        missing, extra = sorted(row.tensors - names), sorted(names - row.tensors - row.optional)
        if missing or extra:
            wrong = f"misses '{missing[0]}'" if missing else f"has unexpected '{extra[0]}'"
            raise RelpError(f"dictionary {folder}: {CONFIG} says {asked}, but {WEIGHTS} {wrong}")
        return row
    fitting = [row for row in CLASSES.values() if row.tensors <= names <= row.tensors | row.optional]
    if len(fitting) != 1:
        found = " or ".join(row.name for row in fitting) or "none of " + ", ".join(CLASSES)
        raise RelpError(f"dictionary {folder}: its tensors ({', '.join(sorted(map(str, names)))}) fit {found}; "
                        f"{CONFIG} must name trainer.dict_class")  # fmt: skip
    return fitting[0]
