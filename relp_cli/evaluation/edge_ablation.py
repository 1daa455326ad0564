"""What an excluded edge carries: the ablated value of its writer, at every position of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relp_cli.edges.stream import Written, mean_written, written
from relp_cli.methods.score import position_axis
from relp_cli.models.model import Model
from relp_cli.tasks.pairs import PairBatch, in_batches


@dataclass(frozen=True)
class EdgeAblation:
    """means: Float[label, width] per writer for the mean ablations, with the labels of their rows."""

    name: str
    means: Written | None = None
    labels: tuple[str, ...] = ()

    @classmethod
    def prepare(cls, model: Model, pairs: Sequence[PairBatch], name: str, batch_size: int = 32) -> EdgeAblation:
        """Compute what does not depend on a circuit."""
        if not name.startswith("mean"):
            return cls(name)
        labels = ("*",) if name == "mean_all" else position_axis(pairs)[1]

        def runs() -> Iterator[tuple[Written, Tensor]]:
            for chunk in in_batches(pairs, batch_size, model.device):
                index = torch.tensor(
                    [0 if name == "mean_all" else labels.index(x) for x in chunk.labels], device=model.device
                )
                assert chunk.patch is not None
                for tokens in [chunk.patch, *([chunk.original] if name == "mean_task" else [])]:
                    yield written(model, tokens)[0], index

        return cls(name, mean_written(runs(), len(labels)), labels)

    def values(self, model: Model, batch: PairBatch) -> Written:
        """Ablated values for one batch: fields Float[batch | 1, pos, width]."""
        if self.means is not None:
            index = torch.tensor([0 if self.labels == ("*",) else self.labels.index(x) for x in batch.labels])
            return self.means.map(lambda t: t[index.to(t.device)][None])
        if self.name == "zero":
            return written(model, batch.original[:1])[0].map(torch.zeros_like)
        assert batch.patch is not None  # checked in `prepare`
        return written(model, batch.patch)[0]
