"""What an excluded edge carries: the ablated value of its writer, at every position of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.edges.stream import Written, mean_written, written
from relp_cli.evaluation.ablation_table import MEAN_OF
from relp_cli.methods.means import prompts
from relp_cli.methods.score import position_axis
from relp_cli.models.model import Model
from relp_cli.spaces.units import ANY_POSITION
from relp_cli.tasks.pairs import PairBatch, in_batches


@dataclass(frozen=True)
class EdgeAblation:
    """means: Float[label, width] per writer for the mean ablations, with the labels of their rows."""

    name: str
    means: Written | None = None
    labels: tuple[str, ...] = ()

    @classmethod
    def prepare(cls, model: Model, pairs: Sequence[PairBatch], name: str, batch_size: int = BATCH_SIZE) -> EdgeAblation:
        """Compute what does not depend on a circuit."""
        if name not in MEAN_OF:
            return cls(name)
        labels = ANY_POSITION if name == "mean_all" else position_axis(pairs)[1]
        runs = (
            (written(model, tokens)[0], _rows(chunk, labels))
            for chunk in in_batches(pairs, batch_size, model.device)
            for tokens in prompts(chunk, MEAN_OF[name])
        )
        return cls(name, mean_written(runs, len(labels)), labels)

    def values(self, model: Model, batch: PairBatch) -> Written:
        """Ablated values for one batch: fields Float[batch | 1, pos, width]."""
        if self.means is not None:
            index = _rows(batch, self.labels)
            return self.means.map(lambda t: t[index][None])
        if self.name == "zero":
            return written(model, batch.original[:1])[0].map(torch.zeros_like)
        assert batch.patch is not None  # checked in `prepare`
        return written(model, batch.patch)[0]


def _rows(batch: PairBatch, labels: tuple[str, ...]) -> Int[Tensor, " pos"]:
    """Position → the row of its mean."""
    rows = torch.zeros(batch.n_pos, dtype=torch.long) if labels == ANY_POSITION else batch.index(labels)
    return rows.to(batch.original.device)
