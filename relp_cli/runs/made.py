"""What made a result file: FOLDER/made/NAME.json holds the command, the versions and the file's checksum.

One note per file, so that two processes that write into one folder do not undo each other's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from relp_cli.errors import RelpError
from relp_cli.files import read_object, write_atomically
from relp_cli.runs.rundir import checksum, provenance


def note_made(path: Path, **about: Any) -> None:
    """Note that this process has just written `path`. about: what else a reader of the file needs to know. A note on the same
    content stays: what was first to make it has made it.
    """
    before = read_made(path)
    if before is not None and all(before.get(k) == json.loads(json.dumps(v, default=str)) for k, v in about.items()):
        return
    content = {"sha256": checksum(path), "provenance": provenance(), **about}
    write_atomically(_note(path), json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def read_made(path: Path) -> dict[str, Any] | None:
    """The note on `path`; None where there is none, or the file is not the one that it is on."""
    try:
        content = read_object(_note(path), "note")
    except RelpError:
        return None
    return content if content.get("sha256") == checksum(path) else None


def command_of(path: Path) -> tuple[str, str]:
    """The command that wrote `path`, and when; of a file that was changed since, or of an older version, that it is not known."""
    said = (read_made(path) or {}).get("provenance", {})
    if "command" not in said:
        return f"{path.name}: changed since it was written, or made by an older version: no command is known", ""
    return str(said["command"]), when(said)


def when(said: dict[str, Any]) -> str:
    """2026-01-02 03:04 UTC"""
    return f"{str(said['created'])[:16].replace('T', ' ')} UTC" if said.get("created") else ""


def _note(path: Path) -> Path:
    return path.parent / "made" / f"{path.name}.json"
