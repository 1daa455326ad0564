"""A run's scores and circuit as small tables: the strongest nodes, and where a circuit's nodes are."""

from __future__ import annotations

import numpy as np
import pandas as pd

from relp_cli.circuits.circuit import Circuit
from relp_cli.edges.circuit import EdgeCircuit
from relp_cli.edges.scores import EdgeScores
from relp_cli.features.circuit import FeatureCircuit
from relp_cli.features.scores import FeatureScores
from relp_cli.features.show import top_features
from relp_cli.features.sites import Site
from relp_cli.methods.scores import NodeScores, Scores
from relp_cli.report.names import SITE_TITLES


def top_nodes(scores: Scores, k: int = 10) -> pd.DataFrame:
    """The k nodes of each kind with the largest |mean score|: kind, layer, position, unit (missing for vector nodes), score,
    se (standard error over the pairs that have the position), n."""
    rows = [row for kind in scores.values() for row in _top_of(kind, k)]
    # of features, "layer" is the site's name
    table = pd.DataFrame(rows, columns=["kind", "layer", "position", "unit", "score", "se", "n"])
    return table.astype({"unit": "Int64"})


def _top(scores: NodeScores, k: int) -> list[tuple[object, ...]]:
    mean, variance = scores.mean.double().numpy(), scores.variance.double().numpy()
    order = np.argsort(-np.abs(np.nan_to_num(mean.ravel())), kind="stable")[:k]
    rows: list[tuple[object, ...]] = []
    for at in zip(*np.unravel_index(order, mean.shape), strict=True):
        n = int(scores.n[int(at[1])])
        error = float(np.sqrt(variance[at] / n)) if n > 1 else float("nan")
        unit = int(at[2]) if len(at) == 3 else None
        rows.append((scores.kind, int(at[0]), scores.labels[int(at[1])], unit, float(mean[at]), error, n))
    return rows


def _top_of(scores: NodeScores | EdgeScores | FeatureScores, k: int) -> list[tuple[object, ...]]:
    """Edges stand under their reader's layer (logits: the number of layers), named where nodes have a position."""
    if isinstance(scores, FeatureScores):
        rows = top_features(scores, k).to_dict("records")
        columns = ("kind", "site", "position", "feature", "score", "se", "n")
        return [tuple(None if r[name] is pd.NA else r[name] for name in columns) for r in rows]
    if not isinstance(scores, EdgeScores):
        return _top(scores, k)
    names = scores.edge_names()
    found: list[tuple[object, ...]] = []
    for _, _, label, unit, score, error, n in _top(scores.flat(), k):
        name = names[unit]  # type: ignore[call-overload]
        reader = name.partition("->")[2].partition(".")[0].strip("am")
        layer = int(reader) if reader.isdigit() else scores.graph.n_layers
        found.append((scores.kind, layer, name if label == "*" else f"{name} @ {label}", None, score, error, n))
    return found


def circuit_counts(circuit: Circuit | EdgeCircuit | FeatureCircuit) -> dict[str, pd.DataFrame]:
    """Node kind → how many nodes the circuit keeps, Int[layer, position], with position labels as columns. Of a circuit
    that holds at any position there is one column, "any"."""
    labels = ["any" if label == "*" else label for label in circuit.labels]
    if isinstance(circuit, FeatureCircuit):  # per site kind, error terms counted with the features
        kept = {site: (mask.sum(1) + circuit.errors[site]).tolist() for site, mask in circuit.features.items()}
        return {
            title: pd.DataFrame([kept[site] for site in sites], columns=labels)
            for title, sites in _sites_by_kind(circuit).items()
        }
    return {
        kind: pd.DataFrame(mask.reshape(*mask.shape[:2], -1).sum(-1).numpy(), columns=labels)
        for kind, mask in circuit.masks.items()
    }


def possible(circuit: Circuit | EdgeCircuit | FeatureCircuit, kind: str) -> int:
    """How many nodes a circuit could keep of one of `circuit_counts`' kinds."""
    if isinstance(circuit, FeatureCircuit):
        sites = _sites_by_kind(circuit)[kind]
        return sum(circuit.features[s].numel() + circuit.has_error(s) * len(circuit.labels) for s in sites)
    return circuit.masks[kind].numel() if isinstance(circuit, Circuit) else circuit.n_possible


def _sites_by_kind(circuit: FeatureCircuit) -> dict[str, list[Site]]:
    """Title → a feature circuit's sites of one kind."""
    kinds = dict.fromkeys(site.kind for site in circuit.features)
    return {
        f"{SITE_TITLES[kind]}: features and error terms": [s for s in circuit.features if s.kind == kind]
        for kind in kinds
    }
