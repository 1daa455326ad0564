"""Ablation values of nodes: what one outside the circuit is replaced by. Computed once, used by every circuit of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError
from relp_cli.evaluation.ablation_table import ABLATIONS, AblationRow
from relp_cli.files import lines_of
from relp_cli.methods.means import MeanActivations, mean_activations
from relp_cli.models.model import Model
from relp_cli.nodes.access import Activations, activations
from relp_cli.nodes.kinds import NodeKind
from relp_cli.tasks.pairs import PairBatch


@dataclass(frozen=True)
class Ablation:
    """How nodes are ablated: the row, and `means` where it is a mean ablation."""

    row: AblationRow
    kinds: tuple[NodeKind, ...]
    means: MeanActivations | None = None

    @classmethod
    def prepare(
        cls,
        model: Model,
        pairs: Sequence[PairBatch],
        name: str,
        kinds: Sequence[NodeKind],
        corpus: Path | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Ablation:
        """Compute what does not depend on a circuit: means over `pairs`, or over the lines of a `corpus` file.

        Raises: RelpError for what a corpus cannot do.
        """
        row, means = ABLATIONS[name], None
        if row.means:
            over = list(pairs) if corpus is None else read_corpus(model, corpus)
            if row.everywhere:
                over = [replace(batch, roles=("token",) * batch.n_pos) for batch in over]
            means = mean_activations(model, over, kinds, batch_size, row.means)
        return cls(row, tuple(kinds), means)

    def values(self, model: Model, batch: PairBatch, tokens: Tensor | None) -> Activations | None:
        """Values for one batch: kind → layer → Float[pos, width] or Float[batch, pos, width]; None for zero.

        tokens: what runs to give them (`AblationRow.tokens`).
        """
        if self.means is not None and self.row.everywhere:
            return {kind: [v.expand(batch.n_pos, -1) for v in layers] for kind, layers in self.means.values.items()}
        if self.means is not None:
            return self.means.at(batch)  # type: ignore[return-value]
        return None if tokens is None else activations(model, tokens, self.kinds)


def read_corpus(model: Model, path: Path) -> list[PairBatch]:
    """The lines of a UTF-8 text file as prompts.

    Raises: RelpError for a file that cannot be read or has no text, and for a model without a tokenizer.
    """
    if model.tokenizer is None:
        raise RelpError(f"model {model.name} has no tokenizer to read corpus {path} with")
    rows = [model.tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines_of(path, "corpus")]
    rows = [model.with_bos(ids) for ids in rows if ids]
    if not rows:
        raise RelpError(f"corpus {path} has no text")
    nothing = torch.full((1,), -1)
    return [PairBatch(torch.tensor([ids]), None, nothing, nothing) for ids in rows]
