"""What is known of a scoring that has not ended: kept in a folder, so that the same request goes on where it was interrupted.

A file a batch. It holds the batch's result, or, while it is worked on step by step, what is known so far. Files
are written when `EVERY` seconds have passed, so that short runs write nothing, or when `WAITING` bytes wait. Where writing them
would take more than a twentieth of the time, the oldest are let go: going on computes these batches again.

Several processes may work at one request, each at its `Shard`: then exact patching has a file for each of them and batch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.files import create_once, read_object, write_atomically
from relp_cli.methods.setup import Passes, Setup
from relp_cli.methods.table import Result

EVERY, REST = 10.0, 20.0  # from one writing to the next: seconds, and times as long as it took; the longer of the two
LOOKS, LOOK = 50, 0.1  # how often, and after how many seconds, a decision is read that another process is writing
WAITING = 64 << 20  # bytes that wait in memory to be written, at most, beside the newest file's


@dataclass(frozen=True)
class Shard:
    """Share `index` (from 0) of `count` of one request: every `count`-th piece of work."""

    index: int
    count: int

    def has(self, number: int) -> bool:
        return number % self.count == self.index

    def __str__(self) -> str:
        return f"shard {self.index + 1}/{self.count}"


@dataclass
class Unfinished:
    """The folder of one request, whose content hash is `digest`: files of another one are not read.

    shard: the share of the request that is worked at (None: all of it).
    """

    folder: Path
    digest: str
    shard: Shard | None = None
    _waiting: dict[Path, tuple[dict[str, Tensor], str]] = field(default_factory=dict)  # not made into bytes in vain
    _next: float = field(default_factory=lambda: time.monotonic() + EVERY)
    _rested: float = 0.0  # from when writing is no more than its share of the time

    def of_batches(self, sizes: Sequence[int]) -> Unfinished:
        """The same, of batches of so many pairs: what was left with batches of other sizes is of other pairs, and is not read."""
        of = hashlib.sha256(repr(list(sizes)).encode()).hexdigest()[:8]
        return replace(self, digest=f"{self.digest}/{of}")

    def agreed(self, name: str, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the first process that asked has decided, now or before: all that work at this request go by it."""
        path = self.folder / f"{name}-{self.digest}.json"
        decided: dict[str, Any] = {}
        if not path.is_file():
            decided = decide()
            create_once(path, json.dumps(decided))
        for _ in range(LOOKS):
            try:
                return read_object(path)
            except RelpError:
                if not path.is_file():  # another process has finished the request meanwhile
                    return decided or decide()
                time.sleep(LOOK)  # it is being written
        path.unlink(missing_ok=True)  # its writer died in between
        return self.agreed(name, decide)

    def due(self) -> bool:
        """Whether it is time to write."""
        now = time.monotonic()
        return now >= self._next or (now >= self._rested and self._bytes() > WAITING)

    def _bytes(self) -> int:
        """What waits to be written."""
        return sum(tensor.nbytes for content, _ in self._waiting.values() for tensor in content.values())

    def put(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep one file's content; it is written when it is time."""
        content = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        path = self.folder / f"{name}.safetensors"
        self._waiting.pop(path, None)  # the newest stands last
        self._waiting[path] = content, json.dumps(about)
        if self.due():
            self.write()
        while len(self._waiting) > 1 and self._bytes() > WAITING:
            self._waiting.pop(next(iter(self._waiting)))

    def write(self) -> None:
        """Write what waits to be written."""
        started = time.monotonic()
        for path, (content, about_it) in self._waiting.items():
            write_atomically(path, save(content, {"digest": self.digest, "about": about_it}))
        self._waiting.clear()
        ended = time.monotonic()
        self._rested = ended + REST * (ended - started)
        self._next = max(ended + EVERY, self._rested)

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept under a name; None where there is nothing, or nothing of this request."""
        return self._read(name, lambda stored: {key: stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118

    def about(self, name: str) -> dict[str, Any] | None:
        """The same without its tensors, which are not read."""
        stored = self._read(name, lambda _: {})
        return None if stored is None else stored[1]

    def _read(
        self, name: str, tensors: Callable[[Any], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        try:
            with safe_open(self.folder / f"{name}.safetensors", framework="pt") as stored:
                head = stored.metadata() or {}
                return (tensors(stored), json.loads(head["about"])) if head.get("digest") == self.digest else None
        except (OSError, SafetensorError, ValueError, KeyError):
            return None  # not there, or damaged: done again

    def drop(self) -> None:
        """Do not write what waits to be written: it is large, and part of a whole by now."""
        self._waiting.clear()

    def clear(self) -> None:
        """The request is finished."""
        self.drop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def of(self, number: int) -> UnfinishedBatch:
        return UnfinishedBatch(self, number)


class Cost(NamedTuple):
    """Of one step of exact patching: patched runs, what was computed for them in whole runs, how many had no effect, seconds."""

    patched: int
    computed: float
    no_effect: int
    seconds: float


@dataclass
class Steps:
    """Steps of exact patching that are done, by their numbers, and their effects: name → Float[pairs, slots, units], in which
    the cells of other steps are anything.
    """

    effects: dict[str, Tensor]
    cost: dict[int, Cost] = field(default_factory=dict)


@dataclass
class UnfinishedBatch:
    """One batch's files. Passes that it took are kept with it, so that costs are those of the whole."""

    store: Unfinished
    number: int

    @property
    def name(self) -> str:
        return f"batch-{self.number:05d}"

    @property
    def shard(self) -> Shard | None:
        return self.store.shard

    def so_far(self, passes: Passes) -> tuple[int, dict[str, Tensor]]:
        """How many steps are done already, and what is known after them; `passes` becomes what they took."""
        stored = self.store.get(self.name)
        if stored is None or "done" not in stored[1]:
            return 0, {}
        _assign(passes, stored[1]["passes"])
        return int(stored[1]["done"]), stored[0]

    def keep(self, done: int, passes: Passes, known: Callable[[], Mapping[str, Tensor]]) -> None:
        """`done` steps are done; `known` is asked when it is time to write."""
        if self.store.due():
            self.store.put(self.name, known(), {"done": done, "passes": asdict(passes)})

    def pieces(self, rows: int) -> list[Steps]:
        """What processes left of exact patching with `rows` rows a pass; what was done with another number is not taken."""
        names = [name for name, about in self._pieces() if about["rows"] == rows]
        stored = [kept for name in names if (kept := self.store.get(name))]
        return [Steps(effects, {int(n): Cost(*cost) for n, cost in about["cost"].items()}) for effects, about in stored]

    def keep_piece(self, steps: Steps, rows: int, total: int) -> None:
        """What this process knows of its share of the batch's exact patching, which is `total` patched runs."""
        of = f".{self.shard.index}-of-{self.shard.count}" if self.shard else ""
        self.store.put(f"{self.name}{of}", steps.effects, {"rows": rows, "total": total, "cost": steps.cost})

    def complete(self) -> bool:
        """Whether nothing of the batch is left to compute."""
        if "applied" in (self.store.about(self.name) or {}):
            return True
        done: dict[tuple[int, int], dict[str, int]] = {}
        for _, about in self._pieces():
            runs = {step: Cost(*cost).patched for step, cost in about["cost"].items()}
            done.setdefault((about["rows"], about["total"]), {}).update(runs)
        return any(sum(runs.values()) == total for (_, total), runs in done.items())

    def _pieces(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names of the files that hold pieces, and what is said of them."""
        for path in sorted(self.store.folder.glob(f"{self.name}*.safetensors")):
            name = path.name.removesuffix(".safetensors")
            about = self.store.about(name)
            if about is not None and "cost" in about:
                yield name, about

    def result(self, setup: Setup) -> Result | None:
        """The batch's result where it is finished; the setup then knows L of its prompts, and its passes."""
        stored = self.store.get(self.name)
        if stored is None or "applied" not in stored[1]:
            return None
        tensors, about = stored
        _assign(setup.passes, about["passes"])
        device = setup.model.device
        setup.seen.update({k[5:]: v.to(device) for k, v in tensors.items() if k.startswith("seen.")})
        scores = {k[6:]: v.to(device) for k, v in tensors.items() if k.startswith("score.")}
        return Result(scores, about["applied"], about["meta"])

    def keep_result(self, setup: Setup, result: Result, seconds: float) -> None:
        """The batch is finished, after so many seconds of this process."""
        seen = {f"seen.{k}": v for k, v in setup.seen.items()}
        scores = {f"score.{k}": v for k, v in result.scores.items()}
        passes = asdict(setup.passes) | {"seconds": setup.passes.seconds + seconds}
        about = {"applied": result.applied, "meta": result.meta, "passes": passes}
        self.store.put(self.name, {**seen, **scores}, about)


def _assign(passes: Passes, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(passes, name, value)
