"""Running a model with features and error terms ablated (RelP section 5.2, Marks et al.).

1. Means of every feature and error term over the held-out patch prompts, per position (or another ablation).
2. At each site, in the order of the forward pass, the *running* activation x is encoded again: f = enc(x), ε = x − x̂.
3. Features and error terms that are not kept take their ablation value, and x + (f̃ − f)·W_dec + (ε̃ − ε) runs on. What is
   kept adds exactly nothing, so the full circuit is the model, bit for bit.
4. Sites of excluded layers run as they are. Removed error terms are no units: they are always ablated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from relp_cli.evaluation.ablation_table import ABLATIONS
from relp_cli.evaluation.evaluate import Ablating
from relp_cli.features.load import dictionaries_of
from relp_cli.features.masked import keeping
from relp_cli.methods.means import label_means, prompts
from relp_cli.methods.score import position_axis
from relp_cli.models.model import Hook, Model
from relp_cli.nodes.access import capture
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.features import ERROR, KIND, counted_sites, must_count, spans_of
from relp_cli.spaces.sites import Site
from relp_cli.spaces.units import ANY_POSITION
from relp_cli.tasks.pairs import PairBatch

Parts = dict[Site, tuple[Tensor, Tensor]]  # features Float[*batch, pos, feature], errors Float[*batch, pos, d_model]


class FeatureAblator:
    """`evaluation.evaluate.Ablator` of features and error terms."""

    def __init__(self, model: Model, pairs: Sequence[PairBatch], circuits: Sequence[Circuit], how: Ablating) -> None:
        self.model, self.units = model, circuits[0].units
        self.dictionaries = dictionaries_of(model, circuits, how.dictionary)
        must_count(tuple(self.dictionaries), how.exclude)
        self.sites = counted_sites(tuple(self.dictionaries), how.exclude)
        self.donors = how.batches(pairs, model.device)
        self.chunks = [batch for batch, _ in self.donors]
        self.labels = position_axis(pairs)[1]
        which = ABLATIONS[how.ablation].means
        self.means = self.mean_parts(which) if which else None
        self.spans = spans_of(self.units)

    def batches(self) -> Iterator[tuple[PairBatch, Parts]]:
        for batch, tokens in self.donors:
            with torch.no_grad():
                ablated = self.ablated(batch, tokens)
            yield batch, ablated

    def logits(self, batch: PairBatch, keep: Tensor | None, ablated: Parts) -> Tensor:
        hooks = {site.point: self._keep(site, keep, ablated[site]) for site in self.sites}
        with self.model.hooks(hooks):
            return self.model.reading(batch.read).logits(batch.original)

    def drawable(self, circuit: Circuit) -> Bool[Tensor, "pos unit"]:
        """Features that are active in some prompt, and all error terms."""
        among = torch.ones(len(circuit.labels), len(self.units), dtype=torch.bool)
        for site, mask in self.active.items():
            among[:, self.spans[site.name][KIND]] = _at_labels(mask, self.labels, circuit.labels)
        return among

    @torch.no_grad()
    def parts(self, tokens: Tensor) -> Parts:
        """Features and error terms of a plain run."""
        kinds = tuple(dict.fromkeys(site.node_kind for site in self.sites))
        with capture(self.model, kinds) as seen:
            self.model.logits(tokens)
        return {s: self.dictionaries[s].split(seen[s.node_kind.name][s.at]) for s in self.sites}

    def mean_parts(self, which: Sequence[str]) -> Parts:
        """Means over prompts per label, accumulated in float64: Float[label, feature], Float[label, d_model] per site."""

        def runs() -> Iterator[tuple[list[Tensor], Tensor]]:
            for chunk in self.chunks:
                for tokens in prompts(chunk, which):
                    parts = self.parts(tokens)
                    yield [v for s in self.sites for v in parts[s]], chunk.index(self.labels).to(self.model.device)

        found = iter(label_means(runs(), len(self.labels)))
        dtypes = {site: self.dictionaries[site].w_dec.dtype for site in self.sites}
        return {site: (next(found).to(dtype), next(found).to(dtype)) for site, dtype in dtypes.items()}

    @cached_property
    def active(self) -> dict[Site, Tensor]:
        """Bool[label, feature] per site: the features that are active in some original or patch prompt."""
        seen = {s: torch.zeros(len(self.labels), self.dictionaries[s].n_features, dtype=torch.long) for s in self.sites}
        for chunk in self.chunks:
            index = chunk.index(self.labels)
            for tokens in (chunk.original, chunk.patch):
                for site, (f, _) in (self.parts(tokens) if tokens is not None else {}).items():
                    seen[site].index_add_(0, index, (f != 0).sum(0).cpu())
        return {site: count > 0 for site, count in seen.items()}

    def ablated(self, chunk: PairBatch, tokens: Tensor | None) -> Parts:
        """Ablation values at a batch's positions, with or without a batch axis; tokens: what runs to give them."""
        if self.means is not None:
            index = chunk.index(self.labels).to(self.model.device)
            return {site: (f[index], e[index]) for site, (f, e) in self.means.items()}
        if tokens is not None:
            return self.parts(tokens)
        width = self.model.shape.d_model
        zeros = torch.zeros((), dtype=self.model.dtype, device=self.model.device)
        return {
            s: (zeros.expand(chunk.n_pos, d.n_features), zeros.expand(chunk.n_pos, width))
            for s, d in self.dictionaries.items()
        }

    def _keep(self, site: Site, keep: Tensor | None, other: tuple[Tensor, Tensor]) -> Hook:
        spans = self.spans[site.name]
        features, error = (
            None if keep is None or kind not in spans else keep[:, spans[kind]].to(self.model.device)
            for kind in (KIND, ERROR)
        )
        return keeping(self.dictionaries[site], features, error, other)


def _at_labels(mask: Tensor, labels: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Bool[label, feature] at the positions of a circuit; a circuit without positions has what is active at any."""
    if tuple(wanted) == ANY_POSITION:
        return mask.any(0, keepdim=True)
    none = torch.zeros_like(mask[:1])
    return torch.cat([mask[labels.index(label), None] if label in labels else none for label in wanted])
