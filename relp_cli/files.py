"""Writing files so that a reader never sees half of one, and reading JSON without surprises."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from relp_cli.errors import BAD_PLACE, RelpError, RunFailed

TEMPORARY = (".relp-", ".tmp")
OLD = 3600.0  # seconds
MOST_DIGITS = 300  # of a number in a file; Python itself refuses integers of more than 4300


def write_atomically(path: Path, content: bytes | str | Callable[[str], None]) -> None:
    """Write to a temporary file beside `path`, flush it to disk, and rename it over `path`.

    content: or what writes it into a file of the name that it is given; nothing else then holds it as bytes.
    Raises: RelpError where `path` cannot be a file of ours, RunFailed where writing fails (a full disk).
    """
    check_file_writable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_temporary(path.parent) as (handle, temporary):
            remove_stale(path.parent, os.fstat(handle).st_mtime)
            if callable(content):
                content(temporary)
            else:
                with os.fdopen(handle, "wb", closefd=False) as stream:
                    stream.write(content.encode() if isinstance(content, str) else content)
            os.fsync(handle)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except OSError as error:
        raise _write_error(path, error) from error


def create_once(path: Path, content: str) -> bool:
    """Make a file that is not there. Whether this process made it: of several at a time, one does.

    By O_EXCL alone, as there are file systems without hard links: another process may see the file while it is still empty, and
    finds it so where its maker died.
    Raises: RelpError where `path` cannot be a file of ours, RunFailed where writing fails (a full disk).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except (FileExistsError, FileNotFoundError):  # not found: another process took the empty folder away again
        return False
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        os.write(handle, content.encode())
        os.fsync(handle)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _write_error(path, error) from error
    finally:
        os.close(handle)
    return True


def check_writable(path: Path) -> None:
    """Fail before a long computation, not after it. Nothing is written: another process may be at the same folder.

    path: a folder, or a file to be, with any of its parents missing.
    Raises: RelpError where it cannot be made or written to.
    """
    there, missing = path, list[str]()
    try:
        while not there.exists():
            missing.append(there.name)
            if there == there.parent:
                raise FileNotFoundError(errno.ENOENT, "the working folder was deleted")
            there = there.parent
        longest = os.pathconf(there, "PC_NAME_MAX")
    except OSError as error:
        raise _write_error(path, error) from error
    reason = ""
    if ".." in missing:
        reason = f"'..' stands after a folder that does not exist ({there / missing[-1]})"
    elif any(len(os.fsencode(name)) > longest for name in missing):
        reason = f"a name is longer than {longest} bytes"
    elif missing and not there.is_dir():
        reason = f"{there} is not a folder"
    elif not os.access(there if there.is_dir() else there.parent, os.W_OK | os.X_OK):
        reason = f"{there} is not writable"
    if reason:
        raise RelpError(f"cannot write {path}: {reason}")


def check_file_writable(path: Path) -> None:
    """As `check_writable`, for what is to be a file. Raises: RelpError also where a folder has its name."""
    check_writable(path)
    if path.is_dir():
        raise RelpError(f"cannot write {path}: it is a folder; expected the name of a file")


def remove_stale(folder: Path, now: float) -> None:
    """Remove what killed processes left half-written in a folder. A living process's file is locked and stays.

    Of other machines, only what is older than OLD at `now`, the clock of the folder's file system: their locks may not be seen
    here (Lustre's and NFS's are of one machine, where they are mounted with localflock, local_lock or nolock).
    """
    for entry in list(os.scandir(folder)):
        if not (entry.name.startswith(TEMPORARY[0]) and entry.name.endswith(TEMPORARY[1])):
            continue
        with suppress(OSError):  # locked, or renamed by its owner in between
            if not entry.name.startswith(_own_prefix()) and now - entry.stat().st_mtime < OLD:
                continue
            handle = os.open(entry.path, os.O_WRONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)
            finally:
                os.close(handle)


def _own_prefix() -> str:
    """What this machine's temporary files begin with."""
    return f"{TEMPORARY[0]}{hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]}-"


@contextmanager
def _locked_temporary(folder: Path) -> Iterator[tuple[int, str]]:
    """An open temporary file that says by its lock that its writer lives; gone afterwards, unless it was renamed."""
    while True:
        handle, name = tempfile.mkstemp(dir=folder, prefix=_own_prefix(), suffix=TEMPORARY[1])
        with suppress(OSError):  # a file system without locks: then nothing counts as stale
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else taken for a stale one before it was locked
            break
        os.close(handle)
    try:
        yield handle, name
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)
        os.close(handle)


def _write_error(path: Path, error: OSError) -> RelpError:
    if error.errno in BAD_PLACE:
        return RelpError(f"cannot write {path}: {error.strerror}")
    if error.errno == errno.ENOENT:
        return RunFailed(f"writing {path} failed: its folder was deleted meanwhile")
    return RunFailed(f"writing {path} failed: {error.strerror or error}")


def read_json(path: str | Path, what: str = "file") -> Any:
    """The content of a JSON file; `what` names it in errors.

    Raises: RelpError for one that cannot be opened, or with a key twice, numbers of too many digits or too deep nesting
    (which other readers accept in different ways), or that is not JSON.
    """
    return parse_json(read_text(path, what), f"{what} {path}")


def read_object(path: str | Path, what: str = "file") -> dict[str, Any]:
    """The object of a JSON file that others wrote. Raises RelpError for one that cannot be read, or holds something else."""
    content = read_json(path, what)
    if not isinstance(content, dict):
        raise RelpError(f"{what} {path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_text(path: str | Path, what: str) -> str:
    """The content of a UTF-8 file; `what` names it in errors. Raises RelpError for one that cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RelpError(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def lines_of(path: str | Path, what: str) -> list[str]:
    """The lines of a UTF-8 file that hold anything. Raises RelpError for one without any, and as `read_text`."""
    lines = [line for line in read_text(path, what).split("\n") if line.strip()]
    if not lines:
        raise RelpError(f"{what} {path} has no text")
    return lines


def parse_json(text: str, where: str) -> Any:
    """JSON text as `read_json` takes it; `where` names its place in errors."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise RelpError(f"{where}: duplicate key '{twice}'")
        return values

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise RelpError(f"{where}: a number of {len(digits)} digits ({digits[:12]}…)")
        return int(digits)

    try:
        return json.loads(text, object_pairs_hook=once, parse_int=whole)
    except RecursionError:
        raise RelpError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise RelpError(f"{where} is not valid JSON ({error})") from error
