"""A run's scores and circuit as small tables: the strongest nodes, and where a circuit's nodes are."""

from __future__ import annotations

import pandas as pd

from relp_cli.report.names import SITE_TITLES
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import SPACES, space_of
from relp_cli.spaces.top import top_units
from relp_cli.spaces.units import Units


def top_nodes(scores: Scores, k: int = 10) -> pd.DataFrame:
    """The k units of each kind with the largest |mean score| (`spaces.top`); of features, kinds together."""
    parts = [scores.only([kind]) for kind in scores]
    return pd.concat([top_units(part, k) for part in parts], ignore_index=True)


def circuit_counts(circuit: Circuit) -> dict[str, tuple[pd.DataFrame, int]]:
    """Title of a kind → how many nodes the circuit keeps, Int[layer, position], with position labels as columns ("any": of
    a circuit that holds at any position), and how many it could keep.
    """
    labels = ["any" if label == "*" else label for label in circuit.labels]
    found = space_of(circuit.units).counts(circuit)
    title = {kind: f"{name}: features and error terms" for kind, name in SITE_TITLES.items()}
    return {title.get(kind, kind): (pd.DataFrame(n.numpy(), columns=labels), of) for kind, (n, of) in found.items()}


def of_all_kinds(evaluation: pd.DataFrame, units: Units) -> bool:
    """Whether an evaluation's circuits were selected from all of these units, not from some of their kinds alone."""
    kinds = set(evaluation["kind"]) if "kind" in evaluation else set()
    return kinds <= {SPACES[units.space].called(units.kinds)}
