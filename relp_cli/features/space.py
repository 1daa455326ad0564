"""The space of features: those of sparse autoencoders, and their error terms.

The dictionaries are not in the model: features are read off its activations. x = x̂ + ε is an identity, so writing a site's
activation as features plus error leaves the forward pass unchanged, and the gradient g at x passes through to both:
∂L/∂f = W_dec·g, ∂L/∂ε = g. What lies upstream of x is reached through x itself, as in Marks et al. (their pass-through
gradients), so one plain backward pass serves all sites at once.

1. f = enc(x) and ε = x − x̂ in both runs; δf, δε their differences.
2. Score of a feature: δf·(W_dec·g); of the error term: δε·g. At every site they sum to the site's own node score δx·g.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.features.dictionary import Dictionary
from relp_cli.features.load import NO_DICTIONARY, Dictionaries, load_dictionaries
from relp_cli.features.masked import keeping
from relp_cli.features.patching import patch_features
from relp_cli.methods.core import Gradients
from relp_cli.methods.nodes import NodeBatch, NodesAt
from relp_cli.methods.request import Progress, Request
from relp_cli.methods.room import Room
from relp_cli.methods.score import position_axis
from relp_cli.methods.setup import Passes, Setup
from relp_cli.methods.share import share_of
from relp_cli.methods.space import Part, Place, Point, of_part
from relp_cli.methods.table import Result
from relp_cli.models.model import Model
from relp_cli.nodes.access import Activations
from relp_cli.precision import wide
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.features import ERROR, KIND, Sites, feature_masks, spans_of
from relp_cli.spaces.sites import Site
from relp_cli.spaces.units import Units
from relp_cli.tasks.pairs import PairBatch


class Features:
    """Every feature and error term of all sites that have a dictionary. See `space.Scorer`.

    Raises: RelpError without dictionaries, as `load_dictionaries`, and for pairs that share no position axis.
    """

    def __init__(
        self, model: Model, pairs: Sequence[PairBatch], _: Sequence[str], request: Request, options: Mapping[str, Any]
    ) -> None:
        where = options.get("dictionary")
        if where is None:
            raise RelpError(NO_DICTIONARY)
        self.axis, self.labels = position_axis(pairs)
        found = where if isinstance(where, Dictionaries) else load_dictionaries(where, model)
        self.model, self.request, self.dictionaries, self.only = model, request, found, options.get("only")
        self.units = Sites(tuple(found), tuple(d.n_features for d in found.values())).units()
        self.held = found.nbytes
        self.about: dict[str, Any] = {
            "dictionary": found.source, "dictionary_hash": found.digest, "dictionary_dtype": found.stored,
        }  # fmt: skip
        if found.model:
            self.about["dictionary_of"] = found.model

    def prepare(self, chunks: Sequence[PairBatch], passes: Passes) -> None:
        """Nothing."""

    def batch(self, chunk: PairBatch, passes: Passes, room: Room | None, tick: Progress | None) -> FeatureBatch:
        setup = feature_setup(self.model, self.dictionaries, chunk, self.request, passes)
        return FeatureBatch(setup, self.dictionaries, self.only, self.about, room, tick)

    def blocks(self, scores: Mapping[str, Tensor]) -> list[Tensor]:
        """From a site's name → Float[batch, slot, feature], its name/error → Float[batch, slot]."""
        names = [site.name for site in self.dictionaries]
        return [*(scores[name] for name in names), *(scores[f"{name}/error"][..., None] for name in names)]


def feature_setup(
    model: Model, dictionaries: Mapping[Site, Dictionary], chunk: PairBatch, request: Request, passes: Passes
) -> Setup:
    """A batch whose node kinds are those that the dictionaries encode."""
    return request.setup(model, chunk, tuple(dict.fromkeys(site.node_kind for site in dictionaries)), passes)


class FeatureBatch(NodeBatch):
    """Scores by site: its name → Float[batch, slot, feature], its name/error → Float[batch, slot].

    only: the circuit whose nodes `patch` patches (others have score 0). about: where `patch` counts its runs.
    """

    parts_of_patch = False

    def __init__(
        self, setup: Setup, dictionaries: Mapping[Site, Dictionary], only: Circuit | None = None,
        about: dict[str, Any] | None = None, room: Room | None = None, tick: Progress | None = None,
    ) -> None:  # fmt: skip
        super().__init__(setup, room, tick)
        self.dictionaries, self.only, self.about = dictionaries, only, {} if about is None else about

    def places(self, exact: Any) -> Iterator[Place]:
        """(f, ε) of one site move jointly. Decoding is linear, so the activation moves on the straight line between its two
        values; with a zero baseline to f = 0 and ε = 0.
        """
        if exact:
            raise RelpError(
                "ig_activations moves the features and error of one site jointly; 'exact' is not for features"
            )
        self.meta["interpolation"] = "joint (features and error of one site at once)"
        for site, d in self.dictionaries.items():
            kind, x = site.node_kind, self.run[site.node_kind.name][site.at]
            end = d.b_dec.expand_as(x) if self.setup.baseline == "zero" else self.source[kind.name][site.at]
            yield Place(site.point, wide(end) - wide(x), NodesAt(kind, site.at))

    def parts(self, values: Activations, site: Site) -> tuple[Tensor, Tensor]:
        """(f Float[batch, pos, feature], ε Float[batch, pos, d_model]) of one site."""
        f, error = self.dictionaries[site].split(values[site.node_kind.name][site.at])
        return wide(f), wide(error)

    def difference(self, start: Activations, end: Activations, site: Site) -> tuple[Tensor, Tensor]:
        """(δf, δε), end − start."""
        (f, error), (end_f, end_error) = self.parts(start, site), self.parts(end, site)
        return end_f - f, end_error - error

    def delta(self, site: Site) -> tuple[Tensor, Tensor]:
        """(δf, δε), source − run; baseline zero: (−f, −ε)."""
        if self.setup.baseline != "zero":
            return self.difference(self.run, self.source, site)
        f, error = self.parts(self.run, site)
        return -f, -error

    def product(self, start: Activations, end: Activations, at: Gradients) -> dict[str, Tensor]:
        grads = {site: at.grads[site.node_kind.name][site.at] for site in self.dictionaries}
        return self._products(lambda site: self.difference(start, end, site), grads)

    def attribute(self, points: Iterable[Point]) -> Result:
        parts, applied = self.mean_gradients(points)
        found: dict[str, Tensor] = {}
        for part, grads in parts.items():
            of_sites = {site: grads[site.node_kind.name, site.at] for site in self.dictionaries}
            for name, scores in self._products(self.delta, of_sites, part).items():
                found[name] = found[name] + scores if name in found else scores
        return Result(found, applied, self.meta)

    def mean_gradients(
        self, points: Iterable[Point]
    ) -> tuple[dict[Part, dict[tuple[str, int], Tensor]], dict[str, int]]:
        """Part → (kind, layer) → Σ weight · ∂L/∂x over its points, Float[batch, pos, width]; and the rules applied."""
        parts: dict[Part, dict[tuple[str, int], Tensor]] = {}
        run: Activations = {kind.name: [torch.empty(0)] * self.model.shape.n_layers for kind in self.setup.kinds}

        def add(point: Point, kind: str, layer: int, value: Tensor, grad: Tensor) -> None:
            run[kind][layer] = value
            total, grad = parts.setdefault(point.part, {}), point.weigh(wide(grad))
            before = total.get((kind, layer))
            total[kind, layer] = grad if before is None else before.add_(grad)

        applied = self.each_gradient(points, add)
        self._read.setdefault("run", run)
        return parts, applied

    def site_gradients(self, points: Iterable[Point]) -> tuple[dict[Site, Tensor], dict[str, int]]:
        """Per site the mean of ∂L/∂x over the points that are for it, Float[batch, pos, d_model], and the rules applied."""
        parts, applied = self.mean_gradients(points)
        return {site: parts["whole"][site.node_kind.name, site.at] for site in self.dictionaries}, applied

    def _products(
        self, delta: Callable[[Site], tuple[Tensor, Tensor]], grads: Mapping[Site, Tensor], part: Part = "whole"
    ) -> dict[str, Tensor]:
        scores = {}
        for site, d in self.dictionaries.items():
            (delta_f, delta_e), g = delta(site), wide(grads[site])
            features, errors = delta_f * (g @ wide(d.w_dec).T), (delta_e * g).sum(-1)
            if part != "whole":
                change = self.streams.change(site.layer)
                norm = change.square().sum(-1)
                features = features * of_part(part, share_of(delta_f * (change @ wide(d.w_dec).T), norm[..., None]))
                errors = errors * of_part(part, share_of((delta_e * change).sum(-1), norm))
            scores[site.name] = self.setup.to_slots(features[:, None])[:, 0]
            scores[f"{site.name}/error"] = self.setup.to_slots(errors[:, None])[:, 0]
        return scores

    @cached_property
    def units(self) -> Units:
        return Sites(tuple(self.dictionaries), tuple(d.n_features for d in self.dictionaries.values())).units()

    def changed(self) -> Bool[Tensor, "slot unit"]:
        """Of features, those that are active in run or source of some pair, and not alike in both."""
        found: dict[str, list[Tensor]] = {KIND: [], ERROR: []}
        for site in self.dictionaries:
            features, errors = self.delta(site)
            found[KIND].append((features != 0).any(0))
            found[ERROR].append((errors != 0).any(-1).any(0)[:, None])
        return self.setup.any_of_slots(torch.cat([*found[KIND], *found[ERROR]], 1))

    def masked(self, keep: Float[Tensor, "slot unit"]) -> Float[Tensor, " batch"]:
        at, hooks = keep[self.setup.slots.to(keep.device)], {}
        at = at.to(self.model.device, torch.promote_types(self.model.dtype, torch.float32))
        for site, d in self.dictionaries.items():
            features, error = (at[:, span] for span in spans_of(self.units)[site.name].values())
            hooks[site.point] = keeping(d, features, error, self.others[site])
        with self.model.hooks(hooks):
            logits = self.model.logits(self.setup.run)
        self.setup.passes.forward += 1
        return self.setup.value(logits)

    @cached_property
    def others(self) -> dict[Site, tuple[Tensor, Tensor]]:
        """What is put in place of features and errors: the source's, or zeros."""
        if self.setup.baseline != "zero":
            return {site: self.parts(self.source, site) for site in self.dictionaries}
        zero = torch.zeros((), device=self.model.device)
        return dict.fromkeys(self.dictionaries, (zero, zero))

    def of_units(self, values: Float[Tensor, "slot unit"]) -> dict[str, Tensor]:
        parts = {}
        for name, spans in spans_of(self.units).items():
            parts[name] = values[:, spans[KIND]]
            parts[f"{name}/error"] = values[:, spans[ERROR]][:, 0]
        return {name: part.expand(len(self), *part.shape) for name, part in parts.items()}

    def patch(self) -> Result:
        """Only what differs is patched: with `only`, the differences of the circuit's nodes."""
        scores = {}
        for site, d in self.dictionaries.items():
            delta_f, delta_e = self.delta(site)
            if self.only is not None:
                slots = self.only.slots(self.setup.batch)
                features, errors = (m[slots].to(self.model.device) for m in feature_masks(self.only)[site])
                delta_f, delta_e = delta_f * features, delta_e * errors[:, None]
            found = patch_features(self.setup, site, d, delta_f, delta_e, self.room.patched)
            scores[site.name], scores[f"{site.name}/error"], runs = found
            self.about["patched_runs"] = self.about.get("patched_runs", 0) + runs
        return Result(scores)
