"""Gradients at the sites, per method. The dictionaries are not in the model: features are read off its activations.

x = x̂ + ε is an identity, so writing a site's activation as features plus error leaves the forward pass unchanged, and the
gradient at x passes through to both: ∂L/∂f = W_dec·∂L/∂x, ∂L/∂ε = ∂L/∂x. What lies upstream of x is reached through x itself,
as in Marks et al. (their pass-through gradients), so one plain backward pass serves all sites at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.features.dictionary import Dictionary
from relp_cli.features.sites import Site
from relp_cli.lrp.context import Recorded
from relp_cli.methods.core import gradients, refuse_metric
from relp_cli.methods.path import RESID, Path, chunks, mean_gradients, quadrature
from relp_cli.methods.relp import recorded_source
from relp_cli.methods.setup import Setup
from relp_cli.nodes.access import Activations
from relp_cli.precision import wide


@dataclass(frozen=True)
class SiteRuns:
    """run, source: n(run) and n(source) per node kind and layer, Float[batch, pos, d_model]."""

    run: Activations
    source: Activations


@dataclass(frozen=True)
class Point:
    """Where on a path gradients are taken, several points at once: rows of a forward pass are [point, batch] flattened.

    put: hook point → what stands there instead of the running value. sites: whose gradients this is for.
    """

    weights: Float[Tensor, " point"]
    put: Mapping[str, Tensor]
    sites: Sequence[Site]


@dataclass(frozen=True)
class SiteGradients:
    """Per site ∂L/∂x (or its mean over a path) Float[batch, pos, d_model].

    applied: rule → layers. rules, other: what `lrp` was given. points: the path; () at the run. meta: more to say.
    """

    runs: SiteRuns
    grads: Mapping[Site, Tensor]
    applied: dict[str, int] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    other: Recorded | None = None
    points: Sequence[Point] = ()
    meta: dict[str, Any] = field(default_factory=dict)


def _by_site(sites: Mapping[Site, Dictionary], grads: Activations) -> dict[Site, Tensor]:
    return {site: grads[site.node_kind.name][site.at] for site in sites}


def atp(setup: Setup, sites: Mapping[Site, Dictionary], params: Any) -> SiteGradients:  # noqa: ARG001
    """2 forward + 1 backward."""
    source = setup.source_activations()
    at = gradients(setup)
    return SiteGradients(SiteRuns(at.values, source), _by_site(sites, at.grads))


def relp(setup: Setup, sites: Mapping[Site, Dictionary], params: Any) -> SiteGradients:
    """2 forward + 1 backward, under LRP rules."""
    rules = params.rules if params.rules is not None else setup.model.family.rules
    source, other = recorded_source(setup, rules)
    at = gradients(setup, rules, other)
    return SiteGradients(SiteRuns(at.values, source), _by_site(sites, at.grads), at.applied, rules, other)


def ig_inputs(setup: Setup, sites: Mapping[Site, Dictionary], params: Any) -> SiteGradients:
    """Gradients averaged while the embeddings move from run to source: `steps` forward + backward, and 2 forward."""
    path = Path.of(setup)
    mean, _ = mean_gradients(setup, path, params)
    alphas, weights = quadrature(params.rule, params.steps)
    points = [
        Point(wide(path.start).new_tensor(weights[part]), {RESID.point(0): path.at(alphas[part])}, tuple(sites))
        for part in chunks(len(alphas), setup, params.chunk_tokens)
    ]
    return SiteGradients(SiteRuns(path.values, path.source), _by_site(sites, mean), points=points)


def ig_activations(setup: Setup, sites: Mapping[Site, Dictionary], params: Any) -> SiteGradients:
    """(f, ε) of one site move jointly from run to source, all else as in the run: `steps` forward + backward per site.

    Decoding is linear, so the activation moves on the straight line between its two values.
    Raises: RelpError for `exact`, which names units of node kinds.
    """
    if params.exact:
        raise RelpError("ig_activations moves the features and error of one site jointly; 'exact' is not for features")
    source, run = setup.source_activations(), setup.run_activations()
    refuse_metric(setup, at_run=False)
    grads, points = {}, []
    for site, dictionary in sites.items():
        x, end = run[site.node_kind.name][site.at], source[site.node_kind.name][site.at]
        if setup.baseline == "zero":  # f = 0 and ε = 0
            end = dictionary.b_dec.expand_as(x)
        points += _along_site(setup, site, x, wide(end) - wide(x), params)
        grads[site] = _mean_over(setup, points, site)
    meta = {"interpolation": "joint (features and error of one site at once)"}
    return SiteGradients(SiteRuns(run, source), grads, points=points, meta=meta)


def _along_site(setup: Setup, site: Site, x: Tensor, delta: Tensor, params: Any) -> list[Point]:
    """x clamped to x + α·δ at this site."""
    alphas, weights = (wide(x).new_tensor(v) for v in quadrature(params.rule, params.steps))
    return [
        Point(
            weights[part], {site.point: (x + alphas[part].view(-1, 1, 1, 1) * delta).flatten(0, 1).to(x.dtype)}, (site,)
        )
        for part in chunks(len(alphas), setup, params.chunk_tokens)
    ]


def _mean_over(setup: Setup, points: Sequence[Point], site: Site) -> Float[Tensor, "batch pos d_model"]:
    """Mean over a site's points of ∂L/∂x."""
    total = torch.zeros(())
    for point in (p for p in points if p.sites == (site,)):
        leaf, copies = point.put[site.point].clone().requires_grad_(True), len(point.weights)
        with torch.enable_grad():
            with setup.model.hooks({site.point: lambda _, leaf=leaf: leaf}):  # type: ignore[misc]
                logits = setup.model.logits(setup.run.repeat(copies, 1))
            (grad,) = torch.autograd.grad(setup.value(logits).sum(), leaf)
        setup.passes.forward += copies
        setup.passes.backward += copies
        total = total + torch.einsum("a,ab...->b...", point.weights, wide(grad).unflatten(0, (copies, -1)))
    return total


GradientMethod = Callable[[Setup, Mapping[Site, Dictionary], Any], SiteGradients]
GRADIENT_METHODS: dict[str, GradientMethod] = {
    "atp": atp,
    "relp": relp,
    "ig_inputs": ig_inputs,
    "ig_activations": ig_activations,
}
