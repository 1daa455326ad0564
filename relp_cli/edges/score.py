"""`score_edges`: run one edge method over batches of pairs and aggregate over examples. Reached through `relp.score`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relp_cli.edges.check import check_once
from relp_cli.edges.graph import Graph
from relp_cli.edges.scores import EVERYWHERE, KIND, EdgeScores
from relp_cli.edges.setup import EdgeResult, EdgeSetup
from relp_cli.edges.stream import Written, mean_written, written
from relp_cli.errors import RelpError, unknown
from relp_cli.methods.request import Account, Request
from relp_cli.methods.score import KEEP_LIMIT, position_axis, resolve_method
from relp_cli.methods.scores import Scores
from relp_cli.models.model import Model
from relp_cli.tasks.pairs import PairBatch

POSITIONS = ("sum", "keep")


def score_edges(model: Model, pairs: Sequence[PairBatch], method: str, request: Request, **params: Any) -> Scores:
    """Score every edge of a model. Arguments as for `relp.score`; besides the method's own parameters:

    positions: "sum" (one score per edge) or "keep" (one per edge and position; the axis is that of node scores).

    Returns Scores with the one kind "edges". Raises: RelpError as `relp.score`.
    """
    positions = params.pop("positions", None) or "sum"
    if positions not in POSITIONS:
        raise unknown("positions", positions, POSITIONS)
    request.check()
    row, parsed = resolve_method(model, method, params)
    if row.scope != "edges":
        raise RelpError(f"method '{row.name}' scores nodes, not edges; methods for edges: {', '.join(edge_methods())}")
    if not pairs:
        raise RelpError("no prompt pairs to score")
    axis, labels = position_axis(pairs) if positions == "keep" else ("all", EVERYWHERE)
    graph = Graph.of(model.shape)
    chunks = request.chunks(model, pairs)
    account = Account(request, model, chunks, method)
    means = _means(model, chunks) if request.baseline == "mean" else None
    setups = [
        EdgeSetup(
            request.setup(model, chunk, (), account.passes, {} if means else None),
            graph, positions == "keep", means and _at(means, chunk),
        )
        for chunk in chunks
    ]  # fmt: skip
    check_once(model, chunks[0])
    function: Any = row.load()[0]
    total = Totals(graph, labels, account.n_pairs, request.keep_examples)
    result = EdgeResult(torch.empty(0))
    for setup, result in zip(setups, function(setups, parsed, request.progress), strict=True):
        total.add(result.scores, setup.base.labels if positions == "keep" else EVERYWHERE)
        account.done(setup.base)
    about = {"positions": positions, "n_edges": graph.n_edges, "d_model": model.shape.d_model}
    meta = account.meta(row, parsed, result.applied, axis, **about, **result.meta)
    kinds: dict[str, Any] = {KIND: total.finish(axis, meta)}
    return Scores(kinds, meta)


def edge_methods() -> list[str]:
    """Names of the methods that score edges."""
    from relp_cli.methods.table import METHODS

    return [name for name, row in METHODS.items() if row.scope == "edges"]


def _means(model: Model, chunks: Sequence[PairBatch]) -> tuple[Written, tuple[str, ...]]:
    """What every writer writes on average over all originals, per position label."""
    _, labels = position_axis(chunks)
    index = ((c, torch.tensor([labels.index(x) for x in c.labels], device=model.device)) for c in chunks)
    return mean_written(((written(model, c.original)[0], i) for c, i in index), len(labels)), labels


def _at(means: tuple[Written, tuple[str, ...]], batch: PairBatch) -> Written:
    index = torch.tensor([means[1].index(x) for x in batch.labels], device=means[0].input.device)
    return means[0].map(lambda t: t[index])


class Totals:
    """Sums over examples in float64, aligned on the common labels."""

    def __init__(self, graph: Graph, labels: tuple[str, ...], n: int, keep: bool | None) -> None:
        self.graph, self.labels, self.total = graph, labels, n
        shape = (len(labels), graph.n_edges)
        self.sum, self.squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self.n = torch.zeros(len(labels), dtype=torch.long)
        keep = n * self.sum.numel() <= KEEP_LIMIT if keep is None else keep
        self.examples = torch.zeros(n, *shape) if keep else None
        self.present = torch.zeros(n, len(labels), dtype=torch.bool) if keep else None
        self.row = 0

    def __len__(self) -> int:
        return self.total

    def add(self, scores: Tensor, labels: Sequence[str]) -> None:
        """Add Float[batch, writer, reader] or, with positions, Float[batch, slot, writer, reader]."""
        if not torch.isfinite(scores).all():
            raise RelpError("edge scores are not finite (dtype too narrow?)")
        index = torch.tensor([self.labels.index(label) for label in labels])
        values = scores.reshape(len(scores), len(labels), *self.graph.mask.shape).cpu()[..., self.graph.mask]
        for one in values:  # one at a time: with positions, a batch of scores is as large as the activations
            self.sum.index_add_(0, index, one.double())
            self.squares.index_add_(0, index, one.double().square())
        self.n.index_add_(0, index, torch.full((len(index),), len(values)))
        if self.examples is not None and self.present is not None:
            rows = slice(self.row, self.row + len(values))
            self.examples[rows] = torch.zeros_like(self.examples[rows]).index_copy(1, index, values.float())
            self.present[rows] = torch.zeros_like(self.present[rows]).index_fill(1, index, True)
        self.row += len(values)

    def finish(self, axis: str, meta: dict[str, Any]) -> EdgeScores:
        n = self.n[:, None].double()
        mean = self.sum / n
        variance = (self.squares - n * mean.square()).clamp(min=0) / (n - 1)

        def dense(values: Tensor) -> Tensor:
            out = values.new_zeros(len(self.labels), *self.graph.mask.shape)
            out[..., self.graph.mask] = values
            return out[0] if axis == "all" else out

        return EdgeScores(
            self.graph, dense(mean), dense(variance), self.n, self.labels, axis, self.examples, self.present, meta
        )
