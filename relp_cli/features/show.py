"""Features as people read them: the largest scores, with annotations, or with what the features respond to and write."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from relp_cli.features.annotations import Annotations
from relp_cli.features.load import Dictionaries
from relp_cli.lrp.sites import linear_parameters
from relp_cli.models.model import Model
from relp_cli.nodes.access import activations
from relp_cli.precision import wide
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.sites import Site, parse_site
from relp_cli.spaces.top import top_units
from relp_cli.tasks.pairs import PairBatch

COLUMNS = ("kind", "site", "position", "feature", "score", "se", "n")


def top_features(scores: Scores, k: int = 10) -> pd.DataFrame:
    """The k features and error terms with the largest |mean score|: kind, site, position, feature (missing for error terms),
    score, se (standard error), n.
    """
    return top_units(scores, k).rename(columns={"layer": "site", "unit": "feature"})


def described(
    table: pd.DataFrame,
    model: Model,
    dictionaries: Dictionaries,
    pairs: Sequence[PairBatch],
    annotations: Annotations | None = None,
    k: int = 3,
) -> pd.DataFrame:
    """`top_features`' rows with their annotation; where there is none, with the k contexts of the task in which the feature
    is most active (the token in brackets) and the k tokens that its decoder row promotes and suppresses most.
    """
    wanted = sorted({(parse_site(row.site), int(row.feature)) for row in table.itertuples() if row.kind == "feature"})  # type: ignore[arg-type]
    notes = annotations or {}
    plain = [(site, unit) for site, unit in wanted if site is not None and (site, unit) not in notes]
    contexts = top_contexts(model, dictionaries, pairs, plain, k)
    said: list[str] = []
    for row in table.itertuples():
        site = parse_site(str(row.site))
        if row.kind != "feature" or site is None:
            said.append("what the dictionary leaves out")
            continue
        key = (site, int(str(row.feature)))
        if key in notes:
            said.append(notes[key])
            continue
        up, down = promoted(model, dictionaries[site].w_dec[key[1]], k)
        said.append(f"on {' | '.join(contexts[key])}; ↑ {' '.join(up)} ↓ {' '.join(down)}")
    return table.assign(meaning=said)


@torch.no_grad()
def top_contexts(
    model: Model, dictionaries: Dictionaries, pairs: Sequence[PairBatch], wanted: Sequence[tuple[Site, int]], k: int
) -> dict[tuple[Site, int], list[str]]:
    """(site, feature) → the k contexts, among the pairs' prompts, in which it is most active."""
    best: dict[tuple[Site, int], dict[str, float]] = {key: {} for key in wanted}
    kinds = tuple(dict.fromkeys(site.node_kind for site, _ in wanted))
    for batch in pairs if wanted else []:
        for tokens in (batch.original, batch.patch):
            if tokens is None:
                continue
            tokens = tokens.to(model.device)
            seen = activations(model, tokens, kinds)
            for site in dict.fromkeys(site for site, _ in wanted):
                f = dictionaries[site].encode(seen[site.node_kind.name][site.at])
                for unit in (u for s, u in wanted if s == site):
                    _keep_best(best[site, unit], model, tokens, f[..., unit], k)
    return {key: list(found) or ["(inactive in these prompts)"] for key, found in best.items()}


def _keep_best(found: dict[str, float], model: Model, tokens: Tensor, f: Tensor, k: int) -> None:
    """Merge the k largest activations Float[batch, pos] of one batch into `found`, largest first."""
    values, flat = f.flatten().topk(min(4 * k, f.numel()))
    for value, at in zip(values.tolist(), flat.tolist(), strict=True):
        row, pos = divmod(at, f.shape[1])
        if value > 0:
            text = _words(model, tokens[row, max(0, pos - 3) : pos])
            context = f"{text} [{_words(model, tokens[row, pos : pos + 1])}]".strip()
            found[context] = max(value, found.get(context, 0.0))
    order = sorted(found.items(), key=lambda item: -item[1])[:k]
    found.clear()
    found.update(order)


def _words(model: Model, ids: Tensor) -> str:
    if model.tokenizer is None:
        return " ".join(str(i) for i in ids.tolist())
    return str(model.tokenizer.decode(ids.tolist())).strip()


@torch.no_grad()
def promoted(model: Model, direction: Tensor, k: int) -> tuple[list[str], list[str]]:
    """The k tokens whose logits a direction of the residual stream raises and lowers most, through the unembedding."""
    weight, _ = linear_parameters(model, "unembed", model.shape.d_model, model.shape.vocab)
    logits = wide(weight) @ direction
    up, down = logits.topk(k).indices, (-logits).topk(k).indices
    return [_words(model, i[None]) for i in up], [_words(model, i[None]) for i in down]
