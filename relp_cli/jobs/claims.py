"""Which of several processes at one job folder computes what: claims are files, made by an atomic link.

A claim `name.k` is the k-th of its name; the highest k holds it. Its owner touches it; where it was not touched for
`EXPIRES` seconds of the watcher's own clock, or its process on this machine is gone, the link `name.k+1` takes it over:
links are exclusive, so of several processes one gets it. No clocks of two machines are compared.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from relp_cli.errors import RelpError
from relp_cli.files import read_json

EXPIRES, BEAT, POLL = 60.0, 10.0, 0.5  # seconds: without a sign of life, between two of them, between two looks
MOST_DEATHS = 3  # of processes that held one claim, one after the other: then it is not tried by a further one


@dataclass
class Claims:
    """The claims below one folder, as one process sees them. before: how many there were when deaths began to count."""

    folder: Path
    before: Mapping[str, int] = field(default_factory=dict)
    _seen: dict[Path, tuple[int, float]] = field(default_factory=dict)  # mtime, and when it was first seen

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process holds `name` now; it does until the block is left."""
        path = self._take(name)
        if path is None:
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            for old in self._held(name):  # the highest last: until then it holds
                old.unlink(missing_ok=True)

    def deaths(self, name: str) -> int:
        """How many processes died that held `name`, which this one holds now."""
        return counts(self.folder)[name] - 1 - self.before.get(name, 0)

    def _held(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"{name}.*"), key=_number)

    def _take(self, name: str) -> Path | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        held = self._held(name)
        if held and self._lives(held[-1]):
            return None
        path = self.folder / f"{name}.{_number(held[-1]) + 1 if held else 0}"
        draft = self.folder / f".{uuid4().hex}"
        try:
            draft.write_text(json.dumps({"machine": _machine(), "pid": os.getpid()}))
            os.link(draft, path)
        except (FileExistsError, FileNotFoundError):  # another process was faster, or took the empty folder away: again
            return None
        finally:
            draft.unlink(missing_ok=True)
        return path

    def _lives(self, path: Path) -> bool:
        try:
            touched, owner = path.stat().st_mtime_ns, read_json(path)
        except (OSError, RelpError):
            return True  # released in between: looked at again
        now = time.monotonic()
        seen, since = self._seen.get(path, (None, now))
        if seen != touched:
            since = now
        self._seen[path] = touched, since
        return now - since < EXPIRES and not _gone(owner)


def counts(folder: Path) -> Counter[str]:
    """How many claims there are of each name that is claimed; all but one of a name's are of processes that died."""
    return Counter(path.name.rpartition(".")[0] for path in folder.glob("[!.]*"))


def _number(path: Path) -> int:
    return int(path.name.rpartition(".")[2])


def _machine() -> str:
    """This machine since it was started, and the namespace of its process ids: containers may share the other names."""
    parts = [platform.node()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts)


def _gone(owner: Any) -> bool:
    if not isinstance(owner, dict) or owner.get("machine") != _machine() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with suppress(OSError):
            os.utime(path)
