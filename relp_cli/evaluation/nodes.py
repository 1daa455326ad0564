"""Single nodes of a circuit, and a circuit applied to a model: minimality, and running the circuit by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pandas as pd
import torch

from relp_cli.circuits.circuit import Circuit
from relp_cli.errors import RelpError
from relp_cli.evaluation.ablation import Ablation
from relp_cli.evaluation.evaluate import Progress, Runs, at_batch, check_circuit, evaluate
from relp_cli.models.model import Model
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.pairs import PairBatch

MOST_NODES = 2000


def minimality(
    model: Model,
    pairs: Sequence[PairBatch],
    circuit: Circuit,
    ablation: str = "mean",
    exclude_layers: int | None = None,
    metric: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Drop each counted node of the circuit on its own: F(C) − F(C∖n), absolute and in faithfulness.

    Returns one row per node (kind, layer, position, unit, loss, loss_faithfulness), largest loss first; a circuit is
    minimal where every loss is positive. Raises RelpError for circuits of more than 2,000 counted nodes.
    """
    exclude = model.shape.n_layers // 3 if exclude_layers is None else exclude_layers
    nodes = [
        (kind, tuple(index))
        for kind, mask in circuit.masks.items()
        for index in mask.nonzero().tolist()
        if index[0] >= exclude
    ]
    if not 0 < len(nodes) <= MOST_NODES:
        raise RelpError(
            f"minimality drops nodes one by one: expected 1 to {MOST_NODES} counted nodes, got {len(nodes)}"
        )
    without = []
    for kind, index in nodes:
        mask = circuit.masks[kind].clone()
        mask[index] = False
        without.append(replace(circuit, masks={**circuit.masks, kind: mask}))
    table = evaluate(
        model, pairs, [circuit, *without], ablation, exclude, metric, seed, bootstrap=100, progress=progress
    )
    whole = table.iloc[0]
    rows = [
        {
            "kind": kind,
            "layer": index[0],
            "position": circuit.labels[index[1]],
            "unit": index[2] if len(index) == 3 else None,
            "loss": whole.F_C - row.F_C,
            "loss_faithfulness": whole.faithfulness - row.faithfulness,
        }
        for (kind, index), row in zip(nodes, table.iloc[1:].itertuples(), strict=True)
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
