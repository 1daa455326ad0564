"""Running a model with nodes ablated: at each site the kept nodes of the running value, ablation values everywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from relp_cli.evaluation.ablation import Ablation
from relp_cli.evaluation.evaluate import Ablating
from relp_cli.models.model import Hook, Model
from relp_cli.nodes.access import Activations
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.nodes.masked import keeping
from relp_cli.spaces.circuit import Circuit
from relp_cli.tasks.pairs import PairBatch


class NodeAblator:
    """`evaluation.evaluate.Ablator` of nodes."""

    def __init__(self, model: Model, pairs: Sequence[PairBatch], circuits: Sequence[Circuit], how: Ablating) -> None:
        self.model, self.how, self.units = model, how, circuits[0].units
        self.chunks = how.batches(pairs, model.device)
        self.kinds = tuple(NODE_KINDS[kind] for kind in self.units.kinds)
        self.ablation = Ablation.prepare(model, pairs, how.ablation, self.kinds, how.corpus, how.batch_size)

    def batches(self) -> Iterator[tuple[PairBatch, Activations | None]]:
        for batch, tokens in self.chunks:
            with torch.no_grad():
                ablated = self.ablation.values(self.model, batch, tokens)
            yield batch, ablated

    def logits(self, batch: PairBatch, keep: Tensor | None, ablated: Activations | None) -> Tensor:
        with self.model.hooks(self.hooks(keep, ablated)):
            return self.model.reading(batch.read).logits(batch.original)

    def drawable(self, circuit: Circuit) -> None:
        return None

    def hooks(self, keep: Tensor | None, ablated: Activations | None) -> list[tuple[str, Hook]]:
        """What makes the model run only the nodes in `keep`, Bool[pos, unit] at a batch's positions."""
        masks = None
        if keep is not None:
            masks = {kind.name: self.units.view(kind.name, keep).to(self.model.device) for kind in self.kinds}
        return keeping(self.model, self.kinds, masks, ablated, self.how.exclude)
