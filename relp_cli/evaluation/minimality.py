"""Single nodes of a circuit, and a circuit applied to a model: minimality, and running the circuit by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError
from relp_cli.evaluation.ablation_table import ABLATIONS
from relp_cli.evaluation.evaluate import Ablating, check_circuit, evaluate, excluded_layers, expect_circuit
from relp_cli.evaluation.node_circuits import NodeAblator
from relp_cli.methods.request import Progress
from relp_cli.models.model import Model, expect_model
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.table import space_of
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
    dictionary: Any = None,
    corpus: Path | None = None,
    batch_size: int = BATCH_SIZE,
    memory: str | int | None = None,
) -> pd.DataFrame:
    """Drop each counted node (of edge circuits: edge) of the circuit on its own: F(C) − F(C∖n), absolute and in
    faithfulness.

    dictionary, corpus, batch_size, memory: as for `evaluate`.
    Returns one row per node (kind, layer, position, unit, loss, loss_faithfulness; "layer" of a feature is its site, "unit"
    of an edge its name), largest loss first; a circuit is minimal where every loss is positive.
    Raises: RelpError for circuits of more than 2,000 counted nodes.
    """
    exclude = excluded_layers(circuit.units.space, model.shape.n_layers, exclude_layers)
    cells = circuit.units.ordered(len(circuit.labels), circuit.units.counted(exclude))
    drops = cells[circuit.mask[cells[:, 0], cells[:, 1]]].tolist()
    if not 0 < len(drops) <= MOST_NODES:
        raise RelpError(
            f"minimality drops nodes one by one: expected 1 to {MOST_NODES} counted nodes, got {len(drops)}"
        )
    table = evaluate(
        model, pairs, [circuit, *(circuit.without(*cell) for cell in drops)], ablation, exclude, metric, seed, bootstrap=100,
        corpus=corpus, progress=progress, dictionary=dictionary, batch_size=batch_size,
        memory=memory,
    )  # fmt: skip
    whole, space = table.iloc[0], space_of(circuit.units)
    rows = [
        {
            **space.row(circuit.units, unit, circuit.labels[position]),
            "loss": whole.F_C - row.F_C,
            "loss_faithfulness": whole.faithfulness - row.faithfulness,
        }
        for (position, unit), row in zip(drops, table.iloc[1:].itertuples(), strict=True)
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
    expect_model(model)
    expect_circuit(circuit)
    if circuit.units.space != "nodes":
        raise RelpError(f"only circuits of nodes can be applied, not of {circuit.units.space}; use relp.evaluate")
    check_circuit(model, circuit, circuit)
    batch = batch.to(model.device)
    donors = list(pairs) if pairs is not None else [batch]
    run = NodeAblator(model, donors, [circuit], Ablating(ablation, exclude_layers))
    with torch.no_grad():
        ablated = run.ablation.values(model, batch, ABLATIONS[ablation].tokens(batch, 0))
        hooks = run.hooks(circuit.mask[circuit.slots(batch)], ablated)
        with model.hooks(hooks):
            yield model
