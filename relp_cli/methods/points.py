"""Estimators of the gradient kind: where each takes its gradients. The space multiplies their mean with δ = source − run.

atp              at the run (RelP eq. 2)
relp             at the run, with RelP's coefficients for the gradient (RelP eq. 3); two-point rules read the pass that gives δ
ig_inputs        at points between the embeddings of run and source. Over the nodes resid_pre[0] the sum is L(source) −
                 L(run), up to the quadrature's error (completeness; Sundararajan et al. 2017)
expected_gradients  the same at points drawn at random (Erion et al. 2021)
relp_ig          RelP's coefficients at the same points; one left step is relp, for every rule set
ig_activations   one site at a time moves from run to source, all else stays as in the run: n(run) + α·δn
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.methods.space import Batch, Part, Point
from relp_cli.methods.table import Params
from relp_cli.nodes.access import EMBEDDED

QuadratureRule = Literal["left", "right", "midpoint", "trapezoid", "gauss_legendre"]


class RelpParams(Params):
    """rules: rule names, None for the family's preset (paper Table 4), or "auto" (`methods/auto.py`): chosen per node kind
    on pairs set aside, of which auto_cells (pair, node) cells a kind are patched exactly; auto_seed draws both.

    endpoints: the other point of two-point rules. "patch": the patch prompt. "position" (what `relp+secant` does): one for
    each changed position, the run with this token alone replaced; a node at a changed position has its own, any other the
    mean over them. More than max_endpoints changed positions are taken in groups of neighbours.

    blend: the rules count by √t, with t how far a node moves its layer's stream, and the plain gradient by the rest
    (`share.py`): one more backward pass, and 2 forward.
    """

    rules: tuple[str, ...] | None = None
    endpoints: Literal["patch", "position"] = "patch"
    blend: bool = False
    max_endpoints: int = Field(default=8, ge=1)
    auto_cells: int = Field(default=256, ge=16)
    auto_seed: int = 0


class PathParams(Params):
    """steps: m, intervals of the path. rule: left, right (error O(1/m)), midpoint, trapezoid (O(1/m²); trapezoid has
    m + 1 points) or gauss_legendre, with α = 0 at the run. For noising, "right" is the grid of EAP-IG's code (α from the
    patch side k/m, k = 0..m−1), "left" the paper's (k = 1..m). chunk_tokens: how many tokens one pass may hold (points are
    rows of the batch; None: `Room`).
    """

    steps: int = Field(default=10, ge=1)
    rule: QuadratureRule = "midpoint"
    chunk_tokens: int | None = Field(default=None, gt=0)


class RelpIgParams(PathParams):
    """As ig_inputs; rules: rule names, or None for the family's preset (paper Table 4)."""

    rules: tuple[str, ...] | None = None


class IgActivationsParams(PathParams):
    """exact: (layer, unit) couples whose nodes are interpolated one at a time (at every position, in every requested
    kind; unit 0 for vector nodes), or "all"; the others' layer moves jointly. steps, rule, chunk_tokens: as ig_inputs.
    """

    exact: Literal["all"] | tuple[tuple[int, int], ...] = ()


def quadrature(rule: QuadratureRule, steps: int) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Points α in [0, 1] (0 = run, 1 = source), ascending, and their weights."""
    if rule == "gauss_legendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return (points + 1) / 2, weights / 2
    if rule == "trapezoid":
        weights = np.full(steps + 1, 1 / steps)
        weights[[0, -1]] /= 2
        return np.arange(steps + 1) / steps, weights
    shift = {"left": 0.0, "right": 1.0, "midpoint": 0.5}[rule]
    return (np.arange(steps) + shift) / steps, np.full(steps, 1 / steps)


def atp(_: Batch, __: Params) -> Iterable[Point]:
    """2 forward + 1 backward for all units."""
    return [Point()]


def relp(on: Batch, params: RelpParams) -> Iterator[Point]:
    """2 forward + 1 backward for all units; with c endpoints by position 1 + 2c forward + c backward."""
    rules = rules_of(on, params)
    part: Part = "secant" if params.blend else "whole"
    by_position = params.endpoints == "position"
    if by_position and not on.two_point(rules):
        raise RelpError(
            f"endpoints=position is for two-point rules; there is none among {', '.join(rules) or 'no rules'}"
        )
    if params.blend and on.setup.baseline != "patch":
        raise RelpError(
            f"a blend needs a patch prompt, whose streams shares are of, not baseline '{on.setup.baseline}'"
        )
    tangent = [Point(part="tangent")] if params.blend else []
    if by_position:
        yield from endpoints(on, rules, params.max_endpoints, part, tangent)
    else:
        other = on.recorded(rules)  # first: this pass gives the source's values too, which the tangent needs
        yield from tangent
        yield Point(rules=rules, other=other, part=part)


def endpoints(
    on: Batch, rules: tuple[str, ...], most: int, part: Part = "whole", first: Sequence[Point] = ()
) -> Iterator[Point]:
    """One point per changed position, or group of them, of the pair that has most; weighed by where it counts. first: go
    before these, once what they read is there."""
    run, source = on.setup.run, on.setup.source
    groups = changed_groups(run, source, most)
    n, count = int(groups.max()) + 1, groups.max(1).values + 1  # of the pair with most, and of each
    on.meta["endpoints"] = max(n, 1)
    if n <= 1:  # then the source is the one endpoint of every pair
        other = on.recorded(rules)
        yield from first
        yield Point(rules=rules, other=other, part=part)
        return
    yield from first
    for g in range(n):
        other = on.recorded_on(torch.where(groups == g, source, run), rules)
        mean = ((groups < 0) & (g < count[:, None])) / count.clamp_min(1)[:, None]
        yield Point((groups == g) + mean, rules=rules, other=other, part=part)


def changed_groups(run: Tensor, source: Tensor, most: int) -> Int[Tensor, "batch pos"]:
    """Number of the changed position, from 0 in each pair, −1 where the tokens are the same; positions of more than `most`
    share numbers with their neighbours, as evenly as can be.
    """
    changed = run != source
    order, count = changed.cumsum(1) - 1, changed.sum(1, keepdim=True)
    grouped = torch.where(count > most, order * most // count.clamp_min(1), order)
    return torch.where(changed, grouped, -1)


def ig_inputs(on: Batch, params: PathParams) -> Iterable[Point]:
    """`steps` forward + backward, and 2 forward for δ."""
    return embeddings(on, *quadrature(params.rule, params.steps))


class ExpectedParams(Params):
    """samples: how many points, each drawn uniformly for each pair with `seed`. chunk_tokens: as ig_inputs."""

    samples: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    chunk_tokens: int | None = Field(default=None, gt=0)


def expected_gradients(on: Batch, params: ExpectedParams) -> Iterator[Point]:
    """`samples` forward + backward, and 2 forward for δ."""
    change = on.embedding_change
    pairs = torch.cat([on.setup.run, on.setup.source], 1).tolist()  # the draw is a pair's, however pairs are batched
    draws = np.stack([np.random.default_rng([params.seed, *pair]).random(params.samples) for pair in pairs])
    for alpha in torch.from_numpy(draws).to(change).unbind(1):
        yield Point(1 / params.samples, {EMBEDDED: alpha[:, None, None] * change})


def relp_ig(on: Batch, params: RelpIgParams) -> Iterable[Point]:
    """As ig_inputs. Two-point rules stand between the path's point and the source."""
    return embeddings(on, *quadrature(params.rule, params.steps), rules_of(on, params))


def ig_activations(on: Batch, params: IgActivationsParams) -> Iterator[Point]:
    """`steps` forward + backward per place (and exact node), and 2 forward for δ."""
    for place in on.places(params.exact):
        for alpha, weight in zip(*quadrature(params.rule, params.steps), strict=True):
            yield Point(float(weight), {place.point: float(alpha) * place.change}, of=place.of)


def rules_of(on: Batch, params: RelpParams | RelpIgParams) -> tuple[str, ...]:
    """The rules asked for, or the family's preset."""
    return params.rules if params.rules is not None else on.model.family.rules


def embeddings(
    on: Batch, alphas: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray, rules: tuple[str, ...] = ()
) -> Iterator[Point]:
    """Points between what the first block reads in the run (α = 0) and in the source (α = 1)."""
    other = on.recorded(rules)
    change = on.embedding_change
    for alpha, weight in zip(alphas, weights, strict=True):
        yield Point(float(weight), {EMBEDDED: float(alpha) * change}, rules, other)
