"""One table of estimators over spaces: aliases, refusals, and estimators on spaces that are new to them."""

from __future__ import annotations

import pytest
import torch
from oracles import edges as oracle
from oracles.forward import embed
from oracles.wrapped import Case, case, close, run
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.methods.table import METHODS

ALIASES = [
    ("eap", "atp", {}),
    ("relp_edges", "relp", {}),
    ("relp_edges+two_point", "relp+two_point", {}),
    ("eap_ig", "ig_inputs", {"steps": 5}),
    ("relp_edges_ig", "relp_ig", {"steps": 5}),
    ("eap_ig_activations", "ig_activations", {"steps": 5}),
    ("clean_corrupted", "ig_inputs", {"steps": 1, "rule": "trapezoid"}),
    ("edge_patch", "act_patch", {}),
]


@pytest.mark.parametrize(("name", "method", "options"), ALIASES)
def test_edge_names_are_aliases(name: str, method: str, options: dict[str, object]) -> None:
    c = case("qwen2")
    batches = [c.batch.rows(slice(0, 2))]
    mine, theirs = run(c, name, ["edges"], batches), run(c, method, ["edges"], batches, **options)
    assert torch.equal(mine["edges"].examples, theirs["edges"].examples)
    assert mine["edges"].mean.abs().sum() > 0
    assert (mine.meta["method"], theirs.meta["method"]) == (name, method)
    assert mine.meta["rules"] == theirs.meta["rules"]
    fixed = METHODS[name.partition("+")[0]].fixed
    assert mine.meta["params"] == {k: v for k, v in theirs.meta["params"].items() if k not in fixed}


def test_what_an_alias_fixes_is_no_parameter() -> None:
    c = case("gpt2")
    with pytest.raises(RelpError, match="method 'clean_corrupted' has no parameter 'steps'"):
        run(c, "clean_corrupted", ["edges"], steps=3)
    with pytest.raises(RelpError, match="method 'eap_ig_activations' has no parameter 'exact'"):
        run(c, "eap_ig_activations", ["edges"], exact="all")
    with pytest.raises(RelpError, match="'exact' is not for edges"):
        run(c, "ig_activations", ["edges"], exact="all")


def test_a_space_that_an_estimator_does_not_serve_is_one_line() -> None:
    c = case("gpt2")
    for method, nodes, says in (
        ("atp_star", ["edges"], r"'atp_star' does not score edges; methods for edges: act_patch, .*\('atp_star' scores nodes"),
        ("acdc", ["mlp_out"], r"'acdc' does not score nodes; methods for nodes: .* \('acdc' scores edges\)"),
        ("eap", ["feature"], r"'eap' does not score features; methods for features: .*conductance.* \('eap' scores edges\)"),
        ("relp+auto", ["edges"], "rules are chosen automatically for node kinds, not for edges"),
        ("relp_ig+auto", ["mlp_out"], "rules 'auto' are chosen for method relp only"),
    ):  # fmt: skip
        with pytest.raises(RelpError, match=says) as error:
            run(c, method, nodes)
        assert "\n" not in str(error.value)


def test_points_share_passes_as_far_as_they_fit_on_edges_too() -> None:
    c = case("gemma2")
    whole, cut = (run(c, "relp_ig", ["edges"], steps=3, chunk_tokens=n)["edges"] for n in (16384, 1))
    close(whole.examples, cut.examples)


def _written(c: Case, alpha: float) -> dict[str, Tensor]:
    weights, config, original, patch = c.prompts
    start, end = (embed(weights, config, ids) for ids in (original, patch))
    return oracle.run(weights, config, start + alpha * (end - start)).written


@pytest.mark.parametrize("shape", ["gpt2", "gemma2"])
def test_conductance_of_edges(shape: str) -> None:
    """Edge by edge from its formula; into the logits the edges sum to L(source) − L(run)."""
    c, m = case(shape), 3
    weights, config, original, patch = c.prompts
    start, end = (embed(weights, config, ids) for ids in (original, patch))
    grads = [
        oracle.reader_gradients(weights, config, start + j / m * (end - start), c.metric, set()) for j in range(m + 1)
    ]
    written = [_written(c, j / m) for j in range(m + 1)]
    got = run(c, "conductance", ["edges"], steps=m)["edges"]
    for index, (u, v) in enumerate(name.split("->") for name in got.edge_names()):
        want = sum(
            ((written[j + 1][u] - written[j][u]) * (grads[j][v] + grads[j + 1][v]) / 2).sum((1, 2)) for j in range(m)
        )
        close(got.examples[:, 0, index], want)
    fine = run(c, "conductance", ["edges"], steps=60)["edges"]
    runs = [c.metric(oracle.run(weights, config, ids).logits) for ids in (original, patch)]
    close(fine.mean[:, -1].sum(), (runs[1] - runs[0]).mean(), 1e-2)
