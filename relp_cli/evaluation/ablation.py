"""Ablation values of nodes: what one outside the circuit is replaced by. Computed once, used by every circuit of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError
from relp_cli.evaluation.ablation_table import MEAN_OF
from relp_cli.files import lines_of
from relp_cli.methods.means import MeanActivations, mean_activations
from relp_cli.models.model import Model
from relp_cli.nodes.access import Activations, activations
from relp_cli.nodes.kinds import NodeKind
from relp_cli.tasks.pairs import PairBatch


@dataclass(frozen=True)
class Ablation:
    """How nodes are ablated: `means` for the two mean ablations, `seed` for resampling."""

    name: str
    kinds: tuple[NodeKind, ...]
    means: MeanActivations | None = None
    seed: int = 0

    @classmethod
    def prepare(
        cls,
        model: Model,
        pairs: Sequence[PairBatch],
        name: str,
        kinds: Sequence[NodeKind],
        seed: int = 0,
        corpus: Path | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Ablation:
        """Compute what does not depend on a circuit: means over `pairs`, or over the lines of a `corpus` file.

        Raises: RelpError for what resampling, or a corpus, cannot do.
        """
        if name == "resample" and any(len(b) < 2 for b in pairs):
            raise RelpError("ablation 'resample' needs at least two pairs of every token length")
        means = None
        if corpus is not None:
            means = mean_activations(model, read_corpus(model, corpus), kinds)
        if name in MEAN_OF:
            means = mean_activations(model, pairs, kinds, batch_size, MEAN_OF[name])
        return cls(name, tuple(kinds), means, seed)

    def values(
        self, model: Model, batch: PairBatch, donors: PairBatch, number: int = 0, start: int = 0
    ) -> Activations | None:
        """Values for one batch: kind → layer → Float[pos, width] or Float[batch, pos, width]; None for zero.

        donors: all pairs of this batch's length, of which it is the rows from `start`; number: which length (seeds the draw).
        """
        if self.name == "zero":
            return None
        if self.means is not None and self.name == "corpus":
            return {kind: [v.expand(batch.n_pos, -1) for v in layers] for kind, layers in self.means.values.items()}
        if self.means is not None:
            return self.means.at(batch)  # type: ignore[return-value]
        tokens = batch.patch
        if self.name == "resample":
            assert donors.patch is not None
            drawn = _others(donors, self.seed + 1000 * number)[start : start + len(batch)]
            tokens = donors.patch[drawn].to(model.device)
        assert tokens is not None
        return activations(model, tokens, self.kinds)


def read_corpus(model: Model, path: Path) -> list[PairBatch]:
    """The lines of a UTF-8 text file as prompts whose positions all share one label (so that means are over tokens).

    Raises: RelpError for a file that cannot be read or has no text, and for a model without a tokenizer.
    """
    if model.tokenizer is None:
        raise RelpError(f"model {model.name} has no tokenizer to read corpus {path} with")
    rows = [model.tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines_of(path, "corpus")]
    rows = [model.with_bos(ids) for ids in rows if ids]
    if not rows:
        raise RelpError(f"corpus {path} has no text")
    nothing = torch.full((1,), -1)
    return [PairBatch(torch.tensor([ids]), None, nothing, nothing, ("token",) * len(ids)) for ids in rows]


def _others(donors: PairBatch, seed: int) -> Tensor:
    """For each pair, the row of another one with a different patch prompt; drawn for all pairs of a length at once, so that
    the draw does not depend on how they are batched."""
    assert donors.patch is not None
    different = (donors.patch[None] != donors.patch[:, None]).any(-1).float().cpu()  # [pair, donor]
    if not different.any(-1).all():
        raise RelpError("ablation 'resample' needs at least two different patch prompts of every token length")
    return torch.multinomial(different, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
