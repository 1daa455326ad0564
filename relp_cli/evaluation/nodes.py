"""Single nodes of a circuit, and a circuit applied to a model: minimality, and running the circuit by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from relp_cli.circuits.circuit import Circuit
from relp_cli.edges.circuit import EdgeCircuit, counted_edges
from relp_cli.errors import RelpError
from relp_cli.evaluation.ablation import Ablation
from relp_cli.evaluation.evaluate import AnyCircuit, Runs, at_batch, check_circuit, evaluate
from relp_cli.features.circuit import FeatureCircuit, counted_sites
from relp_cli.methods.request import Progress
from relp_cli.models.model import Model
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.pairs import PairBatch

MOST_NODES = 2000


Drop = tuple[dict[str, Any], AnyCircuit]  # what is dropped, and the circuit without it


def _nodes(circuit: Circuit, exclude: int) -> Iterator[Drop]:
    for kind, mask in circuit.masks.items():
        for index in (tuple(i) for i in mask.nonzero().tolist() if i[0] >= exclude):
            left = mask.clone()
            left[index] = False
            unit = index[2] if len(index) == 3 else None
            about = {"kind": kind, "layer": index[0], "position": circuit.labels[index[1]], "unit": unit}
            yield about, replace(circuit, masks={**circuit.masks, kind: left})


def _features(circuit: FeatureCircuit, exclude: int) -> Iterator[Drop]:
    counted = counted_sites(tuple(circuit.features), exclude)
    for node in circuit.nodes():
        if node.site not in counted:
            continue
        position = circuit.labels.index(node.position)
        features, errors = dict(circuit.features), dict(circuit.errors)
        masks, index = (errors, (position,)) if node.feature is None else (features, (position, node.feature))
        masks[node.site] = masks[node.site].clone()
        masks[node.site][index] = False
        kind = "feature_error" if node.feature is None else "feature"
        about = {"kind": kind, "layer": node.site.name, "position": node.position, "unit": node.feature}
        yield about, replace(circuit, features=features, errors=errors, edges=None)


def _edges(circuit: EdgeCircuit, exclude: int) -> Iterator[Drop]:
    counted = counted_edges(circuit.graph, exclude)
    for position, writer, reader in (circuit.mask & counted).nonzero().tolist():
        left = circuit.mask.clone()
        left[position, writer, reader] = False
        about = {"kind": "edges", "position": circuit.labels[position], "unit": circuit.graph.name(writer, reader)}
        yield about, replace(circuit, mask=left)


_DROPS: Mapping[type, Callable[..., Iterator[Drop]]] = {
    Circuit: _nodes,
    FeatureCircuit: _features,
    EdgeCircuit: _edges,
}


def minimality(
    model: Model,
    pairs: Sequence[PairBatch],
    circuit: AnyCircuit,
    ablation: str = "mean",
    exclude_layers: int | None = None,
    metric: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    dictionary: Any = None,
    corpus: Path | None = None,
) -> pd.DataFrame:
    """Drop each counted node (of edge circuits: edge) of the circuit on its own: F(C) − F(C∖n), absolute and in
    faithfulness.

    dictionary, corpus: as for `evaluate`.
    Returns one row per node (kind, layer, position, unit, loss, loss_faithfulness; "layer" of a feature is its site, "unit"
    of an edge its name), largest loss first; a circuit is minimal where every loss is positive.
    Raises: RelpError for circuits of more than 2,000 counted nodes.
    """
    default = 0 if isinstance(circuit, EdgeCircuit) else model.shape.n_layers // 3
    exclude = default if exclude_layers is None else exclude_layers
    drops = list(_DROPS[type(circuit)](circuit, exclude))
    if not 0 < len(drops) <= MOST_NODES:
        raise RelpError(
            f"minimality drops nodes one by one: expected 1 to {MOST_NODES} counted nodes, got {len(drops)}"
        )
    table = evaluate(
        model, pairs, [circuit, *(left for _, left in drops)], ablation, exclude, metric, seed, bootstrap=100,
        corpus=corpus, progress=progress, dictionary=dictionary,
    )  # fmt: skip
    whole = table.iloc[0]
    rows = [
        {**about, "loss": whole.F_C - row.F_C, "loss_faithfulness": whole.faithfulness - row.faithfulness}
        for (about, _), row in zip(drops, table.iloc[1:].itertuples(), strict=True)
    ]
    return pd.DataFrame(rows).sort_values("loss", ascending=False, ignore_index=True)


@contextmanager
def applied(
    model: Model,
    circuit: Circuit,
    batch: PairBatch,
    ablation: str = "mean",
    exclude_layers: int = 0,
    pairs: Sequence[PairBatch] | None = None,
) -> Iterator[Model]:
    """Inside the block, `model.logits(batch.original)` is what the circuit alone computes.

    Everything outside the circuit is ablated, with means over `pairs` (default: the batch itself).
    """
    kinds = tuple(NODE_KINDS[kind] for kind in circuit.masks)
    check_circuit(model, circuit, kinds)
    batch = batch.to(model.device)
    donors = list(pairs) if pairs is not None else [batch]
    runs = Runs(
        model, METRICS["logit_diff"], kinds, exclude_layers, [batch], Ablation.prepare(model, donors, ablation, kinds)
    )
    values = runs.ablation.values(model, batch, batch)
    masks = {kind: at_batch(mask, circuit.labels, batch) for kind, mask in circuit.masks.items()}
    with torch.no_grad(), model.hooks(runs.hooks(masks, values)):
        yield model
