"""Faithfulness and completeness of circuits of any space (RelP section 5.2, Marks et al.).

1. Ablation values are computed once per batch of held-out pairs.
2. F(M): nothing ablated; F(∅): every unit ablated, in the layers that are not excluded.
3. F(C), F(M∖C): every unit outside, inside the circuit ablated, exactly at its site; everything downstream recomputes.
4. faithfulness = (F(C) − F(∅)) / (F(M) − F(∅)), completeness = the same of the complement: ratios of means over prompts,
   with bootstrap intervals over prompts (pairs that share their original are drawn together, `tasks.shared`).
What is ablated how is the space's own affair (`SpaceRow.ablator`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.config.memory import bytes_of
from relp_cli.errors import RelpError
from relp_cli.evaluation.ablation_table import ABLATIONS, ablation_row
from relp_cli.evaluation.donors import with_donors
from relp_cli.evaluation.ratios import Values, ratio_table, tau_of, ties_note
from relp_cli.methods.memory import plan
from relp_cli.methods.request import Progress
from relp_cli.methods.room import Room, fitting
from relp_cli.models.model import Model, expect_model
from relp_cli.registry import load
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.table import SPACES, space_of
from relp_cli.tasks.metrics import Metric, metric_of
from relp_cli.tasks.pairs import PairBatch, batches_of
from relp_cli.tasks.parts import parts_of


@dataclass(frozen=True)
class Ablating:
    """What an evaluation was asked for. exclude: how many of the first layers run as they are and are not counted."""

    ablation: str
    exclude: int
    seed: int = 0
    corpus: Path | None = None
    dictionary: Any = None
    batch_size: int = BATCH_SIZE

    def batches(self, pairs: Sequence[PairBatch], device: torch.device | str) -> list[tuple[PairBatch, Tensor | None]]:
        """The pairs in batches, and the token ids that the ablated values come from."""
        return with_donors(ABLATIONS[self.ablation], list(pairs), self.seed, self.batch_size, device)


class Ablator(Protocol):
    """Runs a model with units of one space ablated. Made from (model, pairs, circuits, Ablating)."""

    def __init__(
        self, model: Model, pairs: Sequence[PairBatch], circuits: Sequence[Circuit], how: Ablating
    ) -> None: ...

    def batches(self) -> Iterator[tuple[PairBatch, Any]]:
        """The pairs in batches, with the ablation values of each."""

    def logits(
        self, batch: PairBatch, keep: Bool[Tensor, "pos unit"] | None, ablated: Any
    ) -> Float[Tensor, "batch *read vocab"]:
        """Of the originals, with every counted unit ablated that is not in `keep` (None: all of them)."""

    def drawable(self, circuit: Circuit) -> Bool[Tensor, "pos unit"] | None:
        """What random circuits are drawn from; None: all counted units."""


def excluded_layers(space: str, n_layers: int, asked: int | None) -> int:
    """How many first layers an evaluation leaves out. Raises RelpError for a number that leaves none in."""
    part = SPACES[space].spared
    exclude = (n_layers // part if part else 0) if asked is None else asked
    if not 0 <= exclude < n_layers:
        raise RelpError(f"exclude_layers must be from 0 to {n_layers - 1}, got {exclude}")
    return exclude


def ablator(model: Model, pairs: Sequence[PairBatch], circuits: Sequence[Circuit], how: Ablating) -> Ablator:
    """The ablator of the circuits' space; of answers of several tokens, its pairs are their parts. Raises RelpError for an
    ablation that it does not know, or without the prompts that it needs.
    """
    if how.ablation == "resample" and any(batch.several for batch in pairs):
        raise RelpError(
            "ablation 'resample' draws a donor per run; answers of several tokens are read in two: use another"
        )
    pairs = parts_of(pairs)
    space = circuits[0].units.space
    row = ablation_row(how.ablation, space)
    if (how.ablation == "corpus") != (how.corpus is not None):
        raise RelpError("ablation 'corpus' and a corpus file go together: --ablation corpus --corpus FILE")
    if row.needs_patch and any(b.patch is None for b in pairs):
        raise RelpError(f"ablation '{how.ablation}' needs patch prompts; these have none (use zero)")
    made: Ablator = load(SPACES[space].ablator)(model, pairs, circuits, how)
    return made


def evaluate(
    model: Model,
    pairs: Sequence[PairBatch] | PairBatch,
    circuit: Circuit | Sequence[Circuit],
    ablation: str = "mean",
    exclude_layers: int | None = None,
    metric: str | Callable[..., Any] | None = None,
    seed: int = 0,
    random_circuits: int = 0,
    bootstrap: int = 1000,
    corpus: Path | None = None,
    progress: Progress | None = None,
    dictionary: Any = None,
    batch_size: int = BATCH_SIZE,
    memory: str | int | None = None,
) -> pd.DataFrame:
    """Evaluate one circuit, or a sweep of them that share ablation values and the F(M), F(∅) runs.

    ablation:        a row of `ABLATIONS` that the circuit's space knows.
    exclude_layers:  how many of the first layers run unablated and are not counted (None: ⌊L/3⌋, paper A.2; edges: none).
    metric:          None: the one the circuit was found with, else logit_diff. A function as `relp.score` takes them.
    corpus:          a text file, for the ablation of that name.
    random_circuits: also evaluate that many random circuits of the same size per circuit; adds `random_*` columns.
    dictionary:      for feature circuits, where it is not the one they were found with.
    memory:          as for `relp.score`; the table then has a column `pairs_per_pass`.

    Returns one row per circuit: n_nodes, n_possible, tau, faithfulness, completeness with `_lo`/`_hi` (95 % bootstrap),
    F_M, F_C, F_complement, F_empty, n_pairs, n_prompts, note; of feature circuits also `errors`. An ill-posed ratio
    (F(M) ≈ F(∅)) is NaN and says so in `note`.
    Raises: RelpError for circuits of another model, of another shape, or with positions that the pairs do not have.
    """
    expect_model(model)
    pairs = batches_of(pairs)
    circuits = list(circuit) if isinstance(circuit, Sequence) else [circuit]
    if not circuits or not pairs:
        raise RelpError("nothing to evaluate: no circuit or no pairs")
    expect_circuit(circuits[0])
    for c in circuits:
        check_circuit(model, c, circuits[0])
    if random_circuits < 0 or bootstrap < 0:
        raise RelpError(f"expected counts from 0 up, got random_circuits={random_circuits}, bootstrap={bootstrap}")
    if corpus is not None and circuits[0].units.space != "nodes":
        raise RelpError(
            f"corpus {corpus}: only circuits of nodes are ablated with a corpus, not those of edges or features"
        )
    if memory is not None:
        check_bounded(batch_size, corpus)
    exclude = excluded_layers(circuits[0].units.space, model.shape.n_layers, exclude_layers)
    row = metric_of(metric or str(circuits[0].meta.get("metric", "logit_diff")))
    how = Ablating(ablation, exclude, seed, corpus, dictionary, batch_size)
    groups = list(dict.fromkeys(c.units for c in circuits))  # of features: which error terms are units may differ
    tables = []
    for units in groups:
        at = [i for i, c in enumerate(circuits) if c.units == units]
        same = [circuits[i] for i in at]
        if memory is not None:
            kept = sum(c.mask.numel() for c in circuits) * (1 + random_circuits)
            kept += getattr(dictionary, "nbytes", 0)  # of one that is loaded already
            how = _within(bytes_of(memory), model, pairs, same, how, row, kept)
        table = _table(model, pairs, same, how, row, random_circuits, bootstrap, progress)
        tables.append(
            table.set_axis(at) if memory is None else table.set_axis(at).assign(pairs_per_pass=how.batch_size)
        )
    return pd.concat(tables).sort_index()


def _table(
    model: Model,
    pairs: Sequence[PairBatch],
    circuits: Sequence[Circuit],
    how: Ablating,
    row: Metric,
    random_circuits: int,
    bootstrap: int,
    progress: Progress | None,
) -> pd.DataFrame:
    """`evaluate` for circuits of the same units."""
    run, seed, exclude = ablator(model, pairs, circuits, how), how.seed, how.exclude
    everything = [
        *circuits,
        *(c.random_like(seed + i, exclude, run.drawable(c)) for c in circuits for i in range(random_circuits)),
    ]
    values = measured(run, model, row, everything, pairs, progress)
    about = [
        {
            "n_nodes": c.counted(exclude),
            "n_possible": c.possible(exclude),
            "tau": tau_of(c.meta),
            "ablation": how.ablation,
        }
        | {"metric": row.name, "exclude_layers": exclude, "note": _note(c, how)}
        for c in circuits
    ]
    table = ratio_table(values, about, random_circuits, seed, bootstrap)
    for name, column in space_of(circuits[0].units).about(circuits).items():
        table.insert(list(table.columns).index("ablation") + 1, name, column)
    return table


def check_bounded(batch_size: int, corpus: Path | None) -> None:
    """Raises RelpError for what `memory` cannot be given with."""
    if batch_size != BATCH_SIZE:
        raise RelpError("--memory chooses how many pairs a pass has: give it or --batch-size, not both")
    if corpus is not None:
        raise RelpError("--memory looks at pairs, not at the lines of a corpus: give --batch-size")


def _within(
    memory: int,
    model: Model,
    pairs: Sequence[PairBatch],
    circuits: Sequence[Circuit],
    how: Ablating,
    row: Metric,
    kept: int,
) -> Ablating:
    """The same with as many pairs a pass as keep the peak below `memory`. Another pair's values take as much as its own."""
    alike = replace(how, ablation="counterfactual") if how.ablation == "resample" else how

    def some(few: PairBatch, _: Room) -> None:
        run = ablator(model, [few], circuits, replace(alike, batch_size=len(few)))
        measured(run, model, row, circuits[:1], [few])

    longest = max(batch.n_pos for batch in pairs)
    return replace(how, batch_size=fitting(longest, plan(memory, model, pairs, some, kept=kept).tokens))


def _note(circuit: Circuit, how: Ablating) -> str:
    said = ties_note(circuit.meta), space_of(circuit.units).note(circuit, how.ablation)
    return "; ".join(note for note in said if note)


def measured(
    run: Ablator,
    model: Model,
    row: Metric,
    circuits: Sequence[Circuit],
    pairs: Sequence[PairBatch],
    progress: Progress | None = None,
    complements: int | None = None,
) -> Values:
    """Per pair F(M), F(∅) and, of every circuit, F(C) and F(M∖C): the latter of the first `complements` (None: of all).

    pairs: those that `run` was made from.
    """
    values, done, parts, rows = Values(len(circuits)), 0, list[PairBatch](), sum(map(len, parts_of(pairs)))
    for batch, ablated in run.batches():
        parts.append(batch)
        with torch.no_grad():
            logits = model.reading(batch.read).logits(batch.original)

        def value(
            keep: Tensor | None, batch: PairBatch = batch, ablated: Any = ablated, logits: Tensor = logits
        ) -> Tensor:
            with torch.no_grad():
                return row.fn(run.logits(batch, keep, ablated), batch.answer, batch.foil, logits)

        values.add("full", 0, row.fn(logits, batch.answer, batch.foil, logits))
        values.add("empty", 0, value(None))
        for i, c in enumerate(circuits):
            keep = c.mask[c.slots(batch)]
            values.add("circuit", i, value(keep))
            if complements is None or i < complements:
                values.add("complement", i, value(~keep))
            if progress:  # a batch of many circuits takes long
                progress(done + len(batch) * (i + 1) // len(circuits), rows, "evaluate")
        done += len(batch)
    values.of_pairs(parts)
    return values


def expect_circuit(circuit: Any) -> None:
    """Raises RelpError for what is no circuit."""
    if not (hasattr(circuit, "mask") and hasattr(circuit, "units")):
        raise RelpError(f"expected a circuit (relp.select, relp.Circuit.load), got a {type(circuit).__name__}")


def check_circuit(model: Model, circuit: Circuit, first: Circuit) -> None:
    """Raises RelpError unless the circuit is of this model and of its shape, and of the same kinds as `first`."""
    expect_circuit(circuit)
    if space_of(circuit.units).keys(circuit.units) != space_of(first.units).keys(first.units):
        raise RelpError(f"circuits of different node kinds in one sweep: {list(circuit.units.kinds)}")
    for what, mine in (("model", model.name), ("revision", model.revision)):
        theirs = circuit.meta.get(what)
        if theirs is not None and theirs != mine:
            raise RelpError(f"this circuit was found on {what} '{theirs}', not on '{mine}'")
    space_of(circuit.units).check(model, circuit)
