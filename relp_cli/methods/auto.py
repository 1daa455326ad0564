"""`rules="auto"` (`relp+auto`): the rule set is chosen per node kind by what agrees best with exact patching.

1. A quarter of the pairs (4 to 32, drawn with a seed, never all of one length) is set aside for the choice. These pairs
   get no score: in `Scores` they are absent, so no comparison can report a cell that the choice has seen.
2. On them every candidate rule set scores every node, and a random sample of (pair, node) cells is patched exactly.
   Cells where every candidate says 0 (the patch changes nothing there) are not drawn.
3. Per node kind: the Pearson correlation of each candidate with the exact effects over the sampled cells, and of the
   best candidate its margin over the family's preset, with a paired bootstrap over cells.
4. The best candidate is taken where the margin's interval (95 %, corrected for the number of candidates) lies above 0;
   otherwise the preset. The other pairs are then scored; `Scores.meta["auto"]` has the table, the choice and the cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.methods.means import mean_activations
from relp_cli.methods.patching import patch_nodes
from relp_cli.methods.points import RelpParams
from relp_cli.methods.request import Request
from relp_cli.methods.score import score_units, with_extra_rules
from relp_cli.methods.setup import Passes
from relp_cli.models.model import Model
from relp_cli.nodes.access import units
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.spaces.scores import KindScores, Scores, whole_of
from relp_cli.statistics import TAIL, interval, pearson, resample_picks
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.parts import parts_of
from relp_cli.tasks.shared import PROMPT_OF, about_prompts, prompts_of

Rules = tuple[str, ...]
Cells = dict[str, np.ndarray]  # node kind → Int[cell, (pair, layer, label, unit)]
LEAST_PAIRS, DRAWS = 8, 2000


@dataclass(frozen=True)
class Candidate:
    """Rules, and what `relp` does with them (`RelpParams`)."""

    rules: Rules
    endpoints: str = "patch"
    blend: bool = False

    @property
    def words(self) -> list[str]:
        """For people and files."""
        return [*self.rules, *(["endpoints=position"] if self.endpoints != "patch" else []), *(["blend"] * self.blend)]


def candidates(model: Model, nodes: Sequence[str], baseline: str = "patch") -> dict[str, Candidate]:
    """Name → candidate. The first is the family's preset. Two-point rules need a patch prompt; under AH queries have no score."""
    preset = model.family.rules
    out = {"preset": preset, "preset + ah": (*preset, "ah"), "no rules": ()}
    if {"query", "key"} & set(nodes):
        del out["preset + ah"]
    found = {name: Candidate(rules) for name, rules in out.items()}
    if baseline != "patch":
        return found
    two_point = with_extra_rules(model, preset, ["two_point"])
    two = {"two-point": two_point, "two-point, plain attention": tuple(r for r in two_point if r != "attn2")}
    if "gate2" in two_point:
        halved = tuple("half" if r == "gate2" else r for r in two_point)
        two["two-point, half"] = halved
        two["two-point, half, plain attention"] = tuple(r for r in halved if r != "attn2")
    found |= {name: Candidate(rules) for name, rules in two.items()}
    local, secant = (with_extra_rules(model, preset, [name]) for name in ("local", "secant"))
    return found | {
        "local": Candidate(local),
        "local, blend": Candidate(local, blend=True),
        "secant": Candidate(secant, "position"),
        "secant, blend": Candidate(secant, "position", True),
    }


def score_auto(
    model: Model, pairs: Sequence[PairBatch], params: RelpParams, nodes: Sequence[str], request: Request
) -> Scores:
    """Choose rules per node kind on pairs set aside, and score the others. See the module's docstring.

    Raises: RelpError for fewer than 8 pairs.
    """
    aside = set_aside(pairs, params.auto_seed)
    choosing = [b.rows(rows) for b, rows in zip(pairs, aside, strict=True) if rows.any()]
    scoring = [b.rows(~rows) for b, rows in zip(pairs, aside, strict=True)]
    table, chosen, cost = choose(model, choosing, params, nodes, request)
    by_rules: dict[Candidate, list[str]] = {}
    for kind in nodes:
        by_rules.setdefault(chosen[kind], []).append(kind)
    parts = [score_units(model, scoring, "relp", kinds, request, **vars(how)) for how, kinds in by_rules.items()]
    n_scored = sum(len(b) for b in scoring)
    several = len(by_rules) > 1
    applied = {
        f"{rule} ({', '.join(kinds)})" if several else rule: n
        for part, kinds in zip(parts, by_rules.values(), strict=True)
        for rule, n in part.meta["rules"].items()
    }
    meta = {
        **parts[0].meta,
        "method": "relp+auto",
        "params": params.model_dump(mode="json"),
        "rules": applied,
        "forwards_per_pair": round(sum(p.meta["forwards_per_pair"] for p in parts) + cost["forwards"] / n_scored, 3),
        "backwards_per_pair": round(sum(p.meta["backwards_per_pair"] for p in parts) + cost["backwards"] / n_scored, 3),
        "seconds": round(sum(p.meta["seconds"] for p in parts) + cost["seconds"], 3),
        "auto": {
            "chosen": {kind: how.words for kind, how in chosen.items()},
            "table": table,
            "pairs_set_aside": sum(len(b) for b in choosing),
            "cost_of_the_choice": cost,
            "passes_of_the_scoring": [
                sum(p.meta[k] for p in parts) for k in ("forwards_per_pair", "backwards_per_pair")
            ],
        },
    }
    if PROMPT_OF in (of_all := about_prompts(prompts_of(pairs))):  # examples keep a row for those set aside
        meta[PROMPT_OF] = of_all[PROMPT_OF]
    scored = {kind: scores for part in parts for kind, scores in part.items()}
    return _with_gaps(whole_of({kind: scored[kind] for kind in nodes}, meta), ~torch.cat(aside))


def set_aside(pairs: Sequence[PairBatch], seed: int) -> list[Tensor]:
    """Bool[pair] per batch: the pairs for the choice; at least one pair of every batch stays."""
    total = sum(len(b) for b in pairs)
    if total < LEAST_PAIRS:
        raise RelpError(
            f"rules 'auto' sets pairs aside to choose on: expected at least {LEAST_PAIRS} pairs, got {total}"
        )
    wanted = min(32, max(4, total // 4))
    out = [torch.zeros(len(b), dtype=torch.bool) for b in pairs]
    where = [(i, row) for i, b in enumerate(pairs) for row in range(len(b))]
    for j in torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist():
        batch, row = where[j]
        if wanted and int(out[batch].sum()) < len(out[batch]) - 1:
            out[batch][row] = True
            wanted -= 1
    return out


def choose(
    model: Model, pairs: Sequence[PairBatch], params: RelpParams, nodes: Sequence[str], request: Request
) -> tuple[list[dict[str, Any]], dict[str, Candidate], dict[str, Any]]:
    """(table, kind → candidate, cost): one row per kind and candidate; forwards and backwards are over one pair."""
    import time

    started = time.perf_counter()
    sets = candidates(model, nodes, request.baseline)
    kept = replace(request, keep_examples=True)
    estimates = {name: score_units(model, pairs, "relp", nodes, kept, **vars(how)) for name, how in sets.items()}
    cells = {kind: _sample(kind, [e[kind] for e in estimates.values()], params) for kind in nodes}
    exact, forwards = exact_cells(model, pairs, cells, next(iter(estimates.values())), request)
    table, chosen = [], {}
    for kind in nodes:
        values = {name: _at(e[kind], cells[kind]) for name, e in estimates.items()}
        rows, best = _compare(kind, values, exact[kind], params.auto_seed)
        table += [row | {"rules": sets[row["candidate"]].words} for row in rows]
        chosen[kind] = sets[best]
    n = sum(len(b) for b in pairs)
    cost = {
        "forwards": forwards + n * sum(e.meta["forwards_per_pair"] for e in estimates.values()),
        "backwards": n * sum(e.meta["backwards_per_pair"] for e in estimates.values()),
        "seconds": round(time.perf_counter() - started, 3),
        "cells": sum(len(c) for c in cells.values()),
    }
    return table, chosen, cost


def _sample(kind: str, estimates: Sequence[KindScores], params: RelpParams) -> np.ndarray:
    """Up to `auto_cells` random cells, Int[cell, 4], where some candidate says that something happens."""
    alive = torch.stack([_examples(e) != 0 for e in estimates]).any(0)
    alive = alive if alive.ndim == 4 else alive[..., None]
    found = alive.nonzero().numpy()
    if len(found) < 3:
        raise RelpError(f"rules 'auto': the patch changes fewer than three {kind} nodes on the pairs set aside")
    return np.random.default_rng(params.auto_seed).permutation(found)[: params.auto_cells]


def _examples(scores: KindScores) -> Tensor:
    assert scores.examples is not None  # scored with keep_examples=True
    return scores.examples


def _at(scores: KindScores, cells: np.ndarray) -> np.ndarray:
    values = _examples(scores)
    values = values if values.ndim == 4 else values[..., None]
    return values.numpy()[tuple(cells.T)].astype(np.float64)


def exact_cells(
    model: Model, pairs: Sequence[PairBatch], cells: Cells, like: Scores, request: Request
) -> tuple[dict[str, np.ndarray], int]:
    """L(run | node ← source) − L(run) of single (pair, node) cells, and the forward passes spent on it.

    cells index (pair, layer, label, unit) as the scores `like` of the same pairs do.
    """
    out = {kind: np.zeros(len(c)) for kind, c in cells.items()}
    kinds = tuple(NODE_KINDS[k] for k in cells)
    parts = parts_of(pairs)
    means = mean_activations(model, parts, kinds, request.batch_size) if request.baseline == "mean" else None
    first, forwards = 0, 0.0 if means is None else float(sum(map(len, parts)))
    for batch in (b.to(model.device) for b in parts):
        first = first if batch.pair is None else int(batch.pair[0])
        setup = request.setup(model, batch, kinds, Passes(), None if means is None else means.at(batch))
        source, index = setup.source_activations(setup.traced[1]), {label: i for i, label in enumerate(setup.labels)}
        for kind in kinds:
            pair, layer, label, unit = torch.from_numpy(cells[kind.name]).unbind(1)
            slot = torch.tensor([index.get(label, -1) for label in like[kind.name].labels])[label]
            here = (pair >= first) & (pair < first + len(batch)) & (slot >= 0)  # a part has not all positions
            where = (layer, pair - first, slot, unit)
            wanted = torch.zeros(model.shape.n_layers, len(batch), len(index), units(model, kind), dtype=torch.bool)
            wanted[tuple(x[here] for x in where)] = True
            found = patch_nodes(setup, source, {(kind.name, n): mask for n, mask in enumerate(wanted)})
            out[kind.name][here.numpy()] += (
                torch.stack(list(found.values())).cpu()[tuple(x[here] for x in where)].numpy()
            )
        forwards += setup.passes.forward * len(batch) + setup.passes.patched
        first += len(batch)
    return out, round(forwards)


def _compare(
    kind: str, values: Mapping[str, np.ndarray], exact: np.ndarray, seed: int
) -> tuple[list[dict[str, Any]], str]:
    """One row per candidate (PCC over cells, 95 % bootstrap interval, margin over the preset), and the candidate taken."""
    names = list(values)
    estimates = np.stack([values[name] for name in names])
    draws = resample_picks(len(exact), DRAWS, seed)
    pcc = pearson(estimates, exact)
    resampled = pearson(estimates[:, draws], exact[draws]).T  # [draw, candidate]
    tail = TAIL / (len(names) - 1)  # any of the others may turn out best
    margins = resampled - resampled[:, [0]]
    low, high = interval(margins, tail)
    best = int(np.nanargmax(pcc)) if not np.isnan(pcc).all() else 0
    taken = names[best] if low[best] > 0 else names[0]
    limits = interval(resampled)
    rows = [
        {"kind": kind, "candidate": name, "pcc": pcc[i], "lo": limits[0, i], "hi": limits[1, i], "margin": pcc[i] - pcc[0],
         "margin_lo": low[i], "margin_hi": high[i], "taken": name == taken, "cells": len(exact)}
        for i, name in enumerate(names)
    ]  # fmt: skip
    return [{k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()} for row in rows], taken


def _with_gaps(scores: Scores, keep: Tensor) -> Scores:
    """Per-example scores on all given pairs, the ones set aside marked absent (their rows are 0)."""
    if scores.examples is None or scores.present is None:
        return scores
    examples = scores.examples.new_zeros(len(keep), *scores.examples.shape[1:])
    present = scores.present.new_zeros(len(keep), scores.present.shape[1])
    examples[keep], present[keep] = scores.examples, scores.present
    return replace(scores, examples=examples, present=present)
