"""Running a model with edges ablated: a cut edge carries its writer's ablated value minus what the writer writes in that
very run (`edges.run`). `n_nodes` counts edges; edges into readers of excluded layers are never cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from relp_cli.edges.check import check_once
from relp_cli.edges.run import edge_logits
from relp_cli.edges.stream import Written
from relp_cli.evaluation.edge_ablation import EdgeAblation
from relp_cli.evaluation.evaluate import Ablating
from relp_cli.models.model import Model
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.graph import Graph
from relp_cli.tasks.pairs import PairBatch


class EdgeAblator:
    """`evaluation.evaluate.Ablator` of edges."""

    def __init__(self, model: Model, pairs: Sequence[PairBatch], circuits: Sequence[Circuit], how: Ablating) -> None:
        self.model, self.graph, self.units = model, Graph.of(model.shape), circuits[0].units
        self.counted = self.units.counted(how.exclude)
        self.chunks = how.batches(pairs, model.device)
        check_once(model, pairs[0])
        self.ablation = EdgeAblation.prepare(model, pairs, how.ablation, how.batch_size)

    def batches(self) -> Iterator[tuple[PairBatch, Written]]:
        for batch, tokens in self.chunks:
            yield batch, self.ablation.values(self.model, batch, tokens)

    def logits(self, batch: PairBatch, keep: Tensor | None, ablated: Written) -> Tensor:
        cut = self.counted[None] if keep is None else ~keep & self.counted
        if len(cut) > 1 and (cut == cut[0]).all():  # the same at every position: one mask serves them all
            cut = cut[:1]
        return edge_logits(
            self.model.reading(batch.read),
            self.graph,
            batch.original,
            self.graph.dense(cut).to(self.model.device),
            ablated,
        )

    def drawable(self, circuit: Circuit) -> None:
        return None
