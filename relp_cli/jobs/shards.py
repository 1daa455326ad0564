"""`--shard`: which share of a request a process computes, and one scoring that several processes compute.

Shards of a scoring share its run directory. Each leaves batches there, of exact patching parts of batches; the process that
finds all of them there writes the run, to the same bits as one process alone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from relp_cli.errors import RelpError
from relp_cli.jobs.claims import POLL, Claims
from relp_cli.methods.request import Progress, Request, check_divisible
from relp_cli.methods.score import score_share
from relp_cli.methods.table import row_of
from relp_cli.methods.unfinished import Shard, Unfinished
from relp_cli.runs.rundir import RunDir
from relp_cli.runs.scoring import (
    Prepared,
    Session,
    check_request,
    default_folder,
    digest_of,
    loaded_params,
    prepare,
    score_run,
)
from relp_cli.runs.spec import ScoreSpec
from relp_cli.spaces.scores import Scores

SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
INDEX, COUNT = "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"  # Kubernetes sets the first; the second is the user's


def shard_of(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """`3/8`: the third of eight shares. `auto`: as a Slurm array or an indexed Kubernetes Job counts its tasks.

    Raises: RelpError for anything else, and where `auto` cannot know how many there are.
    """
    if text == "auto":
        return _from(environment)
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise RelpError(f"--shard {text}: expected I/N with I from 1 to N, for example 1/8, or auto")
    return Shard(int(match[1]) - 1, int(match[2]))


def source_of(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Who said which shard this is."""
    names = [name for name in (SLURM[0], INDEX) if name in environment] if text == "auto" else []
    return f"{names[0]}={environment[names[0]]}" if names else f"--shard {text}"


def _from(environment: Mapping[str, str]) -> Shard:
    if SLURM[0] in environment:
        task, first, count = (_number(environment, name) for name in SLURM)
        # arrays with steps (--array=0-30:10) have ids that are no count
        step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1) or 1
        last = _number(environment, "SLURM_ARRAY_TASK_MAX", first + step * (count - 1))
        index = (task - first) // step
        if last != first + step * (count - 1):  # --array=3,7: some of an array's tasks, tried again
            raise RelpError(
                f"--shard auto: the array's {count} tasks, {first} to {last}, are no range, so which share this is cannot be "
                "known; give --shard I/N"
            )
    elif INDEX in environment:
        index, count = _number(environment, INDEX), _number(environment, COUNT)
    else:
        raise RelpError(
            f"--shard auto: neither {SLURM[0]} (Slurm array) nor {INDEX} (Kubernetes Job) is set; give --shard I/N"
        )
    if not 0 <= index < count:
        raise RelpError(f"--shard auto: the environment says task {index + 1} of {count}; give --shard I/N")
    return Shard(index, count)


def _number(environment: Mapping[str, str], name: str, unset: int | None = None) -> int:
    text = environment.get(name, "") or ("" if unset is None else str(unset))
    if not re.fullmatch(r"\d{1,6}", text):
        raise RelpError(
            f"--shard auto: {name} is '{text}', expected a number" if text else f"--shard auto: {name} is not set"
        )
    return int(text)


def score_shard(
    spec: ScoreSpec,
    session: Session,
    shard: Shard,
    folder: Path | None = None,
    progress: Progress | None = None,
    on_ready: Callable[[Prepared], None] | None = None,
) -> tuple[RunDir, Scores | None, bool, int]:
    """`score_run`, of one share. Returns the run directory, its scores (None: other shards are not done), whether they were there
    already, and how many batches wait for other shards.

    Raises: RelpError for bad input, and for a method that needs all pairs at once.
    """
    check_request(spec, folder)
    check_divisible(row_of(spec.method), spec.method, spec.params.get("rules"))
    prepared = prepare(spec, session)
    digest = digest_of(spec, prepared, session)
    run = RunDir(folder or default_folder(spec, digest))
    if on_ready:
        on_ready(prepared)
    if not run.is_done(digest):
        request = Request(
            prepared.metric, spec.direction, spec.baseline, spec.batch_size, spec.keep_examples, progress,
            Unfinished(run.unfinished, digest, shard), spec.memory,
        )  # fmt: skip
        waiting = score_share(
            prepared.model, prepared.pairs, spec.method, spec.nodes, request, **loaded_params(spec, prepared, session)
        )
        if waiting and not run.is_done(digest):  # done: by the shard that ended last, which took the batches away
            return run, None, False, len(waiting)
    claims = Claims(run.path / "claims")
    while True:
        with claims.claim("scores") as ours:
            if ours:
                run, scores, cached = score_run(spec, session, run.path, progress, prepared=prepared)
                break
        time.sleep(POLL)  # another shard is writing the run
    with suppress(OSError):  # another shard is still looking
        claims.folder.rmdir()
    return run, scores, cached, 0
