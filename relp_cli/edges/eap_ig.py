"""EAP-IG (Hanna et al. 2024): the gradient averaged along a path, for edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field
from torch import Tensor

from relp_cli.edges.gradients import Products, reader_gradients
from relp_cli.edges.setup import EdgeResult, EdgeSetup, Progress
from relp_cli.edges.stream import Written
from relp_cli.methods.path import QuadratureRule, quadrature
from relp_cli.methods.table import Params
from relp_cli.models.model import Hook


class EapIgParams(Params):
    """steps: m, points on the path (trapezoid: m + 1). rule: midpoint (error O(1/m²)), left, right, trapezoid or
    gauss_legendre, with α = 0 at the run. For noising, "right" is the grid of EAP-IG's code (α from the patch side
    k/m, k = 0..m−1) and "left" the paper's (k = 1..m).
    """

    steps: int = Field(default=5, ge=1)
    rule: QuadratureRule = "midpoint"


class RelpEdgesIgParams(EapIgParams):
    """As eap_ig; rules: rule names, or None for the family's preset (paper Table 4)."""

    rules: tuple[str, ...] | None = None


def eap_ig(setups: Sequence[EdgeSetup], params: EapIgParams, progress: Progress | None) -> Iterator[EdgeResult]:  # noqa: ARG001
    """Embeddings move from run to source: `steps` forward + backward, and 2 forward for δ."""
    for setup in setups:
        yield along_embeddings(setup, params, ())


def relp_edges_ig(
    setups: Sequence[EdgeSetup], params: RelpEdgesIgParams, progress: Progress | None  # noqa: ARG001
) -> Iterator[EdgeResult]:  # fmt: skip
    """RelP's coefficients averaged along eap_ig's path; one left step is relp_edges."""
    for setup in setups:
        yield along_embeddings(setup, params, params.rules if params.rules is not None else setup.model.family.rules)


def along_embeddings(setup: EdgeSetup, params: EapIgParams, rules: Sequence[str]) -> EdgeResult:
    """δu · Σ_α w_α ∂L/∂(input of v) with the first block's input at run + α·(source − run)."""
    source, other = setup.source(rules)
    run = setup.run()
    delta = source - run
    products = Products(setup.model, setup.graph, delta, setup.positions)
    scores, applied = None, {}
    for alpha, weight in zip(*quadrature(params.rule, params.steps), strict=True):
        at = reader_gradients(setup.base, rules, other, clamp=[shifted("blocks.0.hook_in", float(alpha) * delta.input)])
        applied = at.applied
        one = float(weight) * products.scores(at)
        scores = one if scores is None else scores + one
        del at  # before the next pass, not during it
    assert scores is not None  # steps ≥ 1
    return EdgeResult(setup.to_slots(scores), applied)


def eap_ig_activations(
    setups: Sequence[EdgeSetup], params: EapIgParams, progress: Progress | None
) -> Iterator[EdgeResult]:
    """One writing site at a time (the input, a layer's heads jointly, a layer's MLP) is held at run + α·(source − run)
    while all else runs as it does; its own edges are scored with the gradients averaged over α.

    Cost: (2·layers + 1) × steps forward + backward, and 2 forward for δ. EAP-IG's code (`ig_activations`) averages the
    gradients of *all* edges over the clamped runs of all sites instead.
    """
    for done, setup in enumerate(setups):
        source, _ = setup.source()
        run = setup.run()
        delta, alphas = source - run, quadrature(params.rule, params.steps)
        products = Products(setup.model, setup.graph, delta, setup.positions)
        total = None
        sites = list(_sites(setup, delta))
        for i, (point, change, writers) in enumerate(sites):
            for alpha, weight in zip(*alphas, strict=True):
                at = reader_gradients(setup.base, clamp=[shifted(point, float(alpha) * change)])
                one = float(weight) * products.scores(at, writers)
                total = one if total is None else total + one
            if progress:
                progress(done * len(sites) + i + 1, len(setups) * len(sites), "writing sites")
        assert total is not None  # there is always the input
        yield EdgeResult(setup.to_slots(total))


def _sites(setup: EdgeSetup, delta: Written) -> Iterator[tuple[str, Tensor, slice]]:
    """(hook point, change of its value from run to source, its rows among the writers)."""
    yield "blocks.0.hook_in", delta.input, slice(0, 1)
    for layer in range(setup.graph.n_layers):
        heads = setup.graph.heads_of(layer)
        yield f"blocks.{layer}.hook_attn_out", delta.heads_out(setup.model, layer).sum(0), heads
        yield f"blocks.{layer}.hook_mlp_out", delta.mlps[layer], slice(heads.stop, heads.stop + 1)


def shifted(point: str, change: Tensor) -> tuple[str, Hook]:
    """The hook that adds `change` to a value of the run. Nothing before the site differs from the run, so this holds it."""
    return point, lambda value: (value + change).to(value.dtype)
