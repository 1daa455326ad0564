"""Spaces: sorts of units that estimators score. A space is one row of `spaces.table.SPACES`; its scorer says

1. what of a run its units need (`read`),
2. how differences of that and gradients at points make scores (`attribute`, `product`),
3. how its units are patched exactly (`patch`), and which unit each score is of (`Scorer.blocks`).
Estimators (`table.py`) know nothing else of a space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.lrp.context import Recorded, recording
from relp_cli.lrp.rules import parse_rules
from relp_cli.methods.request import Progress
from relp_cli.methods.room import Room, fitting
from relp_cli.methods.setup import Passes, Setup
from relp_cli.methods.share import Streams
from relp_cli.methods.table import Method, Params, Result
from relp_cli.methods.unfinished import UnfinishedBatch
from relp_cli.models.model import Hook, Model
from relp_cli.models.recompute import recomputing
from relp_cli.spaces.units import Units
from relp_cli.tasks.pairs import PairBatch

Part = Literal["whole", "tangent", "secant"]


@dataclass(frozen=True)
class Point:
    """Where gradients are taken: the run, with `moved` added at hook points.

    weight: its share of the average, one for all or Float[batch, pos]. moved: hook point → Float[batch, pos, width]; nothing:
    the run as it is. rules, other: what `lrp` is given. of: whose scores these gradients are for (`Place.of`); None: everything.
    part: of a blend by share (`share.py`), what a node has the share √t of, or 1 − √t; else the whole.
    """

    weight: float | Tensor = 1.0
    moved: Mapping[str, Tensor] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    other: Recorded | None = None
    of: Any = None
    part: Part = "whole"

    def weigh(self, gradient: Tensor) -> Tensor:
        """weight · gradient Float[batch, pos, width]."""
        return gradient * (self.weight[..., None].to(gradient) if isinstance(self.weight, Tensor) else self.weight)


@dataclass(frozen=True)
class Place:
    """A hook point whose value can move to the source's on its own, by `change`; of: the units that are scored there."""

    point: str
    change: Tensor
    of: Any


class Batch(ABC):
    """One batch of pairs as one space reads it: all that an estimator is given. Readings are made once.

    room: how many tokens one pass may hold (points and patched runs are rows of it). meta: what scores should say of themselves.
    unfinished: what an interrupted scoring left of this batch, or, with the first, of all.
    """

    unfinished: UnfinishedBatch | None = None
    parts_of_patch: ClassVar[bool] = False  # whether several shards can share one batch's exact patching

    def __init__(self, setup: Setup, room: Room | None = None, tick: Progress | None = None) -> None:
        self.setup, self.room, self._tick = setup, room or Room.on(setup.model.device), tick
        self.meta: dict[str, Any] = {}
        self._read: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.setup.batch)

    @property
    def model(self) -> Model:
        return self.setup.model

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the position axis of this batch's scores."""
        return self.setup.labels

    def tick(self, done: int, total: int, what: str) -> None:
        """Progress within the batch."""
        if self._tick:
            self._tick(done, total, what)

    @property
    def streams(self) -> Streams:
        """The stream's changes, which shares are of: 2 forward passes."""
        if "streams" not in self._read:
            self._read["streams"] = self.read_streams()
        found: Streams = self._read["streams"]
        return found

    def read_streams(self) -> Streams:
        return Streams(self.setup)

    def scored(self, row: Method, params: Params) -> Result:
        """What a method that is not of all batches at once says of this one; layers are computed again where the room says so."""
        with recomputing(self.model, self.room.recompute):
            values = row.load()[0](self, params)
            result: Result = self.attribute(values) if row.by == "points" else values
        return result

    def forget(self) -> None:
        """Drop what was read."""
        self._read.clear()

    @property
    def source(self) -> Any:
        """What the source has: 1 forward pass (none for a mean baseline)."""
        if "source" not in self._read:
            self._read["source"] = self.read_source()
        return self._read["source"]

    @property
    def run(self) -> Any:
        """What the run has: 1 forward pass, or none where gradients were taken at it."""
        if "run" not in self._read:
            self._read["run"] = self.read_run()
        return self._read["run"]

    def recorded(self, rules: Sequence[str]) -> Recorded | None:
        """What two-point rules among `rules` need of the source's pass, which is made here.

        Raises: RelpError for two-point rules where no patch prompt is run.
        """
        if not self.two_point(rules):
            return None
        if self.setup.baseline != "patch":
            raise RelpError(f"two-point rules need a patch prompt, not baseline '{self.setup.baseline}'")
        with torch.no_grad(), self.as_scored(), recording(self.model, rules) as other:
            self._read["source"] = self.read_source()
        return other

    def as_scored(self) -> AbstractContextManager[None]:
        """The model as gradients are taken of it, so that what is recorded has the same shapes."""
        return nullcontext()

    @staticmethod
    def two_point(rules: Sequence[str]) -> bool:
        """Whether there are two-point rules among these."""
        return any(a.rule.two_point for a in parse_rules(list(rules)))

    def recorded_on(self, tokens: Int[Tensor, "batch pos"], rules: Sequence[str]) -> Recorded:
        """What two-point rules need of another endpoint, a prompt of the run's length: 1 forward pass."""
        if self.setup.baseline != "patch":
            raise RelpError(f"two-point rules need a patch prompt, not baseline '{self.setup.baseline}'")
        with torch.no_grad(), self.as_scored(), recording(self.model, rules) as other:
            self.model.logits(tokens)
        self.setup.passes.forward += 1
        return other

    def passes(self, points: Iterable[Point]) -> Iterator[tuple[Point, Any]]:
        """Every point and what its pass gave (`gradients`); points that follow each other share passes as far as they can."""
        for group in self.groups(points):
            found = self.gradients(group)
            if not group[0].moved:
                self._read.setdefault("run", found[0].values)
            yield from zip(group, found, strict=True)
            del found  # before the next pass, not during it

    def readings(self, points: Iterable[Point]) -> Iterator[Any]:
        """The run's values at every point, without gradients; passes are shared as `passes` does."""
        for group in self.groups(points):
            yield from self.read_at(group)

    def groups(self, points: Iterable[Point]) -> Iterator[list[Point]]:
        """The points that share a pass."""
        return _groups(points, fitting(self.setup.run.numel(), self.room.graph))

    @abstractmethod
    def read_source(self) -> Any:
        """The values of the source that scores are made of."""

    @abstractmethod
    def read_run(self) -> Any:
        """The same of the run. 1 forward pass."""

    @abstractmethod
    def read_at(self, points: Sequence[Point]) -> Sequence[Any]:
        """The same of the run at each of the points, which move the same hook points: 1 forward pass of all."""

    @property
    @abstractmethod
    def embedding_change(self) -> Tensor:
        """Source − run of what the first block reads: Float[batch, pos, d_model]."""

    @abstractmethod
    def places(self, exact: Any) -> Iterator[Place]:
        """Where values can move on their own. exact: see `points.IgActivationsParams`; raises RelpError where undefined."""

    @abstractmethod
    def gradients(self, points: Sequence[Point]) -> Sequence[Any]:
        """Per point what its pass gave: .values (as `read_run`), .applied (rule → layers), and the space's own gradients.

        The points move the same hook points under the same rules: 1 forward + 1 backward of all.
        """

    @abstractmethod
    def product(self, start: Any, end: Any, at: Any) -> Mapping[str, Tensor]:
        """(end − start) · gradient for every unit, per example: start, end as `read`, at as `passes` gave it."""

    @abstractmethod
    def attribute(self, points: Iterable[Point]) -> Result:
        """(source − run) · Σ weight · gradient, over the points."""

    @abstractmethod
    def patch(self) -> Result:
        """Every unit patched on its own, exactly."""

    learning_steps: ClassVar[int] = 500  # of rankings that are learned, by default

    @property
    @abstractmethod
    def units(self) -> Units:
        """What is scored, in the order of the next three."""

    @abstractmethod
    def changed(self) -> Bool[Tensor, "slot unit"]:
        """The units that differ between source and run for some pair: 1 forward pass."""

    @abstractmethod
    def masked(self, keep: Float[Tensor, "slot unit"]) -> Float[Tensor, " batch"]:
        """L of the run in which every unit is keep·(its running value) + (1 − keep)·(its value in the source), with the graph
        that leads back to `keep`: 1 forward pass. At 1 and 0 it is what an evaluation with the source's values says of the
        circuit.
        """

    @abstractmethod
    def of_units(self, values: Float[Tensor, "slot unit"]) -> Mapping[str, Tensor]:
        """The same values for every pair, as `Result.scores`."""


class Scorer(Protocol):
    """A space made ready for one request, by `row.load_scorer()(model, pairs, nodes, request, options)`.

    units: what is scored. axis, labels: of the scores' positions. about: what scores should say of the space. held: bytes that
    it holds beside the model.
    """

    units: Units
    axis: str
    labels: tuple[str, ...]
    about: dict[str, Any]
    held: int

    def prepare(self, chunks: Sequence[PairBatch], passes: Passes) -> None:
        """What is needed of all pairs before the first is scored (means)."""

    def batch(self, chunk: PairBatch, passes: Passes, room: Room | None, tick: Progress | None) -> Batch:
        """One batch made ready."""

    def blocks(self, scores: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Scores of one batch, as `Result.scores`, block by block of units: Float[batch, slot, size]."""


def added(moved: Mapping[str, Tensor]) -> list[tuple[str, Hook]]:
    """The hooks that add to a run's values."""
    return [(name, lambda value, change=change: (value + change).to(value.dtype)) for name, change in moved.items()]  # type: ignore[misc]


def of_part(part: Part, share: Tensor) -> Tensor:
    """What a unit with share t of the stream's change has of a part of a blend: √t of the secant, the rest of the tangent.

    √t and not t: with it single neurons agree best with exact patching (docs/rules.md).
    """
    return share.sqrt() if part == "secant" else 1 - share.sqrt()


def _groups(points: Iterable[Point], size: int) -> Iterator[list[Point]]:
    """Runs of at most `size` points that move the same hook points under the same rules; of a fraction of that where an
    endpoint's values, of all layers, are held for each of them.
    """
    group: list[Point] = []
    for point in points:
        most = size if point.other is None else max(1, size // 32)
        if group and (
            len(group) >= most or point.moved.keys() != group[0].moved.keys() or point.rules != group[0].rules
        ):
            yield group
            group = []
        group.append(point)
    if group:
        yield group


def of_point(rows: Tensor, i: int, k: int) -> Tensor:
    """Of rows [point, batch], those of point `i` of `k`."""
    return rows.unflatten(0, (k, -1))[i]


def together(points: Sequence[Point]) -> tuple[dict[str, Tensor], Recorded | None]:
    """`moved` of several points as rows [point, batch] of one pass, and `other` for these rows."""
    first = points[0]
    moved = {name: torch.cat([p.moved[name] for p in points]) for name in first.moved}
    if len(points) == 1:
        return moved, first.other  # as it is: joining would copy what all layers hold
    others = [p.other for p in points if p.other is not None]
    other = first.other and {
        site: {key: torch.cat([o[site][key] for o in others]) for key in values} for site, values in first.other.items()
    }
    return moved, other
