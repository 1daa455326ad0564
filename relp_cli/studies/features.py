"""Features of a run, shown with what they mean, and the edges of its circuit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from relp_cli.errors import RelpError
from relp_cli.features.annotations import Annotations, read_annotations
from relp_cli.features.edges import feature_edges
from relp_cli.features.kinds import SCORED
from relp_cli.features.load import Dictionaries
from relp_cli.features.show import described, top_features
from relp_cli.methods.request import Progress
from relp_cli.models.model import Model
from relp_cli.report.tables import show
from relp_cli.runs.scoring import Prepared, Session, prepare_again
from relp_cli.runs.spec import ScoreSpec
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.feature_graph import METRIC, FeatureNode, parse_node
from relp_cli.spaces.features import feature_nodes, sites_of
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.sites import Site, parse_site
from relp_cli.spaces.units import ANY_POSITION
from relp_cli.tasks.counted import pairs_text


def show_features(
    spec: ScoreSpec, session: Session, scores: Scores, annotations: Path | None, console: Console, k: int = 10
) -> None:
    """The k features and error terms with the largest |score|, with annotations or contexts and promoted tokens."""
    prepared = prepare_again(spec, scores, session)
    dictionaries = session.dictionaries(spec.params["dictionary"], prepared.model)
    notes = _notes(annotations, dictionaries, prepared.model)
    table = described(top_features(scores, k), prepared.model, dictionaries, prepared.pairs, notes)
    meta = scores.meta
    if meta["rules"]:
        table.attrs["notes"] = ["rules applied (layers): " + ", ".join(f"{r}×{n}" for r, n in meta["rules"].items())]
    where = f"{meta.get('task', '?')}, {meta['model']}, dictionary {meta['dictionary']}, "
    where += pairs_text(meta["n_pairs"], meta.get("n_prompts"))
    show(
        table.drop(columns=["kind", "n"]),
        console,
        f"{meta['method']} on {where}, {meta['direction']}, {meta['metric']}",
        digits=3,
    )


def with_edges(
    spec: ScoreSpec,
    prepared: Prepared,
    session: Session,
    circuit: Circuit,
    threshold: float,
    annotations: Path | None,
    progress: Progress | None,
) -> Circuit:
    """The circuit with the edges among its nodes, and to the metric, whose |score| on the run's own pairs is > threshold.

    Raises: RelpError for annotations of features that do not exist, and as `relp.feature_edges`.
    """
    params = dict(spec.params)
    dictionary = session.dictionaries(params.pop("dictionary"), prepared.model)
    _notes(annotations, dictionary, prepared.model)  # found to be wrong before the work
    edges = feature_edges(
        prepared.model, prepared.pairs, circuit, spec.method, dictionary=dictionary, batch_size=spec.batch_size,
        progress=progress, **params,
    )  # fmt: skip
    return replace(circuit, edges=edges.above(threshold))


def show_edges(
    spec: ScoreSpec,
    prepared: Prepared,
    session: Session,
    circuit: Circuit,
    annotations: Path | None,
    console: Console,
    k: int = 10,
) -> None:
    """The k strongest edges, and what the features at their ends mean."""
    edges = circuit.edges
    assert edges is not None
    title = (
        f"{len(edges)} of {edges.meta['n_scored']} edges (|score| > {edges.meta['threshold']:g}); "
        f"{len(edges.reaching())} of {circuit.n_nodes} nodes lead to the metric"
    )
    if (n_prompts := edges.meta.get("n_prompts", math.inf)) < (n_pairs := edges.meta.get("n_pairs", 0)):
        title += f"; se: as of {n_pairs} independent pairs, though they are of {n_prompts} prompts"
    shown = edges.table().head(k)
    if shown.empty:
        console.print(title)
        return
    show(shown.drop(columns="n"), console, title, digits=3)
    ends = dict.fromkeys([*shown.source, *shown.target])
    dictionaries = session.dictionaries(spec.params["dictionary"], prepared.model)
    notes = _notes(annotations, dictionaries, prepared.model)
    nodes = [parse_node(name) for name in ends if name != METRIC]
    show(_meanings(nodes, prepared, dictionaries, notes), console, "Their nodes")


def feature_meanings(
    spec: ScoreSpec, session: Session, prepared: Prepared, scores: Scores, circuit: Circuit | None,
    annotations: Path | None, most: int = 60,
) -> pd.DataFrame:  # fmt: skip
    """node and meaning: of the circuit's features (`most`, those with the largest |score|), or where there is none, of the
    run's strongest.
    """
    found: Any = scores[SCORED]
    if circuit is None:
        table = top_features(scores, 10)
        table = table[table.kind == "feature"]
        nodes = [FeatureNode(_site(r.site), str(r.position), int(r.feature)) for r in table.itertuples()]  # type: ignore[arg-type]
    else:
        dense = {site: found.dense(site) for site in sites_of(circuit.units).sites}

        def size(node: FeatureNode) -> float:
            at = dense[node.site][:, node.feature]
            return abs(
                float(
                    at @ scores.shares.to(at)
                    if node.position == ANY_POSITION[0]
                    else at[found.labels.index(node.position)]
                )
            )

        nodes = sorted((n for n in feature_nodes(circuit) if n.feature is not None), key=size, reverse=True)
    units = dict.fromkeys((n.site, n.feature) for n in nodes[:most])  # one row per feature, wherever it is
    plain = [FeatureNode(site, ANY_POSITION[0], unit) for site, unit in units]
    dictionaries = session.dictionaries(spec.params["dictionary"], prepared.model)
    return _meanings(plain, prepared, dictionaries, _notes(annotations, dictionaries, prepared.model))


def _notes(path: Path | None, dictionaries: Dictionaries, model: Model) -> Annotations | None:
    """Annotations, of sites without a dictionary too. Raises RelpError for layers that the model does not have, and features
    that a dictionary does not have.
    """
    if path is None:
        return None
    notes = read_annotations(path)
    for site, unit in notes:
        if site.layer >= model.shape.n_layers:
            raise RelpError(f"{path}: {site.name}: {model.name} has layers 0 to {model.shape.n_layers - 1}")
        if site in dictionaries and unit >= dictionaries[site].n_features:
            raise RelpError(f"{path}: {site.name} has features up to {dictionaries[site].n_features - 1}, not {unit}")
    return notes


def _site(name: str) -> Site:
    site = parse_site(name)
    assert site is not None
    return site


def _meanings(
    nodes: Sequence[FeatureNode], prepared: Prepared, dictionaries: Dictionaries, notes: Annotations | None
) -> pd.DataFrame:
    """node and meaning, in the order of a forward pass."""
    nodes = sorted(nodes, key=lambda n: n.site)
    table = pd.DataFrame({"node": [n.name for n in nodes], "site": [n.site.name for n in nodes]})
    table["kind"] = ["feature_error" if n.feature is None else "feature" for n in nodes]
    table["feature"] = pd.array([n.feature for n in nodes], dtype="Int64")
    return described(table, prepared.model, dictionaries, prepared.pairs, notes)[["node", "meaning"]]
