"""Dictionary folders on disk, of both packages, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .formulas import LEARNING, rand


def write_learning(folder: Path, state: dict[str, Tensor], name: str | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    if name:
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name}, "buffer": {}}))
    return folder


def write_lens(
    folder: Path, config: dict[str, Any], state: dict[str, Tensor], hook: str = "blocks.1.hook_mlp_out"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"d_in": 32, "d_sae": 40, "dtype": "float64", "metadata": {"hook_name": hook}, **config}
    scale = content.pop("scale", None)
    (folder / "cfg.json").write_text(json.dumps(content))
    if scale is not None:
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    save_file(state, folder / "sae_weights.safetensors")
    return folder


def auto_encoder_state(d_in: int, d_sae: int, seed: int, bias: float = -0.3) -> dict[str, Tensor]:
    """A random AutoEncoder whose features are active about a third of the time."""
    return {
        "encoder.weight": rand(d_sae, d_in, seed=seed), "encoder.bias": rand(d_sae, seed=seed + 1) + bias,
        "decoder.weight": rand(d_in, d_sae, seed=seed + 2), "bias": rand(d_in, seed=seed + 3),
    }  # fmt: skip


def write_all_sites(root: Path, n_layers: int, d_in: int, d_sae: int, below: str = "10_40") -> Path:
    """Marks et al.'s layout: <site>/<below>/ae.pt for every site."""
    sites = ["embed", *(f"{k}_out_layer{n}" for n in range(n_layers) for k in ("attn", "mlp", "resid"))]
    for i, site in enumerate(sites):
        write_learning(root / site / below, auto_encoder_state(d_in, d_sae, 10 * i), None)
    return root


__all__ = ["LEARNING", "auto_encoder_state", "write_all_sites", "write_learning", "write_lens"]
