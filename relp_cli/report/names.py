"""How node kinds are written in tables and figures, and checks of tables that come in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from relp_cli.errors import RelpError

KIND_TITLES = {
    "resid_pre": "residual", "attn_out": "attention", "mlp_out": "MLP", "head": "heads", "mlp_neuron": "MLP neurons",
    "query": "queries", "key": "keys", "value": "values", "attn_dim": "attention dimensions",
    "mlp_dim": "MLP dimensions", "resid_dim": "residual dimensions", "feature": "features",
    "attn_dim+mlp_dim+resid_dim": "dimensions of attention, MLP, residual",
    "feature_no_attn_mlp_errors": "features without attention/MLP errors", "feature_no_errors": "features without errors",
}  # fmt: skip
# Kinds of sites with dictionaries.
SITE_TITLES = {"embed": "embedding", "attn": "attention", "mlp": "MLP", "resid": "residual"}
# What else than task, model, method and kind tells two rows of one table apart (job grids).
MORE_KEYS = ("direction", "metric", "ablation", "seed")


def kind_title(kind: str) -> str:
    """attn_out → attention; a mixed head+mlp_out → heads + MLP; of more than two kinds only their number."""
    if kind in KIND_TITLES:
        return KIND_TITLES[kind]
    parts = str(kind).split("+")
    return " + ".join(KIND_TITLES.get(part, part) for part in parts) if len(parts) < 3 else f"{len(parts)} node kinds"


def counted(kinds: Iterable[str]) -> str:
    """What a circuit of these kinds consists of: "edges" or "nodes"."""
    return "edges" if set(kinds) == {"edges"} else "nodes"


def model_title(model: str) -> str:
    """The last part of a hub name or folder."""
    return Path(str(model)).name


def need(table: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Raises RelpError unless `table` has rows and these columns."""
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise RelpError(f"{what}: the table has no column '{missing[0]}' (it has {', '.join(map(str, table.columns))})")
    if table.empty:
        raise RelpError(f"{what}: the table has no rows")


def varying(table: pd.DataFrame, columns: Sequence[str] = MORE_KEYS) -> list[str]:
    """Those of `columns` that the table has with more than one value."""
    return [name for name in columns if name in table.columns and table[name].nunique(dropna=False) > 1]
