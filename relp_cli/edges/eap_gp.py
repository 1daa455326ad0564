"""EAP-GP (Zhang et al. 2025): the gradient averaged along a path that follows the gradients, for edges.

1. γ_0 is one prompt's embeddings (`start`), the other prompt's are the target; G(γ) = ∂L/∂γ.
2. Each step goes against ∂‖G(γ) − G(target)‖²/∂γ, normalised per example to `step`/`steps` times the distance between the
   prompts' embeddings. A step without a direction (its norm is 0) stays where it is.
3. The gradients at γ_0 … γ_{steps−1} are averaged: with `steps` = 1 that is EAP at the start.
The paper and its secondary sources disagree on the starting side and the step length; hence both are parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from relp_cli.edges.gradients import Products, reader_gradients
from relp_cli.edges.setup import EdgeResult, EdgeSetup, Progress
from relp_cli.errors import RelpError
from relp_cli.methods.core import refuse_metric
from relp_cli.methods.table import Params
from relp_cli.models.model import Hook
from relp_cli.precision import wide


class EapGpParams(Params):
    """steps: points on the path. start: the prompt it starts at, "patch" (default) or "original". step: length of all
    steps together, in units of the distance between the two prompts' embeddings.
    """

    steps: int = Field(default=5, ge=1)
    start: Literal["patch", "original"] = "patch"
    step: float = Field(default=1.0, gt=0)


def eap_gp(setups: Sequence[EdgeSetup], params: EapGpParams, progress: Progress | None) -> Iterator[EdgeResult]:  # noqa: ARG001
    """δu · mean over the path of ∂L/∂(input of v). Per step 2 forward + 4 backward; the path's mean distances from the
    target and gradient gaps are in the scores' metadata (`path`).

    Raises: RelpError without a patch prompt.
    """
    distances, gaps, n = torch.zeros(params.steps), torch.zeros(params.steps), 0
    for setup in setups:
        source, _ = setup.source()
        delta = source - setup.run()
        points, gap = gradient_path(setup, params)
        products, total = Products(setup.model, setup.graph, delta, setup.positions), torch.zeros(())
        for point in points[:-1]:
            at = reader_gradients(setup.base, clamp=[("blocks.0.hook_in", _set(point))])
            total = total + products.scores(at) / params.steps
        far = torch.stack([(wide(p) - wide(points[-1])).flatten(1).norm(dim=1).sum() for p in points[:-1]])
        distances, gaps, n = distances + far.cpu(), gaps + gap.sum(1).cpu(), n + len(setup)
        path = {"distance_to_target": (distances / n).tolist(), "gradient_gap": (gaps / n).tolist()}
        yield EdgeResult(setup.to_slots(total), meta={"path": path})


def gradient_path(
    setup: EdgeSetup, params: EapGpParams
) -> tuple[list[Float[Tensor, "batch pos d_model"]], Float[Tensor, "step batch"]]:
    """(γ_0 … γ_{steps−1} and the target, ‖G(γ_j) − G(target)‖ per step): values of the first block's input."""
    base = setup.base
    if base.baseline != "patch":
        raise RelpError(f"eap_gp walks between two prompts; it has no baseline '{base.baseline}'")
    refuse_metric(base, at_run=True)
    ends = [_embedded(setup, tokens) for tokens in (base.batch.patch, base.batch.original)]
    point, target = ends if params.start == "patch" else reversed(ends)
    wanted = _gradient(setup, target, False).detach()
    length = params.step / params.steps * (wide(point) - wide(target)).flatten(1).norm(dim=1)
    points, gaps = [point], []
    for i in range(params.steps):
        leaf = points[-1].detach().requires_grad_(True)
        last = i == params.steps - 1
        squared = (_gradient(setup, leaf, not last) - wanted).square().flatten(1).sum(1)
        gaps.append(squared.detach().sqrt())
        if last:
            break
        (slope,) = torch.autograd.grad(squared.sum(), leaf)
        setup.base.passes.backward += 2
        norm = wide(slope).flatten(1).norm(dim=1)
        scale = torch.where(norm > 0, length / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(norm))
        points.append((points[-1] - scale[:, None, None] * slope).to(leaf.dtype))
    return [*points, target], torch.stack(gaps)


def _embedded(setup: EdgeSetup, tokens: Tensor | None) -> Tensor:
    seen: list[Tensor] = []
    assert tokens is not None  # Setup refuses the baseline "patch" without a patch prompt
    with torch.no_grad(), setup.model.hooks({"blocks.0.hook_in": seen.append}):
        setup.model.logits(tokens)
    setup.base.passes.forward += 1
    return seen[0]


def _gradient(setup: EdgeSetup, leaf: Tensor, again: bool) -> Tensor:
    """∂L/∂γ; again: keep its graph, so that it can be differentiated once more."""
    leaf = leaf if leaf.requires_grad else leaf.detach().requires_grad_(True)
    with torch.enable_grad():
        with setup.model.hooks({"blocks.0.hook_in": _set(leaf)}):
            logits = setup.model.logits(setup.base.run)
        (g,) = torch.autograd.grad(setup.base.value(logits).sum(), leaf, create_graph=again)
    setup.base.passes.forward += 1
    setup.base.passes.backward += 1
    return wide(g)


def _set(value: Tensor) -> Hook:
    return lambda _: value
