"""A limit to memory: how many tokens batches and passes may have, so that the peak of a computation stays below it.

1. What is alive at the peak, in tensors, is counted while one pair is computed, and two: a + b·pairs. Counted, not measured: the
   same computation counts the same on every machine, whatever else that machine does.
2. An allocator holds more than what is alive (`HELD`), and beside it are the libraries (`LIBRARIES`) and the weights.
3. The largest power of two of tokens that fits is taken, for the longest pairs and for the shortest.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relp_cli.config.memory import written
from relp_cli.errors import RelpError
from relp_cli.methods.request import Request
from relp_cli.methods.room import Room, fitting
from relp_cli.methods.setup import Passes
from relp_cli.methods.space import Batch, Scorer
from relp_cli.methods.table import Method, Result
from relp_cli.methods.unfinished import WAITING
from relp_cli.models.model import Model
from relp_cli.models.offload import resident
from relp_cli.spaces.table import space_of
from relp_cli.spaces.totals import KEEP_LIMIT, singles
from relp_cli.tasks.counted import distinct
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.parts import parts_of
from relp_cli.tasks.shared import prompts_of

MIB = 1 << 20
LIBRARIES = {"cpu": 640 * MIB}  # what Python and the libraries hold, once a model is loaded
OTHER_LIBRARIES = 512 * MIB  # of a GPU's memory: its context
HELD = 2.25  # bytes that an allocator holds at the peak for one that is alive: blocks of many sizes come and go
PASSES = 12  # as large as they get: by then a method has gone through what it repeats
WRITTEN = 2.25  # copies of single scores while they are written: themselves, and kind by kind
COMPARED = 3.25  # of those that are asked for, to be compared: one method's, and another's while they are read
# Bytes a single score of a sparse space, while they are collected: example, cell and value, twice in the end.
INDEXED = 40
SUMS, CLUSTERED = 48, 24  # bytes a score: sums, squares, moments and what goes between; more where pairs share prompts
MOST = 1 << 14  # tokens: more gain nothing (docs/memory.md)


@dataclass(frozen=True)
class Plan:
    """What was chosen for a limit of so many bytes: tokens per batch and pass, whether layers are computed again in the backward
    pass, and the peak in bytes that is expected at most.
    """

    memory: int
    tokens: int
    peak: int
    recompute: bool = False

    @property
    def room(self) -> Room:
        return Room.of_tokens(self.tokens, self.recompute)

    @property
    def about(self) -> dict[str, Any]:
        """As metadata have it; whether layers are computed again is said of the room (`Room.about`)."""
        return {"memory": self.memory, "tokens_per_pass": self.tokens, "memory_expected": self.peak}

    def said(self, pairs: Sequence[PairBatch]) -> str:
        """For people."""
        sizes = sorted({min(len(batch), fitting(batch.n_pos, self.tokens)) for batch in pairs})
        several = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
        again = ", layers computed again in the backward pass" if self.recompute else ""
        return f"{self.tokens} tokens a pass ({several} pairs){again}, at most {written(self.peak)} of {written(self.memory)}"


class _Enough(BaseException):
    """No error: nothing may catch it."""


class _TooLarge(RelpError):
    """One pair does not fit."""


class Alive(TorchDispatchMode):
    """Bytes of all tensors that were made inside and still are there: now, and at the peak. Ends the computation, as `begun`
    does, where they are more than `most`.
    """

    def __init__(self, most: float = inf) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.most = most
        self._there: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in given:
                self._count(made.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._there:  # a view that an operation kept by itself
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._there.pop(key, None)

        self._there[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
        if self.now > self.most:
            raise _Enough


@contextmanager
def begun(model: Model, enough: Callable[[Tensor], bool]) -> Iterator[None]:
    """A computation inside ends, without a word, once `enough` says so of what a pass unembeds, Float[rows, read, d_model]."""

    def look(value: Tensor) -> None:
        if enough(value):
            raise _Enough

    with suppress(_Enough), model.hooks({"unembed.hook_in": look}):
        yield


def plan(
    memory: int,
    model: Model,
    pairs: Sequence[PairBatch],
    compute: Callable[[PairBatch, Room], object],
    patched: bool = False,
    kept: int = 0,
    singles: int = 0,
    copies: float = WRITTEN,
    waiting: int = 0,
    recomputes: bool = False,
) -> Plan:
    """The largest passes whose peak stays below `memory`.

    compute: does with a few pairs what is to be done with all, in so much room. patched: whether most of its passes are patched
    runs. kept, singles, waiting: bytes of the results beside it, of single scores, and of what waits to be written meanwhile.
    copies: how many of single scores there are once the passes are done.
    recomputes: whether layers can be computed again in the backward pass, which they are where one pair does not fit otherwise.
    Raises: RelpError where not even one pair fits, or single scores do not.
    """
    held = LIBRARIES.get(model.device.type, OTHER_LIBRARIES) + resident(model.hf) + kept
    always, writing, held = held, held + copies * singles, held + singles + waiting

    def largest(recompute: bool, most: float = inf) -> Plan:
        tokens, peaks = MOST, list[tuple[int, float, float]]()
        for n_pos in {batch.n_pos for batch in (min(pairs, key=_length), max(pairs, key=_length))}:
            batch = next(batch for batch in pairs if batch.n_pos == n_pos)

            def alive(n: int, batch: PairBatch = batch) -> float:
                few = batch.rows(torch.arange(n) % len(batch))
                return HELD * _alive(model, few, compute, patched, recompute, most)

            alive(1)  # once what is computed of a model but once is no part of it
            one = alive(1)
            if (least := max(held + one, writing)) > memory:
                kept_too = (
                    f" and {written(least - always - one)} for single scores (--no-per-example: none)"
                    if singles
                    else ""
                )
                again = ", layers computed again in the backward pass," if recompute else ""
                raise _TooLarge(
                    f"memory {written(memory)}: one pair of {n_pos} tokens at a time{again} takes up to {written(least)}, "
                    f"{written(always)} of it for libraries, model and results{kept_too}; give at least as much"
                )
            # two are tried where they are sure to fit
            each = alive(2) - one if held + 2 * one <= memory else memory
            each = max(each, 1.0)
            fit = 1 + int((memory - held - one) / each)
            tokens = min(tokens, _power_of_two(fit * n_pos))
            peaks.append((n_pos, one, each))
        peak = max(held + one + each * (fitting(n_pos, tokens) - 1) for n_pos, one, each in peaks)
        return Plan(memory, tokens, round(max(peak, writing)), recompute)

    if recomputes:
        with suppress(_TooLarge):
            return largest(False, (memory - held) / HELD)  # trying it stays below the limit, too
    return largest(recomputes)


def give_back() -> None:
    """The allocator gives what was freed back to the system, where it can be told to (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _length(batch: PairBatch) -> int:
    return batch.n_pos


def _power_of_two(number: int) -> int:
    """The largest one that is not above it."""
    return 1 << (number.bit_length() - 1)


def _alive(
    model: Model,
    batch: PairBatch,
    compute: Callable[[PairBatch, Room], object],
    patched: bool,
    recompute: bool,
    most: float,
) -> int:
    """Bytes that are alive at the peak, beside what was there before; it ends where they are more than `most`."""
    room, passes = Room.of_tokens(batch.original.numel(), recompute), 0
    rows = fitting(batch.n_pos, room.patched if patched else room.graph)

    def enough(value: Tensor) -> bool:
        nonlocal passes
        passes += len(value) >= rows
        return passes > PASSES

    with begun(model, enough), Alive(most) as count:
        compute(batch, room)
    return count.peak


def planned(
    model: Model,
    pairs: Sequence[PairBatch],
    row: Method,
    scorer: Scorer,
    request: Request,
    compute: Callable[[Batch], Result],
) -> Plan | None:
    """How the pairs are cut so that the scoring stays below `request.memory`; once decided, a request keeps to it."""
    if request.memory is None:
        return None
    memory, n_pairs = request.memory, sum(map(len, pairs))
    cells, left = len(scorer.units) * len(scorer.labels), request.unfinished
    sums = SUMS + (CLUSTERED if distinct(prompts_of(pairs)) < n_pairs else 0)
    waiting = min(WAITING, 4 * cells * n_pairs) if left else 0

    def some(few: PairBatch, room: Room) -> None:
        newest = torch.empty(len(few) if left else 0, cells)  # the last batch's scores wait to be written meanwhile
        parts = parts_of([few.to(model.device)])
        scorer.prepare(parts, Passes())
        for part in parts:
            scorer.blocks(compute(scorer.batch(part, Passes(), room, None)).scores)
        del newest

    def decide() -> Plan:
        indexed, kept = 0, 4 * singles(n_pairs, cells, request.keep_examples)
        if space_of(scorer.units).sparse:
            indexed, kept = _sparse(model, pairs, scorer, request.keep_examples)
        beside = sums * cells + scorer.held + indexed
        copies = COMPARED if request.keep_examples else WRITTEN
        return plan(memory, model, pairs, some, row.each, beside, kept, copies, waiting, row.recomputes)

    return decide() if left is None else Plan(**left.agreed("memory", lambda: vars(decide())))


def _sparse(model: Model, pairs: Sequence[PairBatch], scorer: Scorer, keep: bool | None) -> tuple[int, int]:
    """Bytes of single scores of a sparse space at most, one by one and as a table: those that differ between the prompts of the
    longest pair are counted.
    """
    if keep is False:
        return 0, 0
    n_pairs, (one, *_) = sum(map(len, pairs)), parts_of([max(pairs, key=_length).rows(slice(0, 1)).to(model.device)])
    scorer.prepare([one], Passes())
    entries = n_pairs * int(scorer.batch(one, Passes(), None, None).changed().sum())
    cells = min(entries, len(scorer.units) * len(scorer.labels))
    return INDEXED * entries, 4 * (n_pairs * cells if keep else min(n_pairs * cells, KEEP_LIMIT))
