"""Published circuits (datasets/circuits/*.json) as `Circuit`s, to compare found ones with."""

from __future__ import annotations

import json

import torch

from relp_cli.config.paths import data_root
from relp_cli.errors import unknown
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.nodes import node_circuit
from relp_cli.spaces.units import ANY_POSITION


def reference_names() -> list[str]:
    """Names of the shipped reference circuits."""
    return sorted(p.stem for p in (data_root("datasets") / "circuits").glob("*.json"))


def reference_circuit(name: str) -> Circuit:
    """A published circuit without positions. Raises RelpError for an unknown name."""
    if name not in reference_names():
        raise unknown("reference circuit", name, reference_names())
    content = json.loads((data_root("datasets") / "circuits" / f"{name}.json").read_text())
    mask = torch.zeros(content["n_layers"], 1, content["n_units"], dtype=torch.bool)
    for layer, unit in (node for group in content["groups"].values() for node in group):
        mask[layer, 0, unit] = True
    return node_circuit({content["kind"]: mask}, ANY_POSITION, {"model": content["model"], "source": content["source"]})
