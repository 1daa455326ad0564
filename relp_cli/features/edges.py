"""Edges of a feature circuit (Marks et al. 2025, appendix A): how one node acts through another, along direct paths alone.

1. A gradient method gives g = ∂L/∂x at every site, and δ = source − run of every feature and error term (as for node scores).
2. One more forward pass of the run in which the activation of every site is a leaf. What reaches a site is then a function
   of the other sites' leaves, and its gradient follows paths that cross no third site.
3. For a node v of the circuit, one backward pass of ∂L/∂v · v (∂L/∂f = W_dec·g, ∂L/∂ε = g, held constant) gives the
   gradient h at the leaf of every site u before it, and the edges into v: δf_u·(W_dec·h) from features, δε_u·h from errors.
4. The edge to the metric is what is left of u's effect without other sites: h is the gradient of L itself, taken where the
   method takes g (for IG: averaged over its path).
All paths out of u begin with one of its edges. So the edges from u to *all* features and error terms, and to the metric, sum
to u's node score, for atp and relp exactly; IG averages g over a path but the slope between sites is taken at the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import merge
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError
from relp_cli.features.dictionary import Dictionary
from relp_cli.features.load import Dictionaries, dictionaries_of
from relp_cli.features.space import FeatureBatch, feature_setup
from relp_cli.lrp.context import lrp
from relp_cli.methods.request import Progress, Request
from relp_cli.methods.score import check_baseline, resolve_method
from relp_cli.methods.setup import Passes
from relp_cli.methods.space import Point, added
from relp_cli.methods.table import METHODS, SPACES, methods_for
from relp_cli.models.model import Hook, Model
from relp_cli.models.recompute import again
from relp_cli.nodes.access import as_leaf
from relp_cli.precision import wide
from relp_cli.spaces.circuit import RANDOM, Circuit
from relp_cli.spaces.feature_graph import FeatureEdges, FeatureNode
from relp_cli.spaces.features import feature_nodes
from relp_cli.spaces.sites import Site
from relp_cli.spaces.totals import moments
from relp_cli.tasks.counted import distinct
from relp_cli.tasks.pairs import PairBatch, in_batches
from relp_cli.tasks.parts import parts_of
from relp_cli.tasks.shared import prompts_of

MAX_NODES = 10_000  # one backward pass each, and a matrix of all pairs
_ends = itemgetter(0, 1)


def feature_edges(
    model: Model,
    pairs: Sequence[PairBatch],
    circuit: Circuit,
    method: str | None = None,
    *,
    dictionary: str | Path | Dictionaries | None = None,
    metric: str | None = None,
    direction: str | None = None,
    baseline: str | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
    **params: Any,
) -> FeatureEdges:
    """Scores of all edges between a feature circuit's nodes, and from them to the metric; edges that are 0 are left out.

    method, metric, direction, baseline, params: None (and no params) for what the circuit was found with.
    dictionary: as for `relp.score`; None for the one that the circuit was found with.
    Sign and units are those of node scores. Variances are of independent pairs, also where pairs share prompts. Cost per batch:
    the method's, 1 forward, 1 backward (as far as the next sites) per node.
    Raises: RelpError for methods without gradients, other dictionaries, positions that the circuit has not, and circuits of
    more than MAX_NODES nodes.
    """
    found = dictionaries_of(model, (circuit,), dictionary)
    asked = {"method": method, "metric": metric, "direction": direction, "baseline": baseline}
    default = {"method": "relp", "metric": "logit_diff", "direction": "noising", "baseline": "patch"}
    how = {k: v or circuit.meta.get(k, default[k]) for k, v in asked.items()}
    if method is None and not params:
        params = dict(circuit.meta.get("params", {}))
    if how["method"] == RANDOM:
        raise RelpError("this circuit was drawn at random; give the method= whose gradients its edges are made of")
    row, parsed = resolve_method(how["method"], params, "features", model)
    if row.by != "points":
        known = [name for name in methods_for("features") if METHODS[name].by == "points"]
        raise RelpError(f"edges of features need gradients ({', '.join(known)}), not method '{row.name}'")
    request = Request(how["metric"], how["direction"], how["baseline"], batch_size)
    check_baseline(row, SPACES["features"], request)
    nodes = feature_nodes(circuit)
    if not nodes:
        none = torch.zeros(0, dtype=torch.float64)
        return FeatureEdges((), torch.zeros(0, 2, dtype=torch.long), none, none, torch.zeros(0, dtype=torch.long), how)
    if len(nodes) > MAX_NODES:
        raise RelpError(
            f"this circuit has {len(nodes)} nodes; edges are scored among at most {MAX_NODES}: select fewer of them"
        )
    totals = _Totals(nodes, circuit.labels)
    chunks = in_batches(pairs, batch_size, model.device)
    steps, applied = len(nodes) + 1, dict[str, int]()
    for done, chunk in enumerate(chunks):
        batches = []
        for part in parts_of([chunk]):
            on = FeatureBatch(feature_setup(model, found, part, request, Passes()), found)
            points = tuple(row.load()[0](on, parsed))
            if any(point.part != "whole" or isinstance(point.weight, Tensor) for point in points):
                raise RelpError(
                    "edges between features are scored at one endpoint and without a blend: score with --set endpoints=patch "
                    "--set blend=false"
                )
            grads, applied = on.site_gradients(points)
            slots = circuit.slots(part).to(model.device)
            batches.append(_Batch(on, nodes, circuit.labels, slots, points, grads))
        # Each batch's edges come in the order of their ends: a pair's score is the sum over its parts.
        for (target, first), scores in groupby(merge(*(b.edges() for b in batches), key=_ends), _ends):
            totals.add(target, first, torch.stack([one for *_, one in scores]).sum(0))
            if progress:
                progress(done * steps + target + 1, len(chunks) * steps, "edges")
        totals.count(torch.cat([b.slots for b in batches]), len(chunk))
    about = {
        **how,
        "params": parsed.model_dump(mode="json", exclude=set(row.fixed)),
        "rules": applied,
        "n_pairs": sum(map(len, chunks)),
        "n_prompts": distinct(prompts_of(pairs)),
        "n_nodes": len(nodes),
    }
    return totals.finish(about)


@dataclass(frozen=True)
class _Here:
    """The circuit's nodes at one site in one batch, features first; node = feature or error at one slot.

    first:   number of the first of them. units: the features' numbers. at: Float[pos, node], 1 where a node's slot is.
    delta_f: Float[batch, pos, feature node], delta_e: Float[batch, pos, d_model]: source − run.
    """

    site: Site
    d: Dictionary
    first: int
    units: list[int]
    at: Tensor
    delta_f: Tensor
    delta_e: Tensor

    def scores(self, h: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch node"]:
        """Σ over a node's positions of δ·∂/∂node, for a gradient h at the site."""
        h = wide(h)
        features = self.delta_f * (h @ wide(self.d.w_dec[self.units]).T)
        errors = (self.delta_e * h).sum(-1, keepdim=True).expand(-1, -1, self.at.shape[1] - len(self.units))
        return torch.einsum("bpn,pn->bn", torch.cat([features, errors], -1), self.at)

    def weighed(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """Per node ∂L/∂node · node, summed over examples and positions, as a function of the site's activation x."""
        count = len(self.units)
        g = wide(g)
        features = wide(self.d.encode(x, self.units)) * (g @ wide(self.d.w_dec[self.units]).T)
        values = list(torch.einsum("bpn,pn->n", features, self.at[:, :count]))
        # Apart from the features: their gradients then do not pass through decode(encode) of the whole dictionary.
        if count < self.at.shape[1]:
            errors = (wide(self.d.split(x)[1]) * g).sum(-1)
            values += list(torch.einsum("bp,pn->n", errors, self.at[:, count:]))
        return values


class _Batch:
    """Edges of one batch of pairs."""

    def __init__(
        self,
        on: FeatureBatch,
        nodes: Sequence[FeatureNode],
        labels: Sequence[str],
        slots: Tensor,
        points: Sequence[Point],
        grads: Mapping[Site, Tensor],
    ) -> None:
        self.on, self.slots, self.points, self.grads = on, slots, points, grads
        self.sites = tuple(on.dictionaries)
        self.here: dict[Site, _Here] = {}
        of_node = torch.tensor([labels.index(node.position) for node in nodes], device=slots.device)
        masks = wide((slots[:, None] == of_node[None]).to(on.model.dtype))  # [pos, node]
        for site, d in on.dictionaries.items():
            mine = [i for i, node in enumerate(nodes) if node.site == site]
            if not mine:
                continue
            units = [f for i in mine if (f := nodes[i].feature) is not None]
            delta_f, delta_e = on.delta(site)
            self.here[site] = _Here(
                site, d, mine[0], units, masks[:, mine[0] : mine[-1] + 1], delta_f[..., units], delta_e
            )

    def edges(self) -> Iterator[tuple[int, int, Tensor]]:
        """Per target and site before it: the target's number (the metric is the last), the number of the site's first node,
        Float[batch, node] scores of the edges from the site's nodes.
        """
        leaves, reached, metric = self._linked(replace(self.points[0], moved={}))
        for v, here in self.here.items():
            before = [u for u in self.here if u < v]
            if not before or not reached[v].requires_grad:
                continue
            with torch.enable_grad():
                values = here.weighed(reached[v], self.grads[v])
            for i, value in enumerate(values):
                grads = torch.autograd.grad(value, [leaves[u] for u in before], retain_graph=True, allow_unused=True)
                yield from self._from(before, grads, here.first + i)
        direct = self._direct(leaves, metric)
        yield from self._from(list(direct), list(direct.values()), sum(h.at.shape[1] for h in self.here.values()))

    def _direct(self, leaves: Mapping[Site, Tensor], metric: Tensor) -> dict[Site, Tensor]:
        """Per site of the circuit from which L is reached directly: that gradient Float[batch, pos, d_model]."""
        found: dict[Site, Tensor] = {}
        for point in self.points:
            sites = [s for s in self.here if point.of is None or (point.of.kind, point.of.layer) == (s.node_kind, s.at)]
            if not sites:
                continue
            if point.moved:
                leaves, _, metric = self._linked(point)
            grads = torch.autograd.grad(metric.sum(), [leaves[s] for s in sites], allow_unused=True)
            for site, grad in zip(sites, grads, strict=True):
                if grad is not None:
                    mean = point.weigh(wide(grad))
                    found[site] = found[site] + mean if site in found else mean
        return found

    def _from(
        self, sites: Sequence[Site], grads: Sequence[Tensor | None], target: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        for site, h in zip(sites, grads, strict=True):
            if h is not None:
                yield target, self.here[site].first, self.here[site].scores(h)

    def _linked(self, point: Point) -> tuple[dict[Site, Tensor], dict[Site, Tensor], Tensor]:
        """Step 2 at one point: per site its leaf and what reaches it from the leaves before it; L Float[batch]."""
        setup = self.on.setup
        leaves: dict[Site, Tensor] = {}
        reached: dict[Site, Tensor] = {}

        def link(site: Site) -> Hook:
            def hook(x: Tensor) -> Tensor:
                if not again():
                    reached[site], leaves[site] = x, as_leaf(x)
                return leaves[site]

            return hook

        with torch.enable_grad():
            links = [(site.point, link(site)) for site in self.sites]
            with lrp(setup.model, point.rules, point.other), setup.model.hooks([*added(point.moved), *links]):
                logits = setup.model.logits(setup.run)
            return leaves, reached, setup.value(logits)


class _Totals:
    """Sums over examples in float64: Float[node, node + 1], the metric as the last target."""

    def __init__(self, nodes: tuple[FeatureNode, ...], labels: tuple[str, ...]) -> None:
        self.nodes = nodes
        self.plain, self.squares = (torch.zeros(len(nodes), len(nodes) + 1, dtype=torch.float64) for _ in range(2))
        self.seen = torch.zeros(len(labels), len(labels), dtype=torch.long)  # examples that have both labels
        self.at = torch.tensor([labels.index(node.position) for node in nodes], dtype=torch.long)

    def add(self, target: int, first: int, scores: Float[Tensor, "batch node"]) -> None:
        if not torch.isfinite(scores).all():
            raise RelpError("edge scores are not finite (dtype too narrow?)")
        scores = scores.detach().double()
        rows = slice(first, first + scores.shape[1])
        self.plain[rows, target] += scores.sum(0).cpu()
        self.squares[rows, target] += scores.square().sum(0).cpu()

    def count(self, slots: Tensor, examples: int) -> None:
        present = slots.unique().cpu()
        self.seen[present[:, None], present[None]] += examples

    def finish(self, meta: dict[str, Any]) -> FeatureEdges:
        index = self.squares.nonzero()
        source, target = index.unbind(1)
        at = torch.cat([self.at, self.at[:1]])  # the metric needs the source's position only
        n = torch.where(
            target == len(self.nodes), self.seen.diagonal()[self.at[source]], self.seen[self.at[source], at[target]]
        )
        mean, variance = moments(self.plain[source, target], self.squares[source, target], n)
        return FeatureEdges(self.nodes, index, mean, variance, n, meta)
