"""What a scoring holds at most, measured: its first batch is scored, or begun, while peak memory is read.

Batches are alike and come one after the other, so what one needs above what is held (libraries, model) the whole run needs, and
single scores that are kept. No formula has to know what each method, node kind and rule keeps.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from relp_cli.methods.room import Room
from relp_cli.methods.table import row_of
from relp_cli.models.model import Model
from relp_cli.runs.spec import ScoreSpec
from relp_cli.scoring import score
from relp_cli.spaces.totals import KEEP_LIMIT
from relp_cli.tasks.pairs import PairBatch

SECONDS, PASSES = 3.0, 12  # after both a rehearsal ends: by then a method has gone through what it repeats
MIB = 1 << 20


class _Enough(BaseException):
    """No error: nothing may catch it."""


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
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is no part of what is held
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


def expected_memory(
    model: Model, pairs: Sequence[PairBatch], spec: ScoreSpec, params: dict[str, Any], cells: int, metric: str
) -> str:
    """Peak memory of the whole run, from what one batch of it takes; cells: how many scores one pair has. "" where the system
    does not say.

    params: the spec's, dictionaries loaded.
    """
    row = row_of(spec.method)
    room = Room.on(model.device, None, spec.batch_size, row.graph)
    longest = max(pairs, key=lambda batch: min(len(batch), room.size(batch)) * batch.n_pos)
    batch = longest.rows(slice(0, room.size(longest)))
    with peak(model.device) as found:
        _rehearse(model, batch, spec, params, metric)
    if found.above != found.above:
        return ""
    n_pairs = sum(map(len, pairs))
    kept = n_pairs * cells * 4 / MIB
    if spec.keep_examples is False or (spec.keep_examples is None and n_pairs * cells > KEEP_LIMIT):
        kept = 0.0
    where = "the process" if model.device.type == "cpu" else "the GPU"
    at_least = "at least " if row.by == "all" and len(batch) < n_pairs else "about "
    return (
        f"{at_least}{found.held + found.above + 2 * kept:.0f} MiB of {where} at the peak: {found.held:.0f} held now (libraries, "
        f"model), {found.above:.0f} for a batch of {len(batch)} pairs (measured), {2 * kept:.0f} to keep and write single scores"
    )


def _rehearse(model: Model, batch: PairBatch, spec: ScoreSpec, params: dict[str, Any], metric: str) -> None:
    """Score one batch, until there was enough of it."""
    started, passes = time.monotonic(), 0

    def look(_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes > PASSES and time.monotonic() - started > SECONDS:
            raise _Enough

    with suppress(_Enough), model.hooks({"unembed.hook_in": look}):
        score(
            model, [batch], spec.method, spec.nodes, metric, spec.direction, spec.baseline, len(batch), False, **params
        )
