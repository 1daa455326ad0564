"""What is known of a scoring that has not ended: kept in a folder, so that the same request goes on where it was interrupted.

A file a batch. It holds the batch's result, or, while it is worked on step by step, what is known so far. Files
are written when `EVERY` seconds have passed, so that short runs write nothing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from relp_cli.files import write_atomically
from relp_cli.methods.setup import Passes, Setup
from relp_cli.methods.table import Result

EVERY, REST = 10.0, 20.0  # from one writing to the next: seconds, and times as long as it took; the longer of the two


@dataclass
class Unfinished:
    """The folder of one request, whose content hash is `digest`: files of another one are not read."""

    folder: Path
    digest: str
    _waiting: dict[Path, tuple[dict[str, Tensor], str]] = field(default_factory=dict)  # not made into bytes in vain
    _next: float = field(default_factory=lambda: time.monotonic() + EVERY)

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() >= self._next

    def put(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep one file's content; it is written when it is time."""
        content = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        path = self.folder / f"{name}.safetensors"
        self._waiting[path] = content, json.dumps(about)
        if not self.due():
            return
        started = time.monotonic()
        for path, (content, about_it) in self._waiting.items():
            write_atomically(path, save(content, {"digest": self.digest, "about": about_it}))
        self._waiting.clear()
        ended = time.monotonic()
        self._next = ended + max(EVERY, REST * (ended - started))

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept under a name; None where there is nothing, or nothing of this request."""
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as stored:
                head = stored.metadata() or {}
                if head.get("digest") != self.digest:
                    return None
                return {key: stored.get_tensor(key) for key in stored.keys()}, json.loads(head["about"])  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError):
            return None  # not there, or damaged: done again

    def clear(self) -> None:
        """The request is finished."""
        self._waiting.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def of(self, number: int) -> UnfinishedBatch:
        return UnfinishedBatch(self, f"batch-{number:05d}")


@dataclass
class UnfinishedBatch:
    """One batch's file. Passes that it took are kept with it, so that costs are those of the whole."""

    store: Unfinished
    name: str

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

    def keep_result(self, setup: Setup, result: Result) -> None:
        """The batch is finished."""
        seen = {f"seen.{k}": v for k, v in setup.seen.items()}
        scores = {f"score.{k}": v for k, v in result.scores.items()}
        about = {"applied": result.applied, "meta": result.meta, "passes": asdict(setup.passes)}
        self.store.put(self.name, {**seen, **scores}, about)


def _assign(passes: Passes, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(passes, name, value)
