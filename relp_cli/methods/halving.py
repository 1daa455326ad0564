"""A batch that memory does not hold is scored in halves: the same numbers, in more goes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from relp_cli.errors import RunFailed, out_of_memory
from relp_cli.methods.room import Room, fitting
from relp_cli.methods.setup import Passes
from relp_cli.methods.space import Batch
from relp_cli.methods.table import Result
from relp_cli.tasks.pairs import PairBatch


class Halving:
    """Scores batches by `compute`, in halves once one was too large; `make` makes a batch of pairs with so much room.

    recomputes: whether layers can be computed again in the backward pass, which is tried where one pair does not fit.
    most: how many pairs a pass has had at most since then (None: memory never ran out).
    """

    def __init__(
        self,
        compute: Callable[[Batch], Result],
        make: Callable[[PairBatch, Room], Batch],
        room: Room,
        recomputes: bool = False,
    ) -> None:
        self.compute, self.make, self.recomputes = compute, make, recomputes
        self.first = self.room = room

    @property
    def most(self) -> int | None:
        return None if self.room is self.first else self.room.pairs

    @property
    def about(self) -> dict[str, int]:
        """What scores say of it."""
        return ({} if self.most is None else {"out_of_memory_pairs_per_pass": self.most}) | self.room.about

    def __call__(self, on: Batch) -> Result:
        """The scores of one batch; its setup then knows L and passes of the whole.

        Raises: RunFailed where not even one pair fits, nor a smaller pass.
        """
        if self.most is None or (len(on) <= self.most and on.room.recompute == self.room.recompute):
            try:
                return self.compute(on)
            except Exception as error:
                if not out_of_memory(error):
                    raise
            _let_go(on)  # now: until here the error held what was being computed
            self.room = self._less(on)
        return _joined(on, self._parts(on))

    def _less(self, on: Batch) -> Room:
        """Than what memory did not hold."""
        n_pos, tokens = on.setup.batch.n_pos, self.room.graph if self.recomputes else self.room.patched
        if len(on) > 1 or fitting(n_pos, tokens) > 1:
            return self.room.halved(len(on))
        if self.recomputes and not self.room.recompute:
            return replace(self.room, recompute=True)
        raise RunFailed(
            f"out of memory with one pair of {n_pos} tokens at a time: use a smaller model or --dtype bfloat16, fewer node kinds "
            "at once, or a device with more memory"
        )

    def _parts(self, on: Batch) -> list[tuple[int, Result, Batch]]:
        parts = []
        for pairs in on.setup.batch.split(self.room.pairs):
            part = self.make(pairs, self.room)
            parts.append((len(part), self(part), part))
            _let_go(part)
        return parts


def in_one_go(function: Callable[[], Sequence[Result]], method: str) -> Sequence[Result]:
    """What a method says that needs all pairs at once. Raises RunFailed where memory does not hold them."""
    try:
        return function()
    except Exception as error:
        if not out_of_memory(error):
            raise
    raise RunFailed(
        f"out of memory: method '{method}' needs all pairs at once; give fewer --pairs or a smaller --batch-size"
    )


def _let_go(on: Batch) -> None:
    on.forget()
    vars(on.setup).pop("traced", None)
    gc.collect()
    if on.model.device.type == "cuda":
        torch.cuda.empty_cache()


def _joined(on: Batch, parts: Sequence[tuple[int, Result, Batch]]) -> Result:
    """One batch's result from its parts'. Passes are per pair of the batch: their mean; patched runs are counted."""
    passes = Passes()
    for n, _, part in parts:
        spent = part.setup.passes
        passes.add(spent)
        passes.forward += spent.forward * (n / len(on) - 1)
        passes.backward += spent.backward * (n / len(on) - 1)
    vars(on.setup.passes).update(vars(passes))
    on.setup.seen.clear()
    for name in parts[0][2].setup.seen:
        on.setup.seen[name] = torch.cat([part.setup.seen[name] for _, _, part in parts])
    _, last, _ = parts[-1]
    scores = {key: torch.cat([result.scores[key] for _, result, _ in parts]) for key in last.scores}
    return Result(scores, last.applied, last.meta)
