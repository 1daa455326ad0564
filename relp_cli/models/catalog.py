"""The embedded models: which names exist, without importing torch."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"


def embedded_names() -> list[str]:
    """Names of the trained models that ship with the package."""
    return sorted(p.name for p in EMBEDDED.iterdir() if (p / "config.json").is_file()) if EMBEDDED.is_dir() else []
