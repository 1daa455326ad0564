"""What a job's names stand for, known without loading a model: from its folder's content, or from what was noted when it
was loaded for this job (JOB/models/<hash>.json), so that finished cells need neither the model nor its folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from relp_cli import __version__
from relp_cli.errors import RelpError
from relp_cli.files import read_json, write_atomically
from relp_cli.models.folder import content_hash, local_path, split_revision
from relp_cli.runs.job import Cell, Group, JobSpec, cell_file, score_spec_of, unloaded_file
from relp_cli.tasks.task import Task, load_task


@dataclass
class Known:
    """Identities of one job's groups. `noted`: models that are not on this disk, whose noted content is taken."""

    job: JobSpec
    folder: Path
    noted: set[str] = field(default_factory=set)
    _tasks: dict[str, Task] = field(default_factory=dict)
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
        if self.job.dictionary:  # its content hash is per site of the loaded model
            return None
        try:
            revision, task = self.revision(group.model), self._task(group)
        except RelpError:
            return None  # said by the cells, when they are run
        return (
            identity_of(task, score_spec_of(self.job, group, self.job.methods[0]).metric, revision)
            if revision
            else None
        )

    def revision(self, model: str) -> str | None:
        """The content hash of a model's folder, or what was noted of a model that is not there."""
        if model not in self._here:
            try:
                path = local_path(split_revision(model, None)[0])
            except RelpError:
                path = None
            self._here[model] = None if path is None else content_hash(path)
        if self._here[model] is None and (noted := self._noted(model)) is not None:
            self.noted.add(model)
            return noted
        return self._here[model]

    def note(self, model: str, identity: dict[str, str]) -> None:
        """A model was loaded, and is what `identity` says."""
        revision = identity["revision"]
        if self._noted(model) != revision:
            write_atomically(self._note(model), json.dumps({"model": model, "revision": revision}) + "\n")

    def _note(self, model: str) -> Path:
        return self.folder / "models" / f"{hashlib.sha256(model.encode()).hexdigest()[:16]}.json"

    def _noted(self, model: str) -> str | None:
        try:
            content = read_json(self._note(model))
        except RelpError:
            return None
        return content.get("revision") if isinstance(content, dict) and content.get("model") == model else None

    def _task(self, group: Group) -> Task:
        if group.task not in self._tasks:
            self._tasks[group.task] = load_task(group.task)
        return self._tasks[group.task].with_ids_of(self.job.ids_of)


def identity_of(task: Task, metric: str | None, revision: str) -> dict[str, str]:
    """What the names in a cell stand for; part of its hash."""
    return {"task_hash": task.hash, "revision": revision, "metric": metric or task.metric, "relp": __version__}
