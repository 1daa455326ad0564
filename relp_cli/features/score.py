"""`score_features`: scores of features and error terms on prompt pairs. Reached through `relp.score(nodes=["feature"])`.

1. A method of `methods/` gives activations of run and source and gradients g at every site (`gradients.py`), or exact
   patching patches one feature at a time (`patching.py`).
2. f = enc(x) and ε = x − x̂ in both runs; δf, δε their differences.
3. Score of a feature: δf·(W_dec·g); of the error term: δε·g. At every site they sum to the site's own node score δx·g.
4. Per example first; summed over positions that share a label; then mean and variance over examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.features.circuit import FeatureCircuit
from relp_cli.features.dictionary import Dictionary
from relp_cli.features.gradients import GRADIENT_METHODS, SiteRuns
from relp_cli.features.load import NO_DICTIONARY, Dictionaries, load_dictionaries
from relp_cli.features.patching import patch_features
from relp_cli.features.scores import KIND
from relp_cli.features.sites import Site
from relp_cli.features.totals import Totals
from relp_cli.methods.request import Account, Request
from relp_cli.methods.score import position_axis, resolve_method
from relp_cli.methods.scores import Scores
from relp_cli.methods.setup import Setup
from relp_cli.models.model import Model
from relp_cli.precision import wide
from relp_cli.tasks.pairs import PairBatch

BASELINES = ("patch", "zero")
METHOD_NAMES = (*GRADIENT_METHODS, "act_patch")


def score_features(
    model: Model,
    pairs: Sequence[PairBatch],
    method: str,
    request: Request,
    only: FeatureCircuit | None = None,
    **params: Any,
) -> Scores:
    """Score every feature and error term of all sites that have a dictionary. Arguments as for `relp.score`; besides the
    method's own parameters:

    dictionary: a path or shipped name (see `features.load`), or Dictionaries that are loaded already.
    only:       act_patch patches the nodes of this circuit (others have score 0).

    Returns Scores with the one kind "feature", whose FeatureScores hold features and error terms.
    Raises: RelpError for methods without a meaning for features, and as `relp.score` and `load_dictionaries`.
    """
    where = params.pop("dictionary", None)
    if where is None:
        raise RelpError(NO_DICTIONARY)
    row, parsed = resolve_method(model, method, params)
    check_method(row.name, parsed)
    request.check(" for features", BASELINES)
    axis, labels = position_axis(pairs)
    dictionaries = where if isinstance(where, Dictionaries) else load_dictionaries(where, model)
    kinds = tuple(dict.fromkeys(site.node_kind for site in dictionaries))
    chunks = request.chunks(model, pairs)
    account = Account(request, model, chunks, method)
    sizes = [d.n_features for d in dictionaries.values()]
    totals = Totals(tuple(dictionaries), sizes, labels, request.keep_examples)
    applied: dict[str, int] = {}
    about: dict[str, Any] = {"dictionary": dictionaries.source, "dictionary_hash": dictionaries.digest}
    if dictionaries.model:
        about["dictionary_of"] = dictionaries.model
    for chunk in chunks:
        setup = request.setup(model, chunk, kinds, account.passes)
        features, errors, applied, more = one_batch(setup, dictionaries, row.name, parsed, only)
        totals.add(features, errors, setup.labels)
        about |= {k: about.get(k, 0) + v if isinstance(v, int) else v for k, v in more.items()}
        account.done(setup)
    meta = account.meta(row, parsed, applied, axis, **about)
    return Scores({KIND: totals.finish(axis, meta)}, meta)  # type: ignore[dict-item]


def check_method(name: str, params: Any) -> None:
    """Raises RelpError for methods, and rules, that features cannot be scored with."""
    if name not in METHOD_NAMES:
        raise RelpError(f"method '{name}' does not score features; methods for features: {', '.join(METHOD_NAMES)}")
    if getattr(params, "rules", None) == ("auto",):
        raise RelpError("rules are chosen automatically for node kinds, not for features; give --rules by name")


def one_batch(
    setup: Setup, dictionaries: Mapping[Site, Dictionary], method: str, params: Any, only: FeatureCircuit | None = None
) -> tuple[list[Tensor], list[Tensor], dict[str, int], dict[str, Any]]:
    """Scores of one batch: per site Float[batch, slot, feature] and Float[batch, slot], rules applied, more metadata."""
    if method == "act_patch":
        runs = SiteRuns(setup.run_activations(), setup.source_activations())
        found = [
            patch_features(
                setup, site, d, *_wanted(setup, site, differences(setup, site, d, runs), only), params.chunk_tokens
            )
            for site, d in dictionaries.items()
        ]
        more = {"patched_runs": sum(count for *_, count in found)}
        return [f for f, _, _ in found], [e for _, e, _ in found], {}, more
    at = GRADIENT_METHODS[method](setup, dictionaries, params)
    features, errors = [], []
    for site, d in dictionaries.items():
        delta_f, delta_e = differences(setup, site, d, at.runs)
        g = wide(at.grads[site])
        features.append(setup.to_slots((delta_f * (g @ wide(d.w_dec).T))[:, None])[:, 0])
        errors.append(setup.to_slots((delta_e * g).sum(-1)[:, None])[:, 0])
    return features, errors, at.applied, at.meta


def _wanted(
    setup: Setup, site: Site, deltas: tuple[Tensor, Tensor], only: FeatureCircuit | None
) -> tuple[Tensor, Tensor]:
    """The differences of the circuit's nodes, 0 elsewhere: what does not differ is not patched."""
    if only is None:
        return deltas
    slots = only.slots(setup.batch)
    features, errors = (m[site][slots].to(setup.model.device) for m in (only.features, only.errors))
    return deltas[0] * features, deltas[1] * errors[:, None]


def differences(setup: Setup, site: Site, d: Dictionary, runs: SiteRuns) -> tuple[Tensor, Tensor]:
    """(δf Float[batch, pos, feature], δε Float[batch, pos, d_model]), source minus run; baseline zero: −f, −ε."""
    kind = site.node_kind.name
    f, error = map(wide, d.split(runs.run[kind][site.at]))
    if setup.baseline == "zero":
        return -f, -error
    source_f, source_error = map(wide, d.split(runs.source[kind][site.at]))
    return source_f - f, source_error - error
