"""Rankings that are learned: gradient descent on the loss of masked runs, the same for every way of making masks (`learned.py`).

1. The cells (units at position labels) that the source changes get a parameter each; the others are never kept and score 0.
2. A step draws a batch, with probability in proportion to its pairs, and a mask from the parameters; L is that of the run
   whose units are kept as far as the mask says and come from the source otherwise (denoising: the other way round).
3. Adam goes down −mean L + what the mask itself costs.
Parameters and masks are float64 on the CPU. All draws come from one generator; its state, the parameters' and Adam's are
kept in a file now and then, so that an interrupted run goes on where it stopped, to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from scipy.stats import rankdata
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.methods.core import refuse_metric
from relp_cli.methods.score import merge_labels
from relp_cli.methods.space import Batch
from relp_cli.methods.table import Params, Result
from relp_cli.spaces.scores import Scores, support_sign
from relp_cli.spaces.table import space_of


class LearningParams(Params):
    """steps: of Adam (None: 500, for edges 5000); lr: its step size. seed: of all draws. start: a run directory or score
    file whose ranking, from support to opposition, the parameters start from: its ranks spread evenly over −1 … 1.
    tied: one parameter per unit for all its positions, as circuits without positions have it (MIB's).
    """

    steps: int | None = Field(default=None, ge=1)
    lr: float = Field(default=0.05, gt=0)
    seed: int = Field(default=0, ge=0)
    start: str | None = None
    tied: bool = False


class Learner(Protocol):
    """Parameters, and the masks that they make. groups: of Adam. cells: Float[cell], the parameters that rank the cells."""

    groups: list[dict[str, Any]]
    cells: Float[Tensor, " cell"]

    def draw(self, step: int, generator: torch.Generator) -> tuple[Float[Tensor, " cell"], Tensor]:
        """A mask in [0, 1], and what it costs besides −L."""

    def about(self) -> dict[str, Any]:
        """What scores should say of the parameters."""


def learn(
    batches: Sequence[Batch], params: LearningParams, make: Callable[[Float[Tensor, " cell"], int], Learner]
) -> list[Result]:
    """Scores: the parameters, counted from the lowest, which has 1. make: (start, steps) → learner.

    Cost: 2 forward passes, and a forward and a backward pass of one batch for each step. Raises: RelpError for metrics without
    gradient, where the source changes no unit, and for a start that is not of these units.
    """
    for on in batches:
        refuse_metric(on.setup, at_run=False)
    cells = _Cells.of(batches, params.tied)
    steps = params.steps or batches[0].learning_steps
    learner = make(_start(params.start, batches[0], cells), steps)
    generator = torch.Generator().manual_seed(params.seed)
    metric = torch.zeros(steps, dtype=torch.float64)
    state = _State(batches[0], torch.optim.Adam(learner.groups, lr=params.lr), generator, metric)
    sizes = torch.tensor([len(on) for on in batches], dtype=torch.float64)
    for step in range(state.restore(), steps):
        at = int(torch.multinomial(sizes, 1, generator=generator))
        mask, cost = learner.draw(step, generator)
        value = _value(batches[at], cells.rows(mask, at))
        state.optimizer.zero_grad()
        (cost - value).backward()
        state.optimizer.step()
        metric[step] = value.detach()
        batches[0].tick((step + 1) * len(batches), steps, "learning steps")
        state.keep(step + 1)
    found = learner.cells.detach()
    found = found - found.min() + 1
    tenth = -(-steps // 10)
    about = {
        "cells": len(found), "of": cells.alive.numel(), "steps": steps, **learner.about(),
        "metric_first_tenth": metric[:tenth].mean().item(), "metric_last_tenth": metric[-tenth:].mean().item(),
    }  # fmt: skip
    return [
        Result(on.of_units(cells.rows(found, at)), meta={**on.meta, "learned": about}) for at, on in enumerate(batches)
    ]


def _value(on: Batch, mask: Tensor) -> Tensor:
    """Mean L of the pairs: what is in the circuit has the original's values, whichever prompt is run."""
    keep = mask if on.setup.direction == "noising" else 1 - mask
    with torch.enable_grad():
        value = on.masked(keep).mean()
    on.setup.passes.backward += 1
    return value.double().cpu()


@dataclass(frozen=True)
class _Cells:
    """alive: Bool[row, unit], what has a parameter, in row-major order; rows are labels, or (tied) one for all of them. slots: of
    each batch, which rows its labels have.
    """

    labels: tuple[str, ...]
    alive: Bool[Tensor, "row unit"]
    slots: list[Int[Tensor, " slot"]]

    @classmethod
    def of(cls, batches: Sequence[Batch], tied: bool) -> _Cells:
        labels = merge_labels([on.labels for on in batches])
        slots = [torch.tensor([0 if tied else labels.index(label) for label in on.labels]) for on in batches]
        alive = torch.zeros(1 if tied else len(labels), len(batches[0].units), dtype=torch.bool)
        for on, index in zip(batches, slots, strict=True):
            for row, changed in zip(index, on.changed().cpu(), strict=True):
                alive[row] |= changed
        if not alive.any():
            raise RelpError("the source changes none of these units: there is nothing to learn a ranking of")
        return cls(labels, alive, slots)

    def rows(self, values: Float[Tensor, " cell"], at: int) -> Float[Tensor, "slot unit"]:
        """The values as batch `at` has them, 0 where there is no parameter."""
        table = values.new_zeros(self.alive.shape).masked_scatter(self.alive, values)
        return table[self.slots[at]]


def _start(path: str | None, on: Batch, cells: _Cells) -> Float[Tensor, " cell"]:
    """What the parameters start from: zeros, or the ranks of other scores, the most supporting highest."""
    count = int(cells.alive.sum())
    if path is None:
        return torch.zeros(count, dtype=torch.float64)
    file = Path(path) / "scores.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise RelpError(f"start: expected a run directory or a score file, got '{path}'")
    scores = Scores.load(file).only(space_of(on.units).keys(on.units))
    missing = [label for label in cells.labels if label not in scores.labels]
    if scores.units != on.units or missing:
        what = f"position '{missing[0]}'" if missing else "the same units"
        raise RelpError(f"start '{path}': these scores do not have {what}; score the same task, model and nodes for it")
    support = support_sign(scores.meta) * scores.dense(scores.mean)
    rows = support[[scores.labels.index(label) for label in cells.labels]]
    values = (rows if len(cells.alive) == len(rows) else rows.sum(0, keepdim=True))[cells.alive]
    return torch.from_numpy(2 * (rankdata(values.numpy()) - 0.5) / count - 1)


class _State:
    """What a step depends on, and where it is kept (None: nowhere)."""

    def __init__(
        self,
        on: Batch,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        metric: Tensor,
    ) -> None:
        self.kept, self.passes = on.unfinished, on.setup.passes
        self.optimizer, self.generator, self.metric = optimizer, generator, metric

    def keep(self, done: int) -> None:
        """The state after `done` steps."""
        if self.kept:
            self.kept.keep(done, self.passes, self._tensors)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"generator": self.generator.get_state(), "metric": self.metric}
        for i, parameter in enumerate(self._parameters()):
            tensors[f"{i}/value"] = parameter.detach()
            tensors |= {f"{i}/{name}": value for name, value in self.optimizer.state[parameter].items()}
        return tensors

    def restore(self) -> int:
        """How many steps are done already."""
        done, tensors = self.kept.so_far(self.passes) if self.kept else (0, {})
        if not done:
            return 0
        self.generator.set_state(tensors["generator"])
        self.metric.copy_(tensors["metric"])
        for i, parameter in enumerate(self._parameters()):
            parts = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{i}/")}
            parameter.data.copy_(parts.pop("value"))
            self.optimizer.state[parameter] = parts
        return done

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]
