"""A run directory: `run.json` (what was asked, what was done, and where it came from) beside its result files.

A result counts as done when run.json names it with a checksum that the file still has. Anything else is redone.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from relp_cli.errors import RelpError, RunFailed
from relp_cli.files import read_json, write_atomically
from relp_cli.runs.folders import instead, near_runs
from relp_cli.tasks.spec import list_tasks

PACKAGES = ("relp-cli", "torch", "transformers", "transformer-lens", "numpy")


@dataclass(frozen=True)
class RunDir:
    """Paths and bookkeeping of one run directory."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def scores(self) -> Path:
        return self.path / "scores.safetensors"

    @property
    def pairs(self) -> Path:
        return self.path / "pairs.json"

    @property
    def circuit(self) -> Path:
        return self.path / "circuit.json"

    @property
    def unfinished(self) -> Path:
        """What an interrupted scoring left; gone when the run is done."""
        return self.path / "unfinished"

    @property
    def clusters(self) -> Path:
        return self.path / "clusters"

    def exists(self) -> bool:
        return self.record.is_file()

    def read(self) -> dict[str, Any]:
        """run.json. Raises RelpError where there is none, RunFailed where it is not readable."""
        if self.path.is_file():
            raise RelpError(f"'{self.path}' is a file; expected a run directory, which `relp score` makes")
        if not self.path.is_dir():
            also = "`relp ls runs` lists runs, `relp score` makes one"
            like = near_runs(str(self.path))
            raise RelpError(f"run '{self.path}' does not exist{like}{'' if like else ';'} {also}")
        if not self.record.is_file():
            raise RelpError(f"'{self.path}' is not a run directory (it has no run.json){instead(self.path)}")
        try:
            content = read_json(self.record, "run record")
        except RelpError as error:
            if isinstance(error.__cause__, OSError):
                raise
            raise RunFailed(f"{error}; score again to replace it") from error
        parts = {"spec": dict, "hash": str, "files": dict, "scores": dict}
        if not isinstance(content, dict) or not all(isinstance(content.get(k), t) for k, t in parts.items()):
            raise RunFailed(f"run record {self.record} was not written by relp; score again to replace it")
        return content

    def is_done(self, digest: str) -> bool:
        """Whether this directory holds the verified scores of that content hash.

        Raises: RelpError if it holds another run's.
        """
        if not self.exists():
            return False
        try:
            content = self.read()
        except RunFailed:
            return False  # an interrupted or damaged record: redo
        if content["hash"] != digest:
            spec = ", ".join(str(content["spec"].get(k)) for k in ("task", "model", "method"))
            raise RelpError(
                f"{self.path} holds another run ({spec}, hash {content['hash']}, not {digest}): another request, or its "
                "task or model has changed since; choose another --output or delete it"
            )
        return self.scores.is_file() and content["files"].get(self.scores.name) == checksum(self.scores)

    def write(self, content: dict[str, Any]) -> None:
        """Write run.json, last of all files: what it lists is complete."""
        files = {path.name: checksum(path) for path in (self.scores, self.pairs) if path.is_file()}
        record = {**content, "files": files}
        write_atomically(self.record, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def is_run(name: str) -> bool:
    """Whether `relp show NAME` means a run: a folder with a run.json, unless a shipped task has that name (./NAME is the run)."""
    return name not in list_tasks() and RunDir(Path(name)).exists()


def checksum(path: Path) -> str:
    """sha256 of a file. Raises RelpError for one that cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise RelpError(f"{path} cannot be read: {error.strerror}") from error


def provenance() -> dict[str, Any]:
    """Versions, platform, time, command line, and the GPU that a worker was given."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["relp", *sys.argv[1:]]) if Path(sys.argv[0]).stem == "relp" else "python",
        "python": platform.python_version(),
        "platform": platform.platform(),
        **({} if gpu is None else {"cuda_visible_devices": gpu}),
        "versions": {name: package_version(name) for name in PACKAGES},
    }


def package_version(name: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
