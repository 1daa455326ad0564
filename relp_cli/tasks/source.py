"""A task's name or path → what it says, and the pairs of its file: all that `relp validate` needs. No torch, no tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from relp_cli.errors import RelpError
from relp_cli.tasks.files import assign_splits, distinct, read_pairs
from relp_cli.tasks.prompt import RawPair
from relp_cli.tasks.records import FILE_ENDINGS
from relp_cli.tasks.spec import NAME_BYTES, TaskSpec, TaskText, content_hash, read_task


@dataclass(frozen=True)
class TaskSource:
    """text: the checked task. fixed: the pairs of its file, each once and with its split (empty for templates).
    notes: on how splits were decided, and on copies.
    """

    text: TaskText
    fixed: tuple[RawPair, ...] = ()
    notes: tuple[str, ...] = ()


def read_source(name_or_path: str | Path) -> TaskSource:
    """A shipped task ("ioi"), a task YAML, or a file of pairs (.jsonl, .json, .csv).

    Raises: RelpError, one line `file:line: key: what was expected`; unknown names with the nearest shipped one.
    """
    path = Path(name_or_path)
    if path.suffix not in FILE_ENDINGS:
        text = read_task(name_or_path)
        return TaskSource(text) if text.spec.pairs is None else _with_pairs(text, text.path.parent / text.spec.pairs)
    if not path.is_file():
        raise RelpError(f"{path}: no such file")
    raws = read_pairs(path)
    sets = any(len(ids) > 1 for raw in raws for ids in raw.outcome_ids or (raw.pair.answer, raw.pair.foil))
    spec = TaskSpec(name=_name_of(path), metric="prob_diff" if sets else "logit_diff", pairs=path.name)
    return _with_pairs(TaskText(spec, path, content_hash([path])), path, raws)


def _with_pairs(text: TaskText, path: Path, raws: list[RawPair] | None = None) -> TaskSource:
    raws, copies = distinct(read_pairs(path) if raws is None else raws)
    if text.spec.join is not None:
        raws = [raw if raw.join is not None else replace(raw, join=text.spec.join) for raw in raws]
    raws, splits = assign_splits(raws)
    return TaskSource(text, tuple(raws), tuple(note for note in (splits, copies) if note))


def _name_of(path: Path) -> str:
    """A task name out of a file's: what a name may not have becomes `_`."""
    name = re.sub(r"[^\w.-]+|\.{2,}", "_", path.stem).encode()[:NAME_BYTES].decode(errors="ignore")
    return name if name[:1].isalnum() else f"pairs{name}"[:NAME_BYTES]
