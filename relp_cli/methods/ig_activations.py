"""Integrated gradients over activations (IGact): δn · mean_α ∂L/∂n, n clamped to n(run) + α·δn, all else as run.

Interpolating one node at a time is the exact definition (and as steps grow, exact patching of a node whose path is the
straight line between its two values). What is affordable, and what Marks et al. do, is to interpolate one layer's site
jointly: all positions and units of it at once. `Scores.meta["interpolation"]` says which was done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.methods.core import PerExample, refuse_metric
from relp_cli.methods.path import PathParams, chunks, quadrature
from relp_cli.methods.setup import Setup
from relp_cli.methods.table import Result
from relp_cli.nodes.access import per_node, split, units
from relp_cli.nodes.kinds import NodeKind
from relp_cli.precision import wide

Nodes = Sequence[tuple[int, int]]  # (slot, unit) of one layer; unit 0 for vector nodes


class IgActivationsParams(PathParams):
    """exact: (layer, unit) couples whose nodes are interpolated one at a time (at every position, in every requested
    kind; unit 0 for vector nodes), or "all"; the others' layer moves jointly. steps, rule, chunk_tokens: as ig_inputs.
    """

    exact: Literal["all"] | tuple[tuple[int, int], ...] = ()


def ig_activations(setup: Setup, params: IgActivationsParams) -> Result:
    """`steps` forward + backward per (layer, kind), and per exact node; 2 forward for δ."""
    source, values = setup.source_activations(), setup.run_activations()
    scores: PerExample = {}
    for kind in setup.kinds:
        layers = [
            _layer(setup, kind, layer, source[kind.name][layer], values[kind.name][layer], params)
            for layer in range(setup.model.shape.n_layers)
        ]
        scores[kind.name] = torch.stack(layers, 1)
    return Result(scores, meta={"interpolation": _interpolation(params)})


def _interpolation(params: IgActivationsParams) -> str:
    if params.exact == "all":
        return "exact (one node at a time)"
    joint = "joint (one layer's site at once)"
    if not params.exact:
        return joint
    return f"exact (one node at a time) for layer, unit {list(params.exact)}; {joint} for the others"


def _layer(
    setup: Setup, kind: NodeKind, layer: int, source: Tensor, value: Tensor, params: IgActivationsParams
) -> Float[Tensor, "batch slot *unit"]:
    n_units, chosen = units(setup.model, kind), _chosen(setup, kind, layer, params)
    shape = (*value.shape[:2],) if kind.split == "vector" else (*value.shape[:2], n_units)
    if len(chosen) < n_units:
        everything = torch.ones(1, *value.shape[1:2], n_units, dtype=torch.bool, device=value.device)
        delta = wide(source) - wide(value)
        mean = _mean_gradient(setup, kind, layer, everything, value, delta, params)
        joint = setup.to_slots(per_node(setup.model, kind, delta * mean)[:, None])[:, 0]
    else:
        joint = wide(value).new_zeros(shape[0], len(setup.labels), *shape[2:])
    if not chosen:
        return joint
    nodes = [(slot, unit) for slot in range(len(setup.labels)) for unit in chosen]
    effects = ig_one_node(setup, kind, layer, nodes, source, value, params).unflatten(1, (len(setup.labels), -1))
    if kind.split == "vector":
        return effects[..., 0]
    joint[..., list(chosen)] = effects
    return joint


def _chosen(setup: Setup, kind: NodeKind, layer: int, params: IgActivationsParams) -> list[int]:
    """Units of this layer that are interpolated one at a time."""
    n_units, n_layers = units(setup.model, kind), setup.model.shape.n_layers
    if isinstance(params.exact, str):
        return list(range(n_units))
    for at, unit in params.exact:
        if not (0 <= at < n_layers and 0 <= unit < n_units):
            raise RelpError(
                f"exact: {kind.name} has no layer {at}, unit {unit}; there are {n_layers} layers of {n_units} units"
            )
    return sorted({unit for at, unit in params.exact if at == layer})


def ig_one_node(
    setup: Setup, kind: NodeKind, layer: int, nodes: Nodes, source: Tensor, value: Tensor, params: PathParams
) -> Float[Tensor, "batch nodes"]:
    """Exact IGact of some nodes of one layer: each is interpolated on its own, all else is as in the run.

    source, value: n(source), n(run) of the site, Float[batch, pos, width]. Positions sharing a label move together.
    """
    where: Bool[Tensor, "nodes pos units"] = torch.zeros(
        len(nodes), setup.batch.n_pos, units(setup.model, kind), dtype=torch.bool, device=value.device
    )
    for row, (slot, unit) in enumerate(nodes):
        where[row, setup.slots == slot, unit] = True
    delta = wide(source) - wide(value)
    out = delta.new_zeros(len(nodes), len(value))
    for rows, weights, grads in _points(setup, kind, layer, where, value, delta, params):
        moved = split(setup.model, kind, delta) * where[rows][:, None, :, :, None]
        effects = (moved * split(setup.model, kind, grads)).sum((-3, -2, -1))
        out.index_add_(0, rows, weights[:, None] * effects)
    return out.T


def _mean_gradient(
    setup: Setup, kind: NodeKind, layer: int, where: Tensor, value: Tensor, delta: Tensor, params: PathParams
) -> Float[Tensor, "batch pos width"]:
    total = torch.zeros_like(delta)
    for _, weights, grads in _points(setup, kind, layer, where, value, delta, params):
        total += torch.einsum("a,ab...->b...", weights, grads)
    return total


def _points(
    setup: Setup, kind: NodeKind, layer: int, where: Tensor, value: Tensor, delta: Tensor, params: PathParams
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(which row of `where`, weight, ∂L/∂site Float[copies, batch, pos, width]) for every row and point, in chunks."""
    refuse_metric(setup, at_run=False)
    rule = quadrature(params.rule, params.steps)
    alphas, weights = (delta.new_tensor(x) for x in rule)
    n = len(alphas)
    for part in chunks(len(where) * n, setup, params.chunk_tokens):
        copies = torch.arange(part.start, part.stop, device=value.device)
        rows, points = copies // n, copies % n
        move = where[rows][:, None, :, :, None] * alphas[points].view(-1, 1, 1, 1, 1)
        site = (value + (move * split(setup.model, kind, delta)).flatten(-2)).to(value.dtype)
        leaf = site.flatten(0, 1).requires_grad_(True)
        with torch.enable_grad():
            with setup.model.hooks({kind.point(layer): lambda _, leaf=leaf: leaf}):  # type: ignore[misc]
                logits = setup.model.logits(setup.run.repeat(len(copies), 1))
            (grad,) = torch.autograd.grad(setup.value(logits).sum(), leaf)
        setup.passes.forward += len(copies)
        setup.passes.backward += len(copies)
        yield rows, weights[points], wide(grad).unflatten(0, (len(copies), -1))
