"""Faithfulness and completeness of node circuits (RelP section 5.2, Marks et al.).

1. Ablation values are computed once per batch of held-out pairs.
2. F(M): nothing ablated; F(∅): every node of the circuit's kinds ablated, in the layers that are not excluded.
3. F(C), F(M∖C): every node outside, inside the circuit ablated, exactly at its site; everything downstream recomputes.
4. faithfulness = (F(C) − F(∅)) / (F(M) − F(∅)), completeness = the same of the complement: ratios of means over prompts,
   with bootstrap intervals over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from relp_cli.circuits.circuit import ANY_POSITION, Circuit, positions_of
from relp_cli.edges.circuit import EdgeCircuit
from relp_cli.errors import RelpError
from relp_cli.evaluation.ablation import Ablation
from relp_cli.evaluation.edges import evaluate_edges
from relp_cli.evaluation.features import evaluate_features
from relp_cli.evaluation.ratios import Values, ratio_table, tau_of
from relp_cli.features.circuit import FeatureCircuit
from relp_cli.methods.request import Progress
from relp_cli.models.model import Hook, Model
from relp_cli.nodes.access import Activations, split, units
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind
from relp_cli.tasks.metrics import METRICS, Metric
from relp_cli.tasks.pairs import PairBatch

AnyCircuit = Circuit | EdgeCircuit | FeatureCircuit


def evaluate(
    model: Model,
    pairs: Sequence[PairBatch],
    circuit: AnyCircuit | Sequence[AnyCircuit],
    ablation: str = "mean",
    exclude_layers: int | None = None,
    metric: str | None = None,
    seed: int = 0,
    random_circuits: int = 0,
    bootstrap: int = 1000,
    corpus: Path | None = None,
    progress: Progress | None = None,
    dictionary: Any = None,
) -> pd.DataFrame:
    """Evaluate one circuit, or a sweep of them that share ablation values and the F(M), F(∅) runs.

    exclude_layers:  how many of the first layers run unablated and are not counted (None: ⌊L/3⌋, paper A.2; for edge
                     circuits, whose ablations are `edges.ablation.EDGE_ABLATIONS`, none).
    metric:          None: the one the circuit was found with, else logit_diff.
    corpus:          a text file, for the ablation of that name.
    random_circuits: also evaluate that many random circuits of the same size per circuit; adds `random_*` columns.
    dictionary:      for feature circuits (`evaluation.features`), where it is not the one they were found with.

    Returns one row per circuit: n_nodes, n_possible, tau, faithfulness, completeness with `_lo`/`_hi` (95 % bootstrap),
    F_M, F_C, F_complement, F_empty, n_pairs, note. An ill-posed ratio (F(M) ≈ F(∅)) is NaN and says so in `note`.
    Raises: RelpError for circuits of another model, of another shape, or with positions that the pairs do not have.
    """
    circuits: list[Any] = [circuit] if isinstance(circuit, AnyCircuit) else list(circuit)
    if not circuits or not pairs:
        raise RelpError("nothing to evaluate: no circuit or no pairs")
    if random_circuits < 0 or bootstrap < 0:
        raise RelpError(f"expected counts from 0 up, got random_circuits={random_circuits}, bootstrap={bootstrap}")
    if corpus is not None and not isinstance(circuits[0], Circuit):
        raise RelpError(
            f"corpus {corpus}: only circuits of nodes are ablated with a corpus, not those of edges or features"
        )
    if isinstance(circuits[0], EdgeCircuit):
        return evaluate_edges(
            model, pairs, circuits, ablation, exclude_layers or 0, metric, seed, random_circuits, bootstrap, progress
        )
    if isinstance(circuits[0], FeatureCircuit):
        settings = (dictionary, ablation, exclude_layers, metric, seed, random_circuits, bootstrap, progress)
        return evaluate_features(model, pairs, circuits, *settings)
    kinds = tuple(NODE_KINDS[kind] for kind in circuits[0].masks)
    exclude = model.shape.n_layers // 3 if exclude_layers is None else exclude_layers
    if not 0 <= exclude < model.shape.n_layers:
        raise RelpError(f"exclude_layers must be from 0 to {model.shape.n_layers - 1}, got {exclude}")
    for c in circuits:
        check_circuit(model, c, kinds)
    row = METRICS[metric or str(circuits[0].meta.get("metric", "logit_diff"))]
    everything = [c.random_like(seed + i, exclude) for c in circuits for i in range(random_circuits)]
    runs = Runs(model, row, kinds, exclude, pairs, Ablation.prepare(model, pairs, ablation, kinds, seed, corpus))
    values = runs.all([*circuits, *everything], progress)
    about = [
        {"n_nodes": counted(c, exclude), "n_possible": counted_possible(c, exclude), "tau": tau_of(c.meta)}
        | {"ablation": ablation, "metric": row.name, "exclude_layers": exclude}
        for c in circuits
    ]
    return ratio_table(values, about, random_circuits, seed, bootstrap)


def counted(circuit: Circuit, exclude: int) -> int:
    """Nodes of the circuit in the layers that are evaluated."""
    return sum(int(mask[exclude:].sum()) for mask in circuit.masks.values())


def counted_possible(circuit: Circuit, exclude: int) -> int:
    """All nodes of its kinds in the layers that are evaluated."""
    return sum(mask[exclude:].numel() for mask in circuit.masks.values())


def check_circuit(model: Model, circuit: Circuit, kinds: Sequence[NodeKind]) -> None:
    """Raises RelpError unless the circuit is of these kinds, of this model, and of its shape."""
    if tuple(circuit.masks) != tuple(k.name for k in kinds):
        raise RelpError(f"circuits of different node kinds in one sweep: {list(circuit.masks)}")
    for what, mine in (("model", model.name), ("revision", model.revision)):
        theirs = circuit.meta.get(what)
        if theirs is not None and theirs != mine:
            raise RelpError(f"this circuit was found on {what} '{theirs}', not on '{mine}'")
    for kind in kinds:
        mask = circuit.masks[kind.name]
        want = [model.shape.n_layers, mask.shape[1], *([] if kind.split == "vector" else [units(model, kind)])]
        if list(mask.shape) != want:
            raise RelpError(f"circuit: {kind.name} mask has shape {list(mask.shape)}, model {model.name} needs {want}")


class Runs:
    """The forward passes of an evaluation."""

    def __init__(
        self,
        model: Model,
        metric: Metric,
        kinds: tuple[NodeKind, ...],
        exclude: int,
        pairs: Sequence[PairBatch],
        ablation: Ablation,
        batch_size: int = 32,
    ) -> None:
        self.model, self.metric, self.kinds, self.exclude = model, metric, kinds, exclude
        self.chunks = [
            (chunk.to(model.device), batch, number, i * batch_size)
            for number, batch in enumerate(pairs)
            for i, chunk in enumerate(batch.split(batch_size))
        ]
        self.ablation = ablation

    @torch.no_grad()
    def all(self, circuits: Sequence[Circuit], progress: Progress | None) -> Values:
        values = Values(len(circuits))
        for done, (chunk, donors, number, start) in enumerate(self.chunks):
            ablated = self.ablation.values(self.model, chunk, donors, number, start)
            logits = self.model.logits(chunk.original)
            values.add("full", 0, self.metric.fn(logits, chunk.answer, chunk.foil, logits))
            nothing = {k.name: False for k in self.kinds}
            values.add("empty", 0, self.run(chunk, nothing, ablated, logits))
            for i, circuit in enumerate(circuits):
                masks = {kind: at_batch(mask, circuit.labels, chunk) for kind, mask in circuit.masks.items()}
                values.add("circuit", i, self.run(chunk, masks, ablated, logits))
                values.add("complement", i, self.run(chunk, {k: ~m for k, m in masks.items()}, ablated, logits))
            if progress:
                progress(done + 1, len(self.chunks), "evaluate")
        return values

    def run(self, chunk: PairBatch, masks: Any, ablated: Activations | None, full: Tensor) -> Tensor:
        with self.model.hooks(self.hooks(masks, ablated)):
            logits = self.model.logits(chunk.original)
        return self.metric.fn(logits, chunk.answer, chunk.foil, full)

    def hooks(self, masks: Any, ablated: Activations | None) -> list[tuple[str, Hook]]:
        """What makes the model run only the masked nodes: kind → Bool[layer, pos, *unit], or False for none."""
        return [
            (kind.point(layer), self._keep(kind, masks[kind.name], layer, ablated))
            for kind in self.kinds
            for layer in range(self.exclude, self.model.shape.n_layers)
        ]

    def _keep(self, kind: NodeKind, mask: Any, layer: int, ablated: Activations | None) -> Hook:
        """Keep masked nodes of the running value, put the ablation value everywhere else."""

        def hook(value: Tensor) -> Tensor:
            other = torch.zeros_like(value) if ablated is None else ablated[kind.name][layer].expand_as(value)
            if mask is False:
                return other.contiguous()  # GPT-2's linear layers view their input
            kept = mask[layer].unsqueeze(-1) if kind.split == "vector" else mask[layer]  # [pos, units]
            if kind.split == "unit":
                return torch.where(kept, value, other)
            pieces = torch.where(kept[..., None], split(self.model, kind, value), split(self.model, kind, other))
            return pieces.reshape(value.shape)

        return hook


def at_batch(mask: Tensor, labels: tuple[str, ...], batch: PairBatch) -> Tensor:
    """A circuit's mask at the positions of one batch: Bool[layer, pos, *unit] on the batch's device."""
    if labels == tuple(str(i) for i in range(batch.n_pos)):
        index = list(range(batch.n_pos))
    elif labels != ANY_POSITION and batch.roles is None:
        raise RelpError(
            f"the circuit's positions are {', '.join(labels)}, the pairs to evaluate have {batch.n_pos} without roles"
        )
    else:
        index = positions_of(labels, batch)
    return mask[:, index].to(batch.original.device)
