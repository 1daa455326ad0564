"""Hypothesis tests of a circuit (Shi et al. 2024): what they need is measured in one pass over the pairs, with one ablator.

1. s(M), s(C) and s(M∖C) of the circuit, and of random circuits of its size (`Circuit.random_like`, the evaluator's baseline).
2. s of the circuit with a random path added ("inflated"), and of that less one of the path's units.
3. s of the circuit less each of its units.
4. The tests, their nulls and their verdicts: `verdicts`. Pairs that share their original prompt count as one, by their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError
from relp_cli.evaluation.evaluate import Ablating, ablator, check_circuit, excluded_layers, measured
from relp_cli.evaluation.verdicts import Levels, Measured, rows, unit_rows
from relp_cli.methods.request import Progress
from relp_cli.models.model import Model
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.table import space_of
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.pairs import PairBatch

TRIES = 100  # paths drawn until one leaves the circuit


def circuit_tests(
    model: Model,
    pairs: Sequence[PairBatch],
    circuit: Circuit,
    levels: Levels | None = None,
    ablation: str = "mean",
    exclude_layers: int | None = None,
    metric: str | None = None,
    seed: int = 0,
    corpus: Path | None = None,
    progress: Progress | None = None,
    dictionary: Any = None,
    batch_size: int = BATCH_SIZE,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Equivalence, independence, minimality, sufficiency and partial necessity of one circuit.

    levels: chances and counts (None: their defaults); all else as for `evaluate`.
    Returns the table of tests (`verdicts.rows`) and that of units (`verdicts.unit_rows`), the least needed first.
    Raises: RelpError for a circuit without counted units, and whatever `evaluate` raises.
    """
    how = levels or Levels()
    how.check()
    check_circuit(model, circuit, circuit)
    exclude = excluded_layers(circuit.units.space, model.shape.n_layers, exclude_layers)
    if not circuit.counted(exclude):
        raise RelpError(f"nothing to test: the circuit has no unit in layers from {exclude} up")
    row = METRICS[metric or str(circuit.meta.get("metric", "logit_diff"))]
    run = ablator(model, pairs, [circuit], Ablating(ablation, exclude, seed, corpus, dictionary, batch_size))
    among, generator = run.drawable(circuit), torch.Generator().manual_seed(seed)
    references = [circuit.random_like(seed + i, exclude, among) for i in range(how.references)]
    paths = inflations(circuit, exclude, how.references, among, generator)
    cells = circuit.units.ordered(len(circuit.labels), circuit.units.counted(exclude))
    cells = cells[circuit.mask[cells[:, 0], cells[:, 1]]]
    tested = cells[torch.randperm(len(cells), generator=generator)[: how.units].sort().values].tolist()
    parts = [[circuit], references, [c for c, _ in paths], [c for _, c in paths], [circuit.without(*c) for c in tested]]
    values = measured(run, model, row, [c for part in parts for c in part], pairs, progress, 1 + len(references))
    n_pairs, n_prompts, starts = values.n, values.n_prompts, np.cumsum([0, *map(len, parts)])
    values.of_prompts()  # the tests count independent observations

    def of(side: str, part: int) -> np.ndarray:
        found = [values.get(side, i) for i in range(starts[part], starts[part + 1])]
        return np.stack(found) if found else np.zeros((0, values.n))

    at = Measured(
        values.get("full"), of("circuit", 0)[0], of("complement", 0)[0], of("circuit", 1), of("complement", 1),
        of("circuit", 2), of("circuit", 3), of("circuit", 4), row.zero_grad_at_original,
        "pairs" if n_prompts == n_pairs else "prompts",
    )  # fmt: skip
    space = space_of(circuit.units)
    names = [space.row(circuit.units, unit, circuit.labels[position]) for position, unit in tested]
    table, units = pd.DataFrame(rows(at, how, seed)), pd.DataFrame(unit_rows(at, how, names))
    if len(tested) < len(cells):
        at_minimality = table.test == "minimality"
        said = f"{len(tested)} of the circuit's {len(cells)} units, drawn at random"
        table.loc[at_minimality, "note"] = [f"{said}; {note}".rstrip("; ") for note in table.note[at_minimality]]
    about: dict[str, Any] = {
        "ablation": ablation,
        "metric": row.name,
        "exclude_layers": exclude,
        "n_pairs": n_pairs,
        "n_prompts": n_prompts,
        "seed": seed,
    }
    about |= {"n_nodes": circuit.counted(exclude), "n_possible": circuit.possible(exclude)}
    return table.assign(**about), units.sort_values("change", ignore_index=True) if len(units) else units


def inflations(
    circuit: Circuit, exclude: int, count: int, among: Tensor | None, generator: torch.Generator
) -> list[tuple[Circuit, Circuit]]:
    """`count` times the circuit with a random path, and the same without one of the units that the path brought in, at random.

    Fewer, or none, where paths never leave the circuit. among: the units that paths may take (None: all that are counted).
    """
    space, counted = space_of(circuit.units), circuit.units.counted(exclude)[None]
    allowed = (counted if among is None else counted & among).expand_as(circuit.mask)
    out: list[tuple[Circuit, Circuit]] = []
    for _ in range(count):
        for _ in range(TRIES):
            path = space.path(circuit.units, allowed, generator)
            new = [cell for cell in path if allowed[cell] and not circuit.mask[cell]]
            if new:
                break
        else:
            return out
        mask = circuit.mask.clone()
        for cell in new:
            mask[cell] = True
        inflated = replace(circuit, mask=mask, edges=None)
        out.append((inflated, inflated.without(*new[int(torch.randint(len(new), (1,), generator=generator))])))
    return out
