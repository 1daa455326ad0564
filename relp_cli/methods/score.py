"""`score_units`: run one estimator over batches of pairs of one space, and aggregate over examples."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from relp_cli.errors import RelpError, nearest, unknown
from relp_cli.lrp.rules import RULE_SETS, RULES, Rule, parse_rules
from relp_cli.methods.halving import Halving, in_one_go
from relp_cli.methods.memory import Plan, give_back, planned
from relp_cli.methods.request import Account, Request, within
from relp_cli.methods.room import Room
from relp_cli.methods.setup import Passes
from relp_cli.methods.space import Batch, Scorer
from relp_cli.methods.table import METHODS, Method, Params, Result, methods_for, row_of
from relp_cli.methods.unfinished import Unfinished
from relp_cli.models.model import Model
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import SpaceRow, space_for
from relp_cli.spaces.totals import Totals
from relp_cli.tasks.formulas import SEVERAL
from relp_cli.tasks.metrics import metric_of
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.parts import parts_of
from relp_cli.tasks.shared import about_prompts, prompts_of, together

COMPONENTS = ("resid_pre", "attn_out", "mlp_out")


def score_units(
    model: Model,
    pairs: Sequence[PairBatch],
    method: str,
    nodes: Sequence[str],
    request: Request,
    only: Any = None,
    **params: Any,
) -> Scores:
    """`relp.score` with one fixed set of rules; see there for arguments and errors. Besides the method's own parameters:

    positions:  of edges, "sum" (one score per edge) or "keep" (one per edge and position; the axis is that of node scores).
    dictionary: of features, a path or shipped name (see `features.load`), or Dictionaries that are loaded already.

    only: of features, the circuit whose nodes act_patch patches (others have score 0).
    """
    work = _Work.begin(model, pairs, method, nodes, request, only, params)
    row, scorer, account = work.row, work.scorer, work.account
    prompts, order = prompts_of(pairs), work.order
    shared = None if order is None else prompts[order]
    totals = Totals(scorer.units, scorer.labels, account.n_pairs, request.keep_examples, shared, order)
    last, parts = Result({}), list[tuple[Batch, Sequence[Tensor]]]()
    for on, result in work.results():
        parts.append((on, scorer.blocks(result.scores)))
        last = Result({}, result.applied, result.meta)
        on.forget()
        if len(parts) == work.parts:
            totals.add(*summed([(on.labels, blocks) for on, blocks in parts]))
            account.done([on.setup for on, _ in parts])
            parts.clear()
        del on, result  # while the next one is computed
    if request.memory is not None or request.room is not None:
        give_back()  # before single scores are copied to be written
    cut = work.halving.about | (work.plan.about if work.plan else {})
    meta = account.meta(row, work.params, last.applied, scorer.axis, **scorer.about, **last.meta, **cut)
    return totals.finish(scorer.axis, meta | about_prompts(prompts))


def score_share(
    model: Model, pairs: Sequence[PairBatch], method: str, nodes: Sequence[str], request: Request, **params: Any
) -> list[int]:
    """Compute what is the share of `request.unfinished.shard` and leave it there. Returns the batches that still miss something.

    `score_units` with the same arguments then has it all, to the same bits, or computes what is missing.
    Raises: as `score_units`. `check_divisible` says which methods have shares.
    """
    work = _Work.begin(model, pairs, method, nodes, request, None, params)
    unfinished = work.unfinished
    assert unfinished is not None
    for on, result in work.results():
        unfinished.write()
        work.account.done([on.setup])
        del on, result  # while the next one is computed
    return [number for number in range(work.account.n_batches * work.parts) if not unfinished.of(number).complete()]


def plan_of(
    model: Model, pairs: Sequence[PairBatch], method: str, nodes: Sequence[str], request: Request, **params: Any
) -> Plan | None:
    """What `score_units` with the same arguments chooses for `request.memory`."""
    return _Work.begin(model, pairs, method, nodes, request, None, params).plan


@dataclass
class _Work:
    """One estimator over batches of pairs of one space, made ready. parts: how many of the batches each chunk of pairs is in
    (`tasks.parts`), one after the other. order: which pair each row is, where pairs of a prompt were put together.
    """

    row: Method
    params: Params
    scorer: Scorer
    account: Account
    batches: Iterable[Batch]
    unfinished: Unfinished | None
    parts: int
    halving: Halving
    order: np.ndarray | None
    plan: Plan | None

    @classmethod
    def begin(
        cls,
        model: Model,
        pairs: Sequence[PairBatch],
        method: str,
        nodes: Sequence[str],
        request: Request,
        only: Any,
        params: dict[str, Any],
    ) -> _Work:
        pairs, order = together(pairs)
        space = space_for(nodes)
        options = {"only": only} | {name: params.pop(name, None) for name in space.options}
        row, parsed = resolve_method(method, params, space.name, model)
        check_baseline(row, space, request)
        scorer: Scorer = space.load_scorer()(model, parts_of(pairs), nodes, request, options)
        check_metric(row, request, parts_of(pairs))

        def compute(on: Batch) -> Result:
            return on.scored(row, parsed)

        chosen = planned(model, pairs, row, scorer, request, compute)
        own, room = getattr(parsed, "chunk_tokens", None), chosen.room if chosen else request.room
        room = room or Room.on(model.device, own, request.batch_size, row.graph)
        chunks = room.batches(pairs, model.device)
        parts = parts_of(chunks)
        account = Account(request, model, chunks, method)
        scorer.prepare(parts, account.passes)
        passes = (lambda: account.passes) if row.by == "all" else Passes
        batches = (
            scorer.batch(part, passes(), room, within(request.progress, i, len(parts))) for i, part in enumerate(parts)
        )
        each = len(parts) // max(1, len(chunks))
        halving = Halving(compute, lambda part, room: scorer.batch(part, Passes(), room, None), room, row.recomputes)
        left = request.unfinished and request.unfinished.of_batches([len(part) for part in parts])
        return cls(row, parsed, scorer, account, batches, left, each, halving, order, chosen)

    def results(self) -> Iterator[tuple[Batch, Result]]:
        """What the estimator says of each batch; of one by one, what an interrupted scoring said already.

        Of a shard, its share.
        """
        row, unfinished = self.row, self.unfinished
        if row.by == "all":
            every = list(self.batches)
            every[0].unfinished = unfinished.of(0) if unfinished else None
            yield from zip(every, in_one_go(lambda: row.load()[0](every, self.params), row.name), strict=True)
            return
        shard = unfinished.shard if unfinished else None
        for number, on in enumerate(self.batches):
            on.unfinished = unfinished.of(number) if unfinished else None
            shared = shard is not None and row.each and on.parts_of_patch
            if shard and not shared and not shard.has(number):
                continue
            result = on.unfinished.result(on.setup) if on.unfinished else None
            if result is None:
                started = time.perf_counter()
                result = self.halving(on)
                halved = (self.halving.most or len(on)) < len(on)  # then it is the whole batch, whatever the shard
                if on.unfinished and (halved or not shared):
                    on.unfinished.keep_result(on.setup, result, time.perf_counter() - started)
            yield on, result


def summed(
    parts: Sequence[tuple[tuple[str, ...], Sequence[Float[Tensor, "batch slot unit"]]]],
) -> tuple[Sequence[Tensor], tuple[str, ...]]:
    """Blocks of one batch and their labels: the sum over its parts (labels, blocks), at the positions of any of them."""
    if len(parts) == 1:
        return parts[0][1], parts[0][0]
    labels = tuple(dict.fromkeys(label for own, _ in parts for label in own))
    out = [block.new_zeros(len(block), len(labels), *block.shape[2:]) for block in parts[0][1]]
    for own, blocks in parts:
        index = torch.tensor([labels.index(label) for label in own])
        for total, block in zip(out, blocks, strict=True):
            total.index_add_(1, index.to(total.device), block)
    return out, labels


def resolve_method(
    method: str, params: dict[str, Any], space: str, model: Model | None = None
) -> tuple[Method, Params]:
    """A method's row and its validated parameters. `relp+ah` adds rules to the preset (or to `rules=`).

    model: None to check only: a preset stays None.
    Raises: RelpError for unknown names, parameters and rules, and for a space that the method does not serve.
    """
    name, *extra = method.split("+")
    row = METHODS[name]
    if space not in row.serves:
        raise RelpError(
            f"method '{name}' does not score {space}; methods for {space}: {', '.join(methods_for(space))} "
            f"('{name}' scores {', '.join(row.serves)})"
        )
    _, schema = row.load()
    params = {k: tuple(v.split(",")) if k == "rules" and isinstance(v, str) else v for k, v in params.items()}
    known = row.parameters()
    for key in params:
        if key not in known:
            raise RelpError(f"method '{name}' has no parameter '{key}'{nearest(key, known) if known else ''}")
    if extra and not row.rules:
        raise RelpError(f"method '{name}' takes no rules, got '{method}'; only relp variants take '+rule'")
    if extra == ["auto"] and params.get("rules") is not None:
        raise RelpError(f"rules 'auto' stand alone: give '{method}', or rules by name, not both")
    sets = [e for e in extra if e in RULE_SETS]
    lost = [r for r in params.get("rules") or () if sets and r.partition("=")[0] in RULES and _row(r).site != "linear"]
    if lost:
        raise RelpError(f"'{sets[0]}' stands in place of rule '{lost[0]}': give '{method}', or rules by name, not both")
    params = {**row.defaults, **{k: v for k, v in params.items() if v is not None}, **row.fixed}
    if row.rules and (model or extra):
        preset = model.family.rules if model else ()
        params["rules"] = with_extra_rules(model, tuple(params.get("rules", preset)), extra)
    for rule_set in (RULE_SETS[name] for name in sets):
        own = {"endpoints": rule_set.endpoints, "blend": rule_set.blend}
        params = {k: v for k, v in own.items() if k in known} | params
    try:
        parsed = schema(**params)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise RelpError(f"method '{name}', parameter '{where}': {first['msg']} (got {first['input']!r})") from error
    _check_rules(name, getattr(parsed, "rules", None), space)
    return row, parsed


def shared_params(methods: Sequence[str], params: Mapping[str, Any], space: SpaceRow) -> dict[str, dict[str, Any]]:
    """Method → those of `params` that it, or the space, has. Raises RelpError for a parameter that no method has."""
    known = {m: {*row_of(m).parameters(), *space.options} for m in methods}
    for key in params:
        every = sorted(set().union(*known.values()))
        if key not in every:
            raise RelpError(f"none of the methods {', '.join(methods)} has a parameter '{key}'{nearest(key, every)}")
    return {m: {k: v for k, v in params.items() if k in known[m]} for m in methods}


def _check_rules(name: str, rules: tuple[str, ...] | None, space: str) -> None:
    """Raises RelpError for rules that do not exist, and for `auto` where it cannot be."""
    if rules != ("auto",):
        parse_rules(list(rules or ()))
    elif space != "nodes":
        raise RelpError(f"rules are chosen automatically for node kinds, not for {space}; give --rules by name")
    elif name != "relp":
        raise RelpError(f"rules 'auto' are chosen for method relp only, got '{name}'")


def check_baseline(row: Method, space: SpaceRow, request: Request) -> None:
    """Raises RelpError for a metric, direction or baseline that does not exist, or not for this space or method."""
    request.check("" if space.name == "nodes" else f" for {space.name}", space.baselines)
    if row.baselines is not None and request.baseline not in row.baselines:
        raise RelpError(
            f"method '{row.name}' goes between the two prompts of a pair, the original and the patch prompt; "
            f"it has no baseline '{request.baseline}'"
        )


def check_metric(row: Method, request: Request, parts: Sequence[PairBatch]) -> None:
    """Raises RelpError for answers of several tokens, with a metric that does not read them, or a method whose scores of the
    answer's run and the foil's do not add up.
    """
    if all(part.pair is None for part in parts):
        return
    if not metric_of(request.metric).several:
        raise RelpError(SEVERAL)
    if row.by != "points" and not row.additive:
        able = ", ".join(name for name, r in METHODS.items() if (r.by == "points" or r.additive) and not r.alias_of)
        raise RelpError(
            f"method '{row.name}': answers of several tokens are read in two runs, whose scores do not add up for it; use {able}"
        )


def with_extra_rules(model: Model | None, rules: tuple[str, ...], extra: list[str]) -> tuple[str, ...]:
    """`relp+ah`: a rule added to a set, in place of those that act on the same kind of layer; `relp+secant`: a rule set in place
    of all others but those on linear layers. model: whose gates and caps the set has rules for (None: as if it had them).
    """
    if "auto" in extra:
        if extra != ["auto"]:
            raise RelpError(f"rules 'auto' stand alone, got +{'+'.join(extra)}")
        return ("auto",)
    for name in extra:
        if name in RULE_SETS:
            added = tuple(r for r in RULE_SETS[name].rules if model is None or _fits(RULES[r].site, model))
            rules = (*(r for r in rules if _row(r).site == "linear"), *added)
        elif name.partition("=")[0] not in RULES:
            raise unknown("rule", name, [*RULES, *RULE_SETS])
        else:
            rules = (*(r for r in rules if not _row(r).sites & _row(name).sites), name)
    return rules


def _row(rule: str) -> Rule:
    return RULES[rule.partition("=")[0]]


def _fits(site: str, model: Model) -> bool:
    shape = model.shape
    return {"gate": shape.gated, "softcap": bool(shape.attn_softcap or shape.final_softcap)}.get(site, True)


def position_axis(pairs: Sequence[PairBatch]) -> tuple[str, tuple[str, ...]]:
    """The position axis that all batches share: raw positions where they all have the same roles, else roles.

    Raises: RelpError for no pairs, and for different token lengths without roles.
    """
    if not pairs:
        raise RelpError("no prompt pairs to score")
    if len({(b.n_pos, b.roles) for b in pairs}) == 1:
        labels = pairs[0].labels
        return ("position", labels) if len(set(labels)) == len(labels) else ("role", tuple(dict.fromkeys(labels)))
    if any(b.roles is None for b in pairs):
        lengths = sorted({b.n_pos for b in pairs})
        raise RelpError(
            f"pairs of several token lengths ({', '.join(map(str, lengths))}) share no position axis; "
            "give every position a role, or score one length at a time"
        )
    return "role", merge_labels([b.roles for b in pairs if b.roles])


def merge_labels(sequences: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """One order of all roles in which each new role stands behind the role it follows in its own sequence."""
    merged: list[str] = []
    for sequence in sorted({tuple(s) for s in sequences}, key=lambda s: (-len(s), s)):
        after = -1
        for label in sequence:
            if label in merged:
                after = merged.index(label)
            else:
                after += 1
                merged.insert(after, label)
    return tuple(merged)
