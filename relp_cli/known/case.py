"""A case: a folder with a model, pairs of prompts and the circuit that is right. Reading its description imports no torch.

config.json, model.safetensors  an ordinary Hugging Face model folder: `relp score pairs.jsonl --model FOLDER` works
pairs.jsonl                     pairs of token ids; all positions have one role, so that a score is of a component at all of them
case.json                       the circuit: heads and MLPs ("a0.h1", "m1"), and edges ("a0.h1->a1.h2<k>") where they are known
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from relp_cli.errors import RelpError, nearest
from relp_cli.files import read_object, write_atomically
from relp_cli.known.program import Pair

CASES = Path(__file__).parent / "cases"
CASE, PAIRS = "case.json", "pairs.jsonl"
ROLE = "all"


class _Content(BaseModel):
    """What case.json holds. edges: null where only the nodes are known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    about: str
    made: str
    nodes: tuple[str, ...]
    edges: tuple[str, ...] | None = None
    metric: str = "logit_diff"


@dataclass(frozen=True)
class Case:
    """kind: compiled, trained or imported. made: the command that made it, or what it was imported from.

    nodes: heads and MLPs of the circuit. edges: `writer->reader`, or None where they are not known.
    """

    name: str
    kind: str
    about: str
    made: str
    nodes: tuple[str, ...]
    edges: tuple[str, ...] | None
    metric: str
    folder: Path

    @property
    def pairs(self) -> Path:
        return self.folder / PAIRS


def case_names() -> list[str]:
    """Names of the cases that ship with the package."""
    return sorted(path.parent.name for path in CASES.glob(f"*/{CASE}"))


def read_case(name: str) -> Case:
    """A shipped case by name, or the case of a folder.

    Raises: RelpError for an unknown name (with the nearest), and for a folder whose case.json is missing or is none.
    """
    folder = Path(name).expanduser()
    if name in case_names():
        folder = CASES / name
    elif not folder.is_dir():
        raise RelpError(f"known circuit '{name}' is no shipped case or folder{nearest(name, case_names())}")
    path = folder / CASE
    if not path.is_file():
        raise RelpError(f"folder {folder} has no {CASE}; expected a case as `relp import` writes it")
    try:
        content = _Content(**read_object(path, "case"))
    except ValidationError as error:
        first = error.errors()[0]
        raise RelpError(f"case {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if not content.nodes:
        raise RelpError(f"case {path}: nodes: expected at least one head or MLP of the circuit")
    return Case(**content.model_dump(), folder=folder)


def write_case(case: Case, pairs: Sequence[Pair]) -> None:
    """Writes pairs.jsonl and, last, case.json beside a model's files."""
    write_atomically(case.folder / PAIRS, "".join(json.dumps(_record(pair)) + "\n" for pair in pairs))
    content = {name: value for name, value in asdict(case).items() if name != "folder"}
    write_atomically(case.folder / CASE, json.dumps(content, indent=1) + "\n")


def _record(pair: Pair) -> dict[str, object]:
    return {
        "original_ids": pair.original, "patch_ids": pair.patch, "answer_id": pair.answer, "foil_id": pair.foil,
        "roles": [ROLE] * len(pair.original),
    }  # fmt: skip
