"""Edge attribution patching (Syed et al. 2023) and RelP on edges: (u(source) − u(run))·∂L/∂(input of v)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from relp_cli.edges.gradients import Products, reader_gradients
from relp_cli.edges.setup import EdgeResult, EdgeSetup, Progress
from relp_cli.errors import RelpError
from relp_cli.methods.relp import RelpParams
from relp_cli.methods.table import Params


def eap(setups: Sequence[EdgeSetup], params: Params, progress: Progress | None) -> Iterator[EdgeResult]:  # noqa: ARG001
    """2 forward + 1 backward for all edges, gradient at the run."""
    for setup in setups:
        yield _at_run(setup, ())


def relp_edges(setups: Sequence[EdgeSetup], params: RelpParams, progress: Progress | None) -> Iterator[EdgeResult]:  # noqa: ARG001
    """2 forward + 1 backward for all edges, with RelP's coefficients in place of the gradient."""
    for setup in setups:
        yield _at_run(setup, params.rules if params.rules is not None else setup.model.family.rules)


def _at_run(setup: EdgeSetup, rules: Sequence[str]) -> EdgeResult:
    source, other = setup.source(rules)
    at = reader_gradients(setup.base, rules, other)
    setup.base.seen["run"] = at.metric
    scores = Products(setup.model, setup.graph, source - at.written, setup.positions).scores(at)
    return EdgeResult(setup.to_slots(scores), at.applied)


def clean_corrupted(setups: Sequence[EdgeSetup], params: Params, progress: Progress | None) -> Iterator[EdgeResult]:  # noqa: ARG001
    """Mean of the gradients at the two prompts: 2 forward + 2 backward (Hanna et al. 2024's code).

    Raises: RelpError without a patch prompt.
    """
    for setup in setups:
        base = setup.base
        if base.baseline != "patch":
            raise RelpError(
                f"clean_corrupted takes its second gradient at a patch prompt, not baseline '{base.baseline}'"
            )
        ends = [reader_gradients(base, tokens=tokens) for tokens in (base.run, base.source)]
        base.seen["run"], base.seen["source"] = (end.metric for end in ends)
        delta = ends[1].written - ends[0].written
        products = Products(setup.model, setup.graph, delta, setup.positions)
        scores = [products.scores(end) for end in ends]
        yield EdgeResult(setup.to_slots((scores[0] + scores[1]) / 2))
