"""Running a model with nodes ablated: at each site the kept nodes of the running value, ablation values everywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from relp_cli.evaluation.ablation import Ablation
from relp_cli.evaluation.evaluate import Ablating
from relp_cli.models.model import Hook, Model
from relp_cli.nodes.access import Activations, split
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind
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
            return self.model.logits(batch.original)

    def drawable(self, circuit: Circuit) -> None:
        return None

    def hooks(self, keep: Tensor | None, ablated: Activations | None) -> list[tuple[str, Hook]]:
        """What makes the model run only the nodes in `keep`, Bool[pos, unit] at a batch's positions."""
        masks: Mapping[str, Tensor] = {}
        if keep is not None:
            masks = {kind.name: self.units.view(kind.name, keep).to(self.model.device) for kind in self.kinds}
        return [
            (kind.point(layer), self._keep(kind, masks.get(kind.name), layer, ablated))
            for kind in self.kinds
            for layer in range(self.how.exclude, self.model.shape.n_layers)
        ]

    def _keep(self, kind: NodeKind, mask: Tensor | None, layer: int, ablated: Activations | None) -> Hook:
        """mask: Bool[layer, pos, units]."""

        def hook(value: Tensor) -> Tensor:
            other = torch.zeros_like(value) if ablated is None else ablated[kind.name][layer].expand_as(value)
            if mask is None:
                return other.contiguous()  # GPT-2's linear layers view their input
            if kind.split == "unit":
                return torch.where(mask[layer], value, other)
            kept = mask[layer][..., None]
            pieces = torch.where(kept, split(self.model, kind, value), split(self.model, kind, other))
            return pieces.reshape(value.shape)

        return hook
