"""A task's name or path → what it says, and the pairs of its file: all that `relp validate` needs. No torch, no tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from relp_cli.errors import RelpError, unknown
from relp_cli.tasks.files import assign_splits, distinct, read_pairs
from relp_cli.tasks.mapped import mapped_pairs
from relp_cli.tasks.mib import MibData, is_mib, read_mib, shared_prompts
from relp_cli.tasks.prompt import RawPair
from relp_cli.tasks.records import FILE_ENDINGS, read_records
from relp_cli.tasks.spec import NAME_BYTES, TaskSpec, TaskText, content_hash, list_tasks, read_task


@dataclass(frozen=True)
class TaskSource:
    """text: the checked task. fixed: the pairs of its file, each once and with its split (empty for templates).
    notes: on how splits were decided, and on copies.
    """

    text: TaskText
    fixed: tuple[RawPair, ...] = ()
    notes: tuple[str, ...] = ()


def read_source(name_or_path: str | Path) -> TaskSource:
    """A shipped task ("ioi"), a task YAML, a file of pairs (.jsonl, .json, .csv, .parquet), or a data set of MIB's: such a
    file or a folder of them, whose `train` is for discovery.

    Raises: RelpError, one line `file:line: key: what was expected`; unknown names with the nearest shipped one.
    """
    path = Path(name_or_path)
    if name_or_path and path.is_dir() and str(name_or_path) not in list_tasks():  # "" is a name that was left out
        return mib_source(read_mib(path))
    if path.suffix not in FILE_ENDINGS:
        text = read_task(name_or_path)
        return TaskSource(text) if text.spec.pairs is None else _with_pairs(text, text.path.parent / text.spec.pairs)
    if not path.is_file():
        raise RelpError(f"{path}: no such file")
    if is_mib(read_records(path)[0][1]):
        return mib_source(read_mib(path))
    spec = TaskSpec(name=_name_of(path), pairs=path.name)
    return _with_pairs(TaskText(spec, path, content_hash([path])), path)


def check_source(name_or_path: str | Path) -> None:
    """What `read_source` refuses of a task's text, without reading a file of pairs; for verbs that import torch afterwards.

    Raises: RelpError, as `read_source`.
    """
    path = Path(name_or_path)
    if not name_or_path or not path.is_dir():
        if path.suffix not in FILE_ENDINGS:
            read_task(name_or_path)
        elif not path.is_file():
            raise RelpError(f"{path}: no such file")


def mib_source(data: MibData, heldout: str | None = None) -> TaskSource:
    """A data set of MIB's as a task: `train` (or its first split) is for discovery, and `heldout`, or else the next, held out.

    Raises: RelpError for a split that it does not have.
    """
    first, *known = data.splits or ("", "")
    if heldout is not None and not data.splits:
        raise RelpError(f"{data.name}: no split '{heldout}': its file names tell none (train, validation, test)")
    if heldout is not None and heldout not in known:
        raise unknown("split", heldout, known, f"{data.name}: ")
    name = _name_of(Path(data.name))
    about = f"{data.form.name}, {data.form.column}"
    spec = TaskSpec(name=name, description=f"MIB: {about}", pairs=data.files[0].name, unusable="drop")
    text = TaskText(spec, data.files[0], content_hash(list(data.files)))
    sides = {first: "discovery", heldout or known[0]: "heldout"}
    notes = [f"MIB's {about}"]
    if data.without[0]:
        notes.append(f"{data.without[0]} of {data.without[1]} rows have no {data.form.column} and are left out")
    if not data.splits:
        raws, copies = distinct(data.pairs)
        raws, splits = assign_splits(raws)
        return TaskSource(text, tuple(raws), tuple(note for note in (*notes, splits, copies) if note))
    raws = [replace(raw, split=sides[raw.split]) for raw in data.pairs if raw.split in sides]
    parts = [distinct([raw for raw in raws if raw.split == side]) for side in sides.values()]
    names = ", ".join(f"{split} for {side}" for split, side in sides.items())
    notes += [f"splits as given by MIB: {names}", *(copies for _, copies in parts if copies)]
    if count := shared_prompts(*(found for found, _ in parts)):
        notes.append(
            f"WARNING: {count} of {len(parts[1][0])} held-out pairs have a prompt that the discovery pairs have too"
        )
    return TaskSource(text, tuple(raw for found, _ in parts for raw in found), tuple(notes))


def _with_pairs(text: TaskText, path: Path) -> TaskSource:
    spec, chosen = text.spec, ""
    if spec.columns is None:
        raws = read_pairs(path)
    else:
        raws, chosen = mapped_pairs(read_records(path), spec.columns, text.lists, spec.only, spec.cut)
    raws, copies = distinct(raws)
    if spec.join is not None:
        raws = [raw if raw.join is not None else replace(raw, join=spec.join) for raw in raws]
    if "metric" not in spec.model_fields_set:
        text = replace(text, spec=spec.model_copy(update={"metric": _metric_of(raws)}))
    raws, splits = assign_splits(raws)
    return TaskSource(text, tuple(raws), tuple(note for note in (chosen, splits, copies) if note))


def _metric_of(raws: list[RawPair]) -> str:
    """What sets of answers can be measured with."""
    sets = any(len(ids) > 1 for raw in raws for ids in raw.outcome_ids or (raw.pair.answer, raw.pair.foil))
    return "prob_diff" if sets else "logit_diff"


def _name_of(path: Path) -> str:
    """A task name out of a file's: what a name may not have becomes `_`."""
    name = re.sub(r"[^\w.-]+|\.{2,}", "_", path.stem).encode()[:NAME_BYTES].decode(errors="ignore")
    return name if name[:1].isalnum() else f"pairs{name}"[:NAME_BYTES]
