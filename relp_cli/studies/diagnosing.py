"""`relp diagnose --output DIR`: a diagnosis as files, all rows of its tables, which `relp report DIR` makes a page of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.errors import RunFailed
from relp_cli.evaluation.diagnose import Diagnosis
from relp_cli.files import read_object, write_atomically
from relp_cli.report.tables import read_table, write_table
from relp_cli.runs.made import note_made
from relp_cli.runs.rundir import checksum

RECORD = "diagnosis.json"
TABLES = ("attention", "cancelling", "gradient", "nodes", "causes", "methods")


@dataclass(frozen=True)
class Diagnosed:
    """about: task, model, direction, metric, pairs, the method, what is recommended, floor and summary. tables: by name."""

    about: dict[str, Any]
    tables: dict[str, pd.DataFrame]


def save_diagnosis(folder: Path, found: Diagnosis, about: Mapping[str, Any]) -> list[Path]:
    """Write a CSV per table and, last, diagnosis.json, which has their checksums. Returns the files."""
    files = [folder / f"{name}.csv" for name in TABLES]
    for name, path in zip(TABLES, files, strict=True):
        write_table(getattr(found, name), path)
    content = {
        **about, "diagnosed": found.cheap, "recommended": found.recommended, "floor": found.floor,
        "summary": list(found.summary), "files": {path.name: checksum(path) for path in files},
    }  # fmt: skip
    write_atomically(folder / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    note_made(folder / RECORD)
    return [*files, folder / RECORD]


def read_diagnosis(folder: Path) -> Diagnosed:
    """What `save_diagnosis` wrote. Raises RelpError for what is none, RunFailed for files that were changed since."""
    about = read_object(folder / RECORD, "diagnosis")
    tables = {}
    older = {"causes"} - {
        Path(str(name)).stem for name in about.get("files", ())
    }  # diagnoses of older versions have none
    for name in (name for name in TABLES if name not in older):
        path = folder / f"{name}.csv"
        files = about.get("files")
        if not isinstance(files, dict) or not path.is_file() or files.get(path.name) != checksum(path):
            raise RunFailed(f"{path} is not the file that this diagnosis wrote; diagnose again to replace it")
        tables[name] = read_table(path, may_be_empty=True)
    return Diagnosed(about, tables)
