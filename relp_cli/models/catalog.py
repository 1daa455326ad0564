"""The embedded models: which names exist, without importing torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EMBEDDED = Path(__file__).parent / "embedded"


def embedded_names() -> list[str]:
    """Names of the trained models that ship with the package."""
    return sorted(p.name for p in EMBEDDED.iterdir() if (p / "config.json").is_file()) if EMBEDDED.is_dir() else []


def card(name: str) -> dict[str, Any]:
    """What the training measured for an embedded model (held-out accuracy per task); {} if it has no card."""
    path = EMBEDDED / name / "card.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def shape_of(name: str) -> dict[str, int | str]:
    """An embedded model's architecture, layers, heads and width, as its configuration has them."""
    config = json.loads((EMBEDDED / name / "config.json").read_text())
    names = {"layers": ("n_layer", "num_hidden_layers"), "heads": ("n_head", "num_attention_heads"),
             "width": ("n_embd", "hidden_size")}  # fmt: skip
    sizes = {what: next(config[key] for key in keys if key in config) for what, keys in names.items()}
    return {"architecture": config["model_type"], **sizes}
