"""`score_nodes`: run one method over batches of pairs and aggregate over examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from relp_cli.errors import RelpError, nearest
from relp_cli.methods.relp import with_extra_rules
from relp_cli.methods.request import Account, Request
from relp_cli.methods.scores import NodeScores, Scores
from relp_cli.methods.setup import Means
from relp_cli.methods.table import METHODS, Method, Params, Result
from relp_cli.models.model import Model
from relp_cli.nodes.access import activations, units
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind
from relp_cli.tasks.pairs import PairBatch

COMPONENTS = ("resid_pre", "attn_out", "mlp_out")
KEEP_LIMIT = 1 << 26  # per-example scores are kept up to this many numbers a kind, unless asked for


def score_nodes(
    model: Model, pairs: Sequence[PairBatch], method: str, nodes: Sequence[str], request: Request, **params: Any
) -> Scores:
    """`relp.score` for the kinds of `NODE_KINDS` and one fixed set of rules; see there for arguments and errors."""
    row, parsed = resolve_method(model, method, params)
    if row.scope == "edges":
        raise RelpError(f"method '{row.name}' scores edges; ask for nodes=edges")
    kinds = tuple(NODE_KINDS[name] for name in nodes)
    if not kinds or len(set(nodes)) != len(nodes):
        raise RelpError(f"expected node kinds, each once, got {list(nodes)}; known: {', '.join(NODE_KINDS)}")
    axis, labels = position_axis(pairs)
    request.check()
    function, _ = row.load()
    chunks = request.chunks(model, pairs)
    account = Account(request, model, chunks, method)
    means = None
    if request.baseline == "mean":
        with_inputs = dict.fromkeys((*kinds, NODE_KINDS["resid_pre"]))  # integrated gradients need the mean embeddings
        means = mean_activations(model, pairs, tuple(with_inputs), request.batch_size)
        account.passes.forward += len(chunks)
    sums = {k.name: Running(model, k, labels, account.n_pairs, request.keep_examples) for k in kinds}
    result = Result({})
    for chunk in chunks:
        setup = request.setup(model, chunk, kinds, account.passes, None if means is None else means.at(chunk))
        result = function(setup, parsed)
        for kind in kinds:
            sums[kind.name].add(result.scores[kind.name], setup.labels)
        account.done(setup)
    meta = account.meta(row, parsed, result.applied, axis, **result.meta)
    return Scores({k.name: sums[k.name].finish(axis, meta) for k in kinds}, meta)


def resolve_method(model: Model, method: str, params: dict[str, Any]) -> tuple[Method, Params]:
    """A method's row and its validated parameters. `relp+ah` adds rules to the preset (or to `rules=`)."""
    name, *extra = method.split("+")
    row = METHODS[name]
    _, schema = row.load()
    if params.get("rules") is not None and isinstance(params["rules"], str):
        params = {**params, "rules": tuple(params["rules"].split(","))}
    known = list(schema.model_fields)
    for key in params:
        if key not in known:
            raise RelpError(f"method '{name}' has no parameter '{key}'{nearest(key, known) if known else ''}")
    if extra and not row.rules:
        raise RelpError(f"method '{name}' takes no rules, got '{method}'; only relp variants take '+rule'")
    params = {k: v for k, v in params.items() if v is not None}
    if row.rules:
        base = tuple(params.get("rules") or model.family.rules) if "rules" not in params else tuple(params["rules"])
        params = {**params, "rules": with_extra_rules(model, base, extra)}
    try:
        return row, schema(**params)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise RelpError(f"method '{name}', parameter '{where}': {first['msg']} (got {first['input']!r})") from error


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


@dataclass(frozen=True)
class MeanActivations:
    """Mean activation of every kind per label, over all given prompts: Float[label, width] per layer."""

    labels: tuple[str, ...]
    values: dict[str, list[Tensor]]

    def at(self, batch: PairBatch) -> Means:
        """The means at a batch's positions: Float[pos, width] per layer."""
        index = torch.tensor([self.labels.index(r) for r in batch.labels])
        return {kind: [v[index.to(v.device)] for v in layers] for kind, layers in self.values.items()}


def mean_activations(
    model: Model, pairs: Sequence[PairBatch], kinds: Sequence[NodeKind], batch_size: int = 32, prompt: str = "original"
) -> MeanActivations:
    """Mean over prompts (`prompt`: "original", "patch" or "both") per position label, accumulated in float64."""
    _, labels = position_axis(pairs)
    sums: dict[str, list[Tensor]] = {}
    counts = torch.zeros(len(labels), dtype=torch.float64, device=model.device)
    for batch in pairs:
        index = torch.tensor([labels.index(r) for r in batch.labels], device=model.device)
        for chunk in (c.to(model.device) for c in batch.split(batch_size)):
            for tokens in [chunk.original, chunk.patch] if prompt == "both" else [getattr(chunk, prompt)]:
                if tokens is None:
                    raise RelpError("these prompts have no patch prompt to take means over")
                counts.index_add_(
                    0, index, torch.full((len(index),), float(len(tokens)), dtype=torch.float64, device=model.device)
                )
                for name, layers in activations(model, tokens, kinds).items():
                    totals = sums.setdefault(
                        name, [v.new_zeros(len(labels), v.shape[-1], dtype=torch.float64) for v in layers]
                    )
                    for total, value in zip(totals, layers, strict=True):
                        total.index_add_(0, index, value.double().sum(0))
    means = {name: [(t / counts[:, None]).to(model.dtype) for t in layers] for name, layers in sums.items()}
    return MeanActivations(labels, means)


class Running:
    """Sums over examples in float64 of one kind's scores, aligned on the common labels."""

    def __init__(self, model: Model, kind: NodeKind, labels: tuple[str, ...], total: int, keep: bool | None) -> None:
        shape = [model.shape.n_layers, len(labels), *([] if kind.split == "vector" else [units(model, kind)])]
        self.kind, self.labels = kind, labels
        self.sum = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)
        self.n = torch.zeros(len(labels), dtype=torch.long)
        size = total * self.sum.numel()
        keep = size <= KEEP_LIMIT if keep is None else keep
        self.examples = torch.zeros(total, *shape) if keep else None
        self.present = torch.zeros(total, len(labels), dtype=torch.bool) if keep else None
        self.row = 0

    def add(self, scores: Tensor, labels: Sequence[str]) -> None:
        """Add Float[batch, layer, slot, *unit] whose slots carry `labels`."""
        if not torch.isfinite(scores).all():
            raise RelpError(f"{self.kind.name} scores are not finite (dtype too narrow?)")
        index = torch.tensor([self.labels.index(label) for label in labels])
        values = scores.detach().double().cpu()
        self.sum.index_add_(1, index, values.sum(0))
        self.squares.index_add_(1, index, values.square().sum(0))
        self.n.index_add_(0, index, torch.full((len(index),), len(values)))
        if self.examples is not None and self.present is not None:
            rows = slice(self.row, self.row + len(values))
            self.examples[rows] = torch.zeros_like(self.examples[rows]).index_copy(2, index, values.float())
            self.present[rows] = torch.zeros_like(self.present[rows]).index_fill(1, index, True)
        self.row += len(values)

    def finish(self, axis: str, meta: dict[str, Any]) -> NodeScores:
        n = self.n.view(1, -1, *([1] * (self.sum.ndim - 2))).double()
        mean = self.sum / n
        variance = (self.squares - n * mean.square()).clamp(min=0) / (n - 1)
        return NodeScores(self.kind.name, mean, variance, self.n, self.labels, axis, self.examples, self.present, meta)
