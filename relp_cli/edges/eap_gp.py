"""EAP-GP (Zhang et al. 2025): the gradient averaged along a path that follows the gradients, for edges.

1. γ_0 is one prompt's embeddings (`start`), the other prompt's are the target; G(γ) = ∂L/∂γ.
2. Each step goes against ∂‖G(γ) − G(target)‖²/∂γ, normalised per example to `step`/`steps` times the distance between the
   prompts' embeddings. A step without a direction (its norm is 0) stays where it is.
3. The gradients at γ_0 … γ_{steps−1} are averaged: with `steps` = 1 that is EAP at the start.
The paper and its secondary sources disagree on the starting side and the step length; hence both are parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from relp_cli.methods.core import refuse_metric
from relp_cli.methods.setup import Setup
from relp_cli.methods.space import Batch, Point
from relp_cli.methods.table import Params, Result
from relp_cli.nodes.access import EMBEDDED
from relp_cli.precision import wide


class EapGpParams(Params):
    """steps: points on the path. start: the prompt it starts at, "patch" (default) or "original". step: length of all
    steps together, in units of the distance between the two prompts' embeddings.
    """

    steps: int = Field(default=5, ge=1)
    start: Literal["patch", "original"] = "patch"
    step: float = Field(default=1.0, gt=0)


def eap_gp(batches: Sequence[Batch], params: EapGpParams) -> Iterator[Result]:
    """δu · mean over the path of ∂L/∂(input of v). Per step 2 forward + 4 backward; the path's mean distances from the
    target and gradient gaps are in the scores' metadata (`path`).
    """
    distances, gaps, n = torch.zeros(params.steps), torch.zeros(params.steps), 0
    for on in batches:
        setup = on.setup
        refuse_metric(setup, at_run=True)
        ends = {"original": _embedded(setup, setup.batch.original), "patch": _embedded(setup, setup.batch.patch)}
        path, target, gap = gradient_path(setup, params, ends)
        at_run = ends["original" if setup.direction == "noising" else "patch"]
        result = on.attribute(Point(1 / params.steps, {EMBEDDED: wide(point) - wide(at_run)}) for point in path)
        far = torch.stack([(wide(point) - wide(target)).flatten(1).norm(dim=1).sum() for point in path])
        distances, gaps, n = distances + far.cpu(), gaps + gap.sum(1).cpu(), n + len(on)
        about = {"distance_to_target": (distances / n).tolist(), "gradient_gap": (gaps / n).tolist()}
        yield replace(result, meta={"path": about})


def gradient_path(
    setup: Setup, params: EapGpParams, ends: Mapping[str, Tensor]
) -> tuple[list[Float[Tensor, "batch pos d_model"]], Tensor, Float[Tensor, "step batch"]]:
    """(γ_0 … γ_{steps−1}, the target, ‖G(γ_j) − G(target)‖ per step): values of the first block's input.

    ends: the two prompts' (see `EapGpParams.start`).
    """
    point, target = ends[params.start], ends["original" if params.start == "patch" else "patch"]
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
        setup.passes.backward += 2
        norm = wide(slope).flatten(1).norm(dim=1)
        scale = torch.where(norm > 0, length / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(norm))
        points.append((points[-1] - scale[:, None, None] * slope).to(leaf.dtype))
    return points, target, torch.stack(gaps)


def _embedded(setup: Setup, tokens: Tensor | None) -> Tensor:
    seen: list[Tensor] = []
    assert tokens is not None  # the row has baseline "patch" alone, which Setup refuses without a patch prompt
    with torch.no_grad(), setup.model.hooks({EMBEDDED: seen.append}):
        setup.model.logits(tokens)
    setup.passes.forward += 1
    return seen[0]


def _gradient(setup: Setup, leaf: Tensor, again: bool) -> Tensor:
    """∂L/∂γ; again: keep its graph, so that it can be differentiated once more."""
    leaf = leaf if leaf.requires_grad else leaf.detach().requires_grad_(True)
    with torch.enable_grad():
        with setup.model.hooks({EMBEDDED: lambda _: leaf}):
            logits = setup.model.logits(setup.run)
        (g,) = torch.autograd.grad(setup.value(logits).sum(), leaf, create_graph=again)
    setup.passes.forward += 1
    setup.passes.backward += 1
    return wide(g)
