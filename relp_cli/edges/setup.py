"""One batch of pairs made ready for edge scores, and what every edge method returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from relp_cli.edges.graph import Graph
from relp_cli.edges.stream import Recorder, Written
from relp_cli.errors import RelpError
from relp_cli.lrp.context import Recorded, recording
from relp_cli.lrp.rules import parse_rules
from relp_cli.methods.request import Progress
from relp_cli.methods.setup import Setup
from relp_cli.models.model import Model


@dataclass(frozen=True)
class EdgeSetup:
    """`base` says which prompt runs and which is the source (no node kinds); positions: one score per edge and position.

    means: for baseline "mean", what writers write on average per label, at this batch's positions: Float[pos, width].
    """

    base: Setup
    graph: Graph
    positions: bool = False
    means: Written | None = None

    @property
    def model(self) -> Model:
        return self.base.model

    def __len__(self) -> int:
        return len(self.base.batch)

    def source(self, rules: Sequence[str] = ()) -> tuple[Written, Recorded | None]:
        """u(source) for every writer, and what two-point rules need of that pass. 1 forward pass (none for a mean).

        Raises: RelpError for two-point rules where no patch prompt is run.
        """
        base = self.base
        if any(a.rule.two_point for a in parse_rules(list(rules))) and base.baseline != "patch":
            raise RelpError(f"two-point rules need a patch prompt, not baseline '{base.baseline}'")
        if self.means is not None:
            return self.means.map(lambda t: t.expand(len(self), -1, -1)), None
        if base.baseline == "zero":
            return self.run().map(torch.zeros_like), None
        recorder = Recorder(self.model)
        with torch.no_grad(), recording(self.model, rules) as other, self.model.hooks(recorder.hooks()):
            logits = self.model.logits(base.source)
        base.seen["source"] = base.value(logits)
        base.passes.forward += 1
        return recorder.written(), other or None

    def run(self) -> Written:
        """u(run) for every writer: 1 forward pass."""
        recorder = Recorder(self.model)
        with torch.no_grad(), self.model.hooks(recorder.hooks()):
            logits = self.model.logits(self.base.run)
        self.base.seen["run"] = self.base.value(logits)
        self.base.passes.forward += 1
        return recorder.written()

    def to_slots(self, scores: Tensor) -> Tensor:
        """Sum positions that share a label: Float[batch, pos, writer, reader] → Float[batch, slot, writer, reader]."""
        return self.base.to_slots(scores[:, None])[:, 0] if self.positions else scores


@dataclass(frozen=True)
class EdgeResult:
    """Scores of one batch: Float[batch, writer, reader], or Float[batch, slot, writer, reader] with positions.

    applied: LRP rules → number of layers; meta: anything else that the method has to say.
    """

    scores: Tensor
    applied: dict[str, int] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


EdgeMethod = Callable[[Sequence[EdgeSetup], Any, "Progress | None"], Iterator[EdgeResult]]
