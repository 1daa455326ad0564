"""Several processes at one job on this machine: `relp evaluate JOB --workers N`.

1. A worker claims groups, as every process at a job's folder does; where there are GPUs it sees one of them.
2. The parent computes nothing: it counts cell files, says which worker died, and starts another in its place.
3. A group at which MOST_DEATHS workers died fails on its own. Workers end with their parent.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from relp_cli.errors import RelpError
from relp_cli.files import check_writable
from relp_cli.jobs.claims import MOST_DEATHS, POLL, release
from relp_cli.jobs.collecting import cell_paths
from relp_cli.jobs.grid import Cell, Group, JobSpec, cells, is_finished
from relp_cli.jobs.known import Known
from relp_cli.jobs.run import Begun, Outcome, Report, run_cells
from relp_cli.models.placement import DEVICE_MAPS
from relp_cli.runs.scoring import Session

REFUSED = 3  # exit code of a worker that said why it cannot go on: another one would say the same
LINE = [sys.executable, "-P", "-m", "relp_cli.jobs.workers"]
ENDING = (signal.SIGINT, signal.SIGTERM)
GRACE = 3.0  # seconds to release claims in


@dataclass(frozen=True)
class Place:
    """What one worker has for itself: environment variables, and how people call that."""

    environment: dict[str, str]
    name: str


def places(workers: int, gpus: Sequence[str], cores: int, environment: Mapping[str, str] = os.environ) -> list[Place]:
    """One GPU for each worker, round robin where there are fewer, and an equal share of the cores (OMP_NUM_THREADS,
    unless it is set)."""
    threads = environment.get("OMP_NUM_THREADS") or str(max(1, cores // workers))
    made = []
    for number in range(workers):
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        name = f"GPU {gpu['CUDA_VISIBLE_DEVICES']}" if gpu else f"{threads} thread{'s' * (threads != '1')}"
        made.append(Place({"OMP_NUM_THREADS": threads, **gpu}, name))
    return made


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(place: str | None) -> list[str]:
    """The GPUs that a job without a device, on "cuda" or by a device map would choose from, as CUDA_VISIBLE_DEVICES names
    them."""
    import torch

    count = torch.cuda.device_count() if place in (None, "cuda", *DEVICE_MAPS) else 0
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given[:count] if given else [str(number) for number in range(count)]


def run_workers(
    job: JobSpec,
    folder: Path,
    at: Sequence[Place],
    place: str | None,
    report: Report | None,
    say: Callable[[str], None],
    groups: Sequence[Group],
) -> Outcome:
    """`run_cells` by a worker at each place. say: takes a line about a worker that died.

    Raises: RelpError where the folder cannot be written to.
    """
    check_writable(folder)
    begun = Begun.of(folder)
    watched = Watched(Known(job, folder, trusting=True), begun, [c for c in cells(job) if c.group in groups])
    before = set(watched.finished())
    request = {"job": job.model_dump(mode="json"), "folder": str(folder), "place": place,
               "groups": [list(asdict(group).values()) for group in groups], "begun": asdict(begun)}  # fmt: skip
    running = {number: _Worker.start(its, request) for number, its in enumerate(at, 1)}
    idle = 0  # deaths since a cell was last written
    try:
        while running:
            time.sleep(POLL)
            idle = 0 if watched.look() else idle
            if report:
                report(watched.total - len(watched.left), watched.total, f"{job.name}: {len(at)} workers")
            for number, worker in list(running.items()):
                why = worker.death()
                if why is None:
                    continue
                del running[number]
                worker.close()
                if not why:
                    continue
                idle += 1
                again = worker.process.returncode != REFUSED and idle < MOST_DEATHS * len(at) and bool(watched.left)
                then = "another one takes its place" if again else f"{len(running)} go on"
                say(f"WARNING: worker {number} ({worker.place.name}) {why}; {then}")
                if again:
                    running[number] = _Worker.start(worker.place, request)
    finally:
        for worker in running.values():
            worker.close()  # all of them first: they release their claims at the same time
        for worker in running.values():
            worker.end()
    return watched.outcome(before)


@dataclass
class Watched:
    """The cells of a job, by their files."""

    known: Known
    begun: Begun
    left: list[Cell]
    total: int = 0
    _files: dict[Cell, tuple[Path, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total, self._all = len(self.left), tuple(self.left)
        done = set(self.finished())
        self.left = [cell for cell in self.left if cell not in done]

    def finished(self) -> list[Cell]:
        return [cell for cell, path in self._paths().items() if is_finished(path)]

    def look(self) -> bool:
        """Whether there are new cells, which are then no longer `left`."""
        left = [cell for cell in self.left if not any(self.begun.since(path) for path in self._of(cell))]
        new, self.left = len(left) < len(self.left), left
        return new

    def outcome(self, before: set[Cell]) -> Outcome:
        """Where all have ended. Cells without a file are failures."""
        self.known = Known(self.known.job, self.known.folder, trusting=True)  # models may have been noted meanwhile
        paths, finished = self._paths(), set(self.finished())
        counts = len(finished - before), len(finished & before), len(paths) - len(finished)
        return Outcome(paths, *counts, noted=tuple(sorted(self.known.noted)))

    def _paths(self) -> dict[Cell, Path]:
        return cell_paths(self.known, {cell.group for cell in self._all})

    def _of(self, cell: Cell) -> tuple[Path, ...]:
        if cell in self._files:
            return self._files[cell]
        path, unloaded = self.known.path(cell), self.known.unloaded(cell)
        if path is None:
            return (unloaded,)  # looked at again: its model may be noted by then
        self._files[cell] = path, unloaded
        return self._files[cell]


@dataclass
class _Worker:
    place: Place
    process: subprocess.Popen[bytes]
    said: IO[bytes]

    @classmethod
    def start(cls, place: Place, request: Mapping[str, object]) -> _Worker:
        said = tempfile.TemporaryFile()  # noqa: SIM115 - read after its death
        process = subprocess.Popen(
            LINE, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, env=os.environ | place.environment
        )
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it died already, which is seen later
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        return cls(place, process, said)

    def death(self) -> str | None:
        """None while it lives, "" where it ended well, else how it died."""
        code = self.process.poll()
        if not code:
            return None if code is None else ""
        if code < 0:
            return f"was killed ({signal.Signals(-code).name})"
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return f"ended with exit code {code}" + (f" ({lines[-1].strip()})" if lines else "")

    def close(self) -> None:
        """Close what it was spoken to through; one that lives ends then."""
        self.said.close()
        with suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.close()

    def end(self) -> None:
        """Ask it to release its claims, and do not wait long."""
        self.close()
        try:
            self.process.wait(GRACE + 1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main() -> int:
    """A worker: its request is a line on stdin, which stays open as long as its parent lives."""
    asked = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in ENDING:
        signal.signal(number, _release)
    groups = [Group(*values) for values in asked["groups"]]
    try:
        run_cells(
            JobSpec.model_validate(asked["job"]), Path(asked["folder"]), Session(asked["place"]), None, groups,
            Begun(**asked["begun"]),
        )  # fmt: skip
    except RelpError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:  # claims are given back; die of what it was, without a traceback
        release()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    return 0


def _release(_: int, __: object) -> None:
    """At SIGTERM, which clusters send to all processes of a job, and when the parent ends: once, so that claims go back."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    _thread.interrupt_main()
    time.sleep(GRACE)
    release()  # for a main thread that does not come back from somebody's library
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
