"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from relp_cli.errors import RelpError, RunFailed


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write to a temporary file beside `path`, flush it to disk, and rename it over `path`.

    Raises: RelpError where the folder cannot be written to, RunFailed where writing fails (a full disk).
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise RelpError(f"cannot write {path}: {error.strerror or error}") from error
    except OSError as error:
        raise RunFailed(f"writing {path} failed: {error.strerror or error}") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def check_writable(folder: Path) -> None:
    """Fail before a long computation, not after it. Raises RelpError where `folder` cannot be created or written to."""
    probe = folder / ".writable"
    created = [p for p in [folder, *folder.parents] if not p.exists()]
    try:
        write_atomically(probe, b"")
    except RunFailed as error:
        raise RelpError(f"output folder {folder} is not writable ({error})") from error
    probe.unlink()
    for made in created:  # nothing half-written stays behind
        made.rmdir()
