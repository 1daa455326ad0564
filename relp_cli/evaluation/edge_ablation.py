"""What an excluded edge carries: the ablated value of its writer, at every position of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.edges.stream import Written, mean_written, written
from relp_cli.evaluation.ablation_table import ABLATIONS, AblationRow
from relp_cli.methods.means import prompts
from relp_cli.methods.score import position_axis
from relp_cli.models.model import Model
from relp_cli.spaces.units import ANY_POSITION
from relp_cli.tasks.pairs import PairBatch, in_batches


@dataclass(frozen=True)
class EdgeAblation:
    """means: Float[label, width] per writer for the mean ablations, with the labels of their rows."""

    row: AblationRow
    means: Written | None = None
    labels: tuple[str, ...] = ()

    @classmethod
    def prepare(cls, model: Model, pairs: Sequence[PairBatch], name: str, batch_size: int = BATCH_SIZE) -> EdgeAblation:
        """Compute what does not depend on a circuit."""
        row = ABLATIONS[name]
        if not row.means:
            return cls(row)
        labels = ANY_POSITION if row.everywhere else position_axis(pairs)[1]
        runs = (
            (written(model, tokens)[0], _rows(chunk, labels))
            for chunk in in_batches(pairs, batch_size, model.device)
            for tokens in prompts(chunk, row.means)
        )
        return cls(row, mean_written(runs, len(labels)), labels)

    def values(self, model: Model, batch: PairBatch, tokens: Tensor | None) -> Written:
        """Ablated values for one batch: fields Float[batch | 1, pos, width]; tokens: what runs to give them."""
        if self.means is not None:
            index = _rows(batch, self.labels)
            return self.means.map(lambda t: t[index][None])
        if tokens is None:
            return written(model, batch.original[:1])[0].map(torch.zeros_like)
        return written(model, tokens)[0]


def _rows(batch: PairBatch, labels: tuple[str, ...]) -> Int[Tensor, " pos"]:
    """Position → the row of its mean."""
    rows = torch.zeros(batch.n_pos, dtype=torch.long) if labels == ANY_POSITION else batch.index(labels)
    return rows.to(batch.original.device)
