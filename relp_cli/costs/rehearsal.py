"""What a scoring holds at most, measured: its first batch is scored, or begun, while peak memory is read.

Batches are alike and come one after the other, so what one needs above what is held (libraries, model) the whole run needs, and
single scores that are kept. No formula has to know what each method, node kind and rule keeps.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from relp_cli.methods.memory import MIB, PASSES, begun, give_back
from relp_cli.methods.request import Request
from relp_cli.methods.room import Room
from relp_cli.methods.score import plan_of, score_units
from relp_cli.methods.table import row_of
from relp_cli.methods.unfinished import WAITING
from relp_cli.models.model import Model
from relp_cli.runs.spec import ScoreSpec
from relp_cli.scoring import score
from relp_cli.spaces.table import space_for
from relp_cli.spaces.totals import singles
from relp_cli.tasks.pairs import PairBatch

SECONDS = 3.0  # after these, and PASSES, a rehearsal ends


class Peak:
    """held: MiB before; above: MiB above that at the peak. NaN where the system does not say."""

    held = above = float("nan")


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Peak memory of the block: of the process (Linux), on a GPU of what torch allocates there."""
    gc.collect()
    found = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.held, found.above = before / MIB, (torch.cuda.max_memory_allocated(device) - before) / MIB
        return
    give_back()  # what was freed before is no part of what is held
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from now on
    except OSError:
        yield found
        return
    before = _status("VmRSS")
    yield found
    found.held, found.above = before / 1024, (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


@dataclass(frozen=True)
class Expected:
    """A peak to expect, in MiB: what is held now, what one batch of so many pairs takes above that, and single scores that are
    kept, or wait to be written in case of an interruption. more: the whole may take more, for it needs all pairs at once.
    """

    held: float
    batch: float
    single: float
    pairs: int
    more: bool
    where: str

    @property
    def whole(self) -> float:
        return self.held + self.batch + self.single

    def __str__(self) -> str:
        return (
            f"{'at least' if self.more else 'about'} {self.whole:.0f} MiB of {self.where} at the peak: {self.held:.0f} held now "
            f"(libraries, model), {self.batch:.0f} for a batch of {self.pairs} pairs (measured), {self.single:.0f} to keep and "
            "write single scores"
        )


def expected_memory(
    model: Model, pairs: Sequence[PairBatch], spec: ScoreSpec, params: dict[str, Any], cells: int, metric: str
) -> dict[str, Any]:
    """memory: the peak of the whole run, from what one batch of it takes (not there where the system does not say); passes: how
    pairs are cut, where the spec has a limit to memory. cells: how many scores one pair has.

    params: the spec's, dictionaries loaded. Raises: RelpError where not one pair fits the limit.
    """
    request = _request(spec, metric)
    chosen = plan_of(model, pairs, spec.method, spec.nodes, request, **params) if spec.memory else None
    said = {"passes": chosen.said(pairs)} if chosen else {}
    found = expected_peak(model, pairs, spec, params, cells, metric, chosen.room if chosen else None)
    return said if found is None else said | {"memory": str(found)}


def _request(spec: ScoreSpec, metric: str) -> Request:
    return Request(metric, spec.direction, spec.baseline, spec.batch_size, spec.keep_examples, memory=spec.memory)


def expected_peak(
    model: Model,
    pairs: Sequence[PairBatch],
    spec: ScoreSpec,
    params: dict[str, Any],
    cells: int,
    metric: str,
    given: Room | None = None,
) -> Expected | None:
    """The same as numbers; given: how a limit to memory cuts pairs. None where the system does not say what is held."""
    row = row_of(spec.method)
    room = given or Room.on(model.device, None, spec.batch_size, row.graph)
    longest = max(pairs, key=lambda batch: min(len(batch), room.size(batch)) * batch.n_pos)
    batch = longest.rows(slice(0, room.size(longest)))
    with peak(model.device) as found:
        _rehearse(model, batch, spec, replace(_request(spec, metric), keep_examples=False, room=given), params, metric)
    if found.above != found.above:
        return None
    n_pairs = sum(map(len, pairs))
    kept = 2 * 4 * singles(n_pairs, cells, spec.keep_examples) / MIB
    if space_for(spec.nodes).load().sparse:  # what is not 0 alone
        kept = 0.0
    left = 0 if row.by == "all" else min(WAITING, 4 * cells * (n_pairs - len(batch))) / MIB
    where = "the process" if model.device.type == "cpu" else "the GPU"
    more = row.by == "all" and len(batch) < n_pairs
    return Expected(found.held, found.above, kept + left, len(batch), more, where)


@contextmanager
def begun_for(model: Model, seconds: float) -> Iterator[None]:
    """A computation inside ends, without a word, after so many seconds, and `PASSES`."""
    started, passes = time.monotonic(), 0

    def enough(_: Any) -> bool:
        nonlocal passes
        passes += 1
        return passes > PASSES and time.monotonic() - started > seconds

    with begun(model, enough):
        yield


def _rehearse(
    model: Model, batch: PairBatch, spec: ScoreSpec, request: Request, params: dict[str, Any], metric: str
) -> None:
    """Score one batch, until there was enough of it."""
    with begun_for(model, SECONDS):
        if request.room is not None:
            score_units(model, [batch], spec.method, spec.nodes, replace(request, memory=None), **params)
        else:
            score(
                model,
                [batch],
                spec.method,
                spec.nodes,
                metric,
                spec.direction,
                spec.baseline,
                len(batch),
                False,
                **params,
            )
