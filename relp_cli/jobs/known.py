"""What a job's names stand for, known without loading a model: from its folder's content, or from what was noted when it
was loaded for this job (JOB/models/<hash>.json), so that finished cells need neither the model nor its folder. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from relp_cli import __version__
from relp_cli.errors import RelpError
from relp_cli.files import read_json, write_atomically
from relp_cli.jobs.grid import Cell, Group, JobSpec, cell_file, score_spec_of, unloaded_file
from relp_cli.models.folder import content_hash, local_path, split_revision
from relp_cli.tasks.source import read_source
from relp_cli.tasks.spec import TaskText


@dataclass
class Known:
    """Identities of one job's groups. `noted`: models that are not on this disk, whose noted content is taken.

    trusting: what only a loaded model can tell, its dictionaries' content, is taken as it was noted: for looking at results.
    """

    job: JobSpec
    folder: Path
    trusting: bool = False
    noted: set[str] = field(default_factory=set)
    _tasks: dict[str, TaskText] = field(default_factory=dict)
    _here: dict[str, str | None] = field(default_factory=dict)

    def path(self, cell: Cell) -> Path | None:
        """The file of a cell; None where only loading its model can tell."""
        identity = self.identity(cell.group)
        return None if identity is None else self.folder / "cells" / cell_file(self.job, cell, identity)

    def unloaded(self, cell: Cell) -> Path:
        """The file of a cell whose model or task does not load."""
        return self.folder / "cells" / unloaded_file(self.job, cell)

    def identity(self, group: Group) -> dict[str, str] | None:
        """`identity_of` this group; None where the model is not on this disk and was never loaded for this job."""
        dictionary = self._noted(group.model).get("dictionary") if self.trusting else None
        if self.job.dictionary and dictionary is None:  # its content hash is per site of the loaded model
            return None
        try:
            revision, task = self.revision(group.model), self.task(group.task)
        except RelpError:
            return None  # said by the cells, when they are run
        if not revision:
            return None
        metric = score_spec_of(self.job, group, self.job.methods[0]).metric or task.spec.metric
        return identity_of(task.hash, metric, revision, dictionary)

    def task(self, name: str) -> TaskText:
        """Raises RelpError for a task that is not there, or is none."""
        if name not in self._tasks:
            self._tasks[name] = read_source(name).text
        return self._tasks[name]

    def revision(self, model: str) -> str | None:
        """The content hash of a model's folder, or what was noted of a model that is not there."""
        if model not in self._here:
            try:
                path = local_path(split_revision(model, None)[0])
            except RelpError:
                path = None
            self._here[model] = None if path is None else content_hash(path)
        if self._here[model] is None and (noted := self._noted(model).get("revision")) is not None:
            self.noted.add(model)
            return noted
        return self._here[model]

    def note(self, model: str, identity: dict[str, str]) -> None:
        """A model was loaded, and is what `identity` says."""
        content = {"model": model} | {name: identity[name] for name in ("revision", "dictionary") if name in identity}
        if self._noted(model) != content:
            write_atomically(self._note(model), json.dumps(content) + "\n")

    def _note(self, model: str) -> Path:
        name = model + (f"\n{self.job.dictionary}" if self.job.dictionary else "")
        return self.folder / "models" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"

    def _noted(self, model: str) -> dict[str, str]:
        try:
            content = read_json(self._note(model))
        except RelpError:
            return {}
        return content if isinstance(content, dict) and content.get("model") == model else {}


def identity_of(task_hash: str, metric: str, revision: str, dictionary: str | None = None) -> dict[str, str]:
    """What the names in a cell stand for; part of its hash."""
    names = {"task_hash": task_hash, "revision": revision, "metric": metric, "relp": __version__}
    return names | ({"dictionary": dictionary} if dictionary else {})
