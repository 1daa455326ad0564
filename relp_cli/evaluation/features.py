"""Faithfulness and completeness of feature circuits (RelP section 5.2, Marks et al.).

1. Means of every feature and error term over the held-out patch prompts, per position (or another ablation).
2. At each site, in the order of the forward pass, the *running* activation x is encoded again: f = enc(x), ε = x − x̂.
3. Features and error terms outside the circuit take their ablation value, and x + (f̃ − f)·W_dec + (ε̃ − ε) runs on. What is
   kept adds exactly nothing, so the full circuit is the model, bit for bit.
4. Sites of the first third of the layers run as they are. Removed error terms are ablated in a circuit and its complement;
   F(M) is the model itself, F(∅) has everything ablated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from relp_cli.circuits.circuit import ANY_POSITION
from relp_cli.errors import RelpError, unknown
from relp_cli.evaluation.ratios import Values, ratio_table, tau_of
from relp_cli.features.circuit import FeatureCircuit, counted_sites, must_count
from relp_cli.features.load import Dictionaries, dictionaries_of
from relp_cli.features.sites import Site
from relp_cli.methods.request import Progress
from relp_cli.methods.score import position_axis
from relp_cli.models.model import Hook, Model
from relp_cli.nodes.access import capture
from relp_cli.tasks.metrics import METRICS, Metric
from relp_cli.tasks.pairs import PairBatch

ABLATIONS = ("mean", "mean_task", "zero", "counterfactual")
Parts = dict[Site, tuple[Tensor, Tensor]]  # features Float[*batch, pos, feature], errors Float[*batch, pos, d_model]


def evaluate_features(
    model: Model,
    pairs: Sequence[PairBatch],
    circuits: Sequence[FeatureCircuit],
    dictionary: str | Path | Dictionaries | None = None,
    ablation: str = "mean",
    exclude_layers: int | None = None,
    metric: str | None = None,
    seed: int = 0,
    random_circuits: int = 0,
    bootstrap: int = 1000,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """One row per circuit, columns as `relp.evaluate` and `errors` (a row of ERRORS).

    dictionary: None for the one that the circuit was found with.
    ablation:   mean, mean_task, zero (f = 0 and ε = 0), counterfactual.
    Raises: RelpError for circuits of another model or other dictionaries, and as `relp.evaluate`.
    """
    if ablation not in ABLATIONS:
        raise unknown("ablation of features", ablation, ABLATIONS)
    if ablation != "zero" and any(b.patch is None for b in pairs):
        raise RelpError(f"ablation '{ablation}' needs patch prompts; these have none (use zero)")
    exclude = model.shape.n_layers // 3 if exclude_layers is None else exclude_layers
    if not 0 <= exclude < model.shape.n_layers:
        raise RelpError(f"exclude_layers must be from 0 to {model.shape.n_layers - 1}, got {exclude}")
    dictionaries = dictionaries_of(model, circuits, dictionary)
    must_count(tuple(dictionaries), exclude)
    row = METRICS[metric or str(circuits[0].meta.get("metric", "logit_diff"))]
    runs = FeatureRuns(model, row, dictionaries, exclude, pairs, ablation)
    everything = []
    if random_circuits:
        active = runs.active()
        for c in circuits:
            among = {s: _at_labels(mask, runs.labels, c.labels) for s, mask in active.items()}
            everything += [c.random_like(seed + i, exclude, among) for i in range(random_circuits)]
    values = runs.all([*circuits, *everything], progress)
    about = [
        {"n_nodes": c.counted(exclude), "n_possible": c.possible(exclude), "tau": tau_of(c.meta), "ablation": ablation}
        | {"metric": row.name, "exclude_layers": exclude}
        for c in circuits
    ]
    table = ratio_table(values, about, random_circuits, seed, bootstrap)
    table.insert(list(table.columns).index("ablation") + 1, "errors", [c.removed for c in circuits])
    return table


class FeatureRuns:
    """The forward passes of an evaluation."""

    def __init__(
        self,
        model: Model,
        metric: Metric,
        dictionaries: Dictionaries,
        exclude: int,
        pairs: Sequence[PairBatch],
        ablation: str,
        batch_size: int = 32,
    ) -> None:
        self.model, self.metric, self.dictionaries, self.ablation = model, metric, dictionaries, ablation
        self.sites = counted_sites(tuple(dictionaries), exclude)
        self.chunks = [chunk.to(model.device) for batch in pairs for chunk in batch.split(batch_size)]
        self.labels = position_axis(pairs)[1]
        prompts = {"mean": ("patch",), "mean_task": ("original", "patch")}.get(ablation)
        self.means = self.mean_parts(prompts) if prompts else None

    @torch.no_grad()
    def parts(self, tokens: Tensor) -> Parts:
        """Features and error terms of a plain run."""
        kinds = tuple(dict.fromkeys(site.node_kind for site in self.sites))
        with capture(self.model, kinds) as seen:
            self.model.logits(tokens)
        return {s: self.dictionaries[s].split(seen[s.node_kind.name][s.at]) for s in self.sites}

    def mean_parts(self, prompts: Sequence[str]) -> Parts:
        """Means over prompts per label, accumulated in float64: Float[label, feature], Float[label, d_model] per site."""
        labels, dtype = self.labels, torch.float64
        device = self.model.device
        counts = torch.zeros(len(labels), dtype=dtype, device=device)
        width = self.model.shape.d_model
        sums = {
            s: (torch.zeros(len(labels), self.dictionaries[s].n_features, dtype=dtype, device=device),
                torch.zeros(len(labels), width, dtype=dtype, device=device))
            for s in self.sites
        }  # fmt: skip
        for chunk in self.chunks:
            index = torch.tensor([labels.index(label) for label in chunk.labels], device=device)
            for prompt in prompts:
                counts.index_add_(0, index, torch.full((len(index),), float(len(chunk)), dtype=dtype, device=device))
                for site, values in self.parts(getattr(chunk, prompt)).items():
                    for total, value in zip(sums[site], values, strict=True):
                        total.index_add_(0, index, value.double().sum(0))
        n = counts[:, None]
        return {s: tuple((v / n).to(self.dictionaries[s].w_dec.dtype) for v in both) for s, both in sums.items()}  # type: ignore[misc]

    def active(self) -> dict[Site, Tensor]:
        """Bool[label, feature] per site: the features that are active in some original or patch prompt."""
        seen = {s: torch.zeros(len(self.labels), self.dictionaries[s].n_features, dtype=torch.long) for s in self.sites}
        for chunk in self.chunks:
            index = torch.tensor([self.labels.index(label) for label in chunk.labels])
            for tokens in (chunk.original, chunk.patch):
                for site, (f, _) in (self.parts(tokens) if tokens is not None else {}).items():
                    seen[site].index_add_(0, index, (f != 0).sum(0).cpu())
        return {site: count > 0 for site, count in seen.items()}

    def ablated(self, chunk: PairBatch) -> Parts:
        """Ablation values at a batch's positions, with or without a batch axis."""
        if self.means is not None:
            index = torch.tensor([self.labels.index(label) for label in chunk.labels], device=self.model.device)
            return {site: (f[index], e[index]) for site, (f, e) in self.means.items()}
        if self.ablation == "counterfactual":
            assert chunk.patch is not None
            return self.parts(chunk.patch)
        width = self.model.shape.d_model
        zeros = torch.zeros((), dtype=self.model.dtype, device=self.model.device)
        return {
            s: (zeros.expand(chunk.n_pos, d.n_features), zeros.expand(chunk.n_pos, width))
            for s, d in self.dictionaries.items()
        }

    @torch.no_grad()
    def all(self, circuits: Sequence[FeatureCircuit], progress: Progress | None) -> Values:
        values = Values(len(circuits))
        for done, chunk in enumerate(self.chunks):
            ablated = self.ablated(chunk)
            logits = self.model.logits(chunk.original)
            values.add("full", 0, self.metric.fn(logits, chunk.answer, chunk.foil, logits))
            values.add("empty", 0, self.run(chunk, None, ablated, logits))
            for i, circuit in enumerate(circuits):
                values.add("circuit", i, self.run(chunk, circuit, ablated, logits))
                values.add("complement", i, self.run(chunk, circuit.complement(), ablated, logits))
            if progress:
                progress(done + 1, len(self.chunks), "evaluate")
        return values

    def run(self, chunk: PairBatch, circuit: FeatureCircuit | None, ablated: Parts, full: Tensor) -> Tensor:
        """L Float[batch] with everything outside the circuit ablated (None: the empty circuit)."""
        hooks = {site.point: self._keep(site, chunk, circuit, ablated[site]) for site in self.sites}
        with self.model.hooks(hooks):
            logits = self.model.logits(chunk.original)
        return self.metric.fn(logits, chunk.answer, chunk.foil, full)

    def _keep(self, site: Site, chunk: PairBatch, circuit: FeatureCircuit | None, other: tuple[Tensor, Tensor]) -> Hook:
        d = self.dictionaries[site]
        masks = None if circuit is None else _masks_at(circuit, site, chunk)

        def hook(x: Tensor) -> Tensor:
            f, error = d.split(x)
            change_f, change_e = other[0] - f, other[1] - error
            if masks is not None:
                change_f, change_e = change_f.masked_fill(masks[0], 0), change_e.masked_fill(masks[1], 0)
            return (x + (change_f @ d.w_dec + change_e)).to(x.dtype)

        return hook


def _at_labels(mask: Tensor, labels: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Bool[label, feature] at the positions of a circuit; a circuit without positions has what is active at any."""
    if tuple(wanted) == ANY_POSITION:
        return mask.any(0, keepdim=True)
    none = torch.zeros_like(mask[:1])
    return torch.cat([mask[labels.index(label), None] if label in labels else none for label in wanted])


def _masks_at(circuit: FeatureCircuit, site: Site, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """The circuit's masks at the positions of one batch: Bool[pos, feature], Bool[pos, 1]."""
    index = circuit.slots(batch)
    device = batch.original.device
    return circuit.features[site][index].to(device), circuit.errors[site][index, None].to(device)
