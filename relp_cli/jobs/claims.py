"""Which of several processes at one job folder computes what: claims are files that only one of them can make.

A claim `name.k` is the k-th of its name; the highest k holds it. Its owner adds to it; where nothing was added for
`EXPIRES` seconds of the watcher's own clock, or its process on this machine is gone, the file `name.k+1` takes it over:
creation is exclusive (O_EXCL, which file systems without hard links have too), so of several processes one gets it. No clocks of
two machines are compared. An owner that was stopped for longer than that finds its claim `lost` when it goes on.
"""

from __future__ import annotations

import errno
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

from relp_cli.errors import RelpError
from relp_cli.files import create_once

EXPIRES, BEAT, POLL = 60.0, 10.0, 0.5  # seconds: without a sign of life, between two of them, between two looks
MOST_DEATHS = 3  # of processes that held one claim, one after the other: then it is not tried by a further one
# What this process holds, by folder and name: the claim's file, and the process's id.
_ours: dict[tuple[Path, str], tuple[Path, int]] = {}


@dataclass
class Claims:
    """The claims below one folder, as one process sees them. before: how many there were when deaths began to count."""

    folder: Path
    before: Mapping[str, int] = field(default_factory=dict)
    _seen: dict[Path, tuple[tuple[int, int], float]] = field(default_factory=dict)  # mtime and size, and since when

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process holds `name` now; it does until the block is left, or until the claim is `lost`.

        Raises: RelpError where claims cannot be made or read, RunFailed on a full disk.
        """
        path = self._take(name)
        if path is None:
            yield False
            return
        _ours[self.folder, name] = path, os.getpid()
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            del _ours[self.folder, name]
            for old in self._held(name):  # ours last: until then it holds; higher ones took it over
                if _number(old) <= _number(path):
                    old.unlink(missing_ok=True)

    def lost(self, name: str) -> bool:
        """Whether another process has taken over what this one claimed, which was stopped for a while."""
        held = self._held(name)
        return not held or held[-1] != _ours[self.folder, name][0]

    def deaths(self, name: str) -> int:
        """How many processes died that held `name`, which this one holds now."""
        return counts(self.folder)[name] - 1 - self.before.get(name, 0)

    def _held(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"{name}.*"), key=_number)

    def _take(self, name: str) -> Path | None:
        held = self._held(name)
        if held and self._lives(held[-1]):
            return None
        path = self.folder / f"{name}.{_number(held[-1]) + 1 if held else 0}"
        owner = {"machine": _machine(), "pid": os.getpid()}
        return path if create_once(path, json.dumps(owner)) else None

    def _lives(self, path: Path) -> bool:
        try:
            # Opened first: file servers are asked anew then, else this machine's cache may tell.
            with path.open("rb") as stream:
                status, text = os.fstat(stream.fileno()), stream.read()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return True  # released in between: looked at again
            raise RelpError(f"claim {path} cannot be read: {error.strerror}; what it is of cannot be shared") from error
        now, sign = time.monotonic(), (status.st_mtime_ns, status.st_size)
        seen, since = self._seen.get(path, (None, now))
        if seen != sign:
            since = now
        self._seen[path] = sign, since
        return now - since < EXPIRES and not _gone(text)


def release() -> None:
    """Give back at once what this process holds: it ends without leaving its blocks."""
    for path, pid in list(_ours.values()):
        if pid == os.getpid():  # no child's, which has our memory
            with suppress(OSError):
                path.unlink(missing_ok=True)


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


def _gone(text: bytes) -> bool:
    """Whether the owner's process is of this machine, and is no more; of an owner that died before it said who it is, unknown."""
    try:
        owner = json.loads(text)
    except ValueError:
        return False
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
    """Say that the owner lives. Not by the time alone: some file systems take a new one without a word, and keep the old."""
    while not stop.wait(BEAT):
        with suppress(OSError):
            handle = os.open(path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(handle, b"\n")
            except OSError:  # a full disk
                os.utime(path)
            finally:
                os.close(handle)
