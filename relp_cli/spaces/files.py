"""The files of circuits (one readable JSON) and scores (safetensors with a JSON header); a space writes and reads its part."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from relp_cli.errors import RelpError, RunFailed
from relp_cli.files import read_json, write_atomically
from relp_cli.spaces.table import SPACES, space_for, space_of, space_of_file

if TYPE_CHECKING:
    from relp_cli.spaces.circuit import Circuit
    from relp_cli.spaces.scores import Scores

SCHEMA = 1
SIGN = "c(n) = L(patched) − L(run); higher L = more of the original behaviour"


Form = TypeVar("Form", bound=BaseModel)


class _Head(BaseModel):
    """What every circuit file says; the rest is the space's."""

    model_config = ConfigDict(extra="allow", strict=True)

    schema_: int = Field(alias="schema")
    type: str
    meta: dict[str, Any]
    labels: list[str]


def save_circuit(circuit: Circuit, path: str | Path) -> None:
    """Write `path`, atomically: the kept units as columns."""
    content: dict[str, Any] = {
        "schema": SCHEMA, "type": SPACES[circuit.units.space].file, "meta": finite(dict(circuit.meta)),
        "labels": list(circuit.labels), **space_of(circuit.units).columns(circuit),
    }  # fmt: skip
    write_atomically(Path(path), json.dumps(content, indent=1) + "\n")


def load_circuit(path: str | Path) -> Circuit:
    """A circuit file of any space. Raises RelpError for one that is none."""
    content = read_json(path, "circuit file")
    kind = content.get("type") if isinstance(content, dict) else None
    if (
        not isinstance(content, dict)
        or content.get("schema") != SCHEMA
        or kind not in [r.file for _, r in SPACES.items()]
    ):
        raise RelpError(f"circuit file {path}: expected a relp circuit (schema {SCHEMA})")
    try:
        head = validated(_Head, content)
        rest = dict(head.model_extra or {})
        space = space_of_file(head.type)
        _check_texts(head.meta)
        if rest.keys() != (known := rest.keys() & space.file_keys) or rest.keys() < space.file_keys - {"edges"}:
            wrong = sorted(rest.keys() ^ known) or sorted(space.file_keys - rest.keys())
            raise RelpError(f"{wrong[0]}: {'unknown key' if wrong[0] in rest else 'missing key'}")
        circuit = space.read(rest, tuple(head.labels), with_tau(head.meta))
        if circuit.n_nodes != rest[space.count]:
            raise RelpError(f"{space.count} says {rest[space.count]}, but there are {circuit.n_nodes}")
    except RelpError as error:
        raise RelpError(f"circuit file {path}: {error}") from error
    return circuit


def validated(form: type[Form], content: Any, *where: str) -> Form:
    """Content of a file as a pydantic model. Raises RelpError that names the key; where: the keys that lead to it."""
    try:
        return form.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise RelpError(f"{'.'.join([*where, *map(str, first['loc'])])}: {first['msg']}") from error


# What a circuit says of where it came from, and is compared by.
TEXTS = (
    "model", "revision", "task", "task_hash", "method", "metric", "direction", "baseline", "dictionary_hash", "scores",
)  # fmt: skip


def _check_texts(meta: Mapping[str, Any]) -> None:
    for key in TEXTS:
        if not isinstance(meta.get(key), str | None):
            raise RelpError(f"meta.{key}: expected text, got {meta[key]!r:.40}")


def with_tau(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A file's metadata with τ as a number ("inf" in JSON). Raises RelpError for a selection or a τ that is none."""
    selection = meta.get("selection", {})
    if not isinstance(selection, dict):
        raise RelpError(f"meta.selection: expected an object, got {selection!r:.40}")
    if "tau" not in selection:
        return dict(meta)
    try:
        return {**meta, "selection": {**selection, "tau": float(selection["tau"])}}
    except (TypeError, ValueError):
        raise RelpError(f"meta.selection.tau: expected a number, got {selection['tau']!r:.40}") from None


def finite(value: Any) -> Any:
    """JSON has no infinity: τ = inf is written "inf"."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def tensor_hash(*tensors: Tensor) -> str:
    """A short content hash of tensors (float32 values), which ties a circuit to the scores it came from."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_scores(scores: Scores, path: str | Path) -> None:
    """Write one safetensors file, atomically. Tensors are named `kind/mean`; the header is `metadata()['relp']`."""
    space = space_of(scores.units)
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"schema": SCHEMA, "sign": SIGN, "meta": dict(scores.meta), "kinds": {}}
    for key in scores:
        parts, header["kinds"][key] = space.tensors(scores, key)
        tensors |= {f"{key}/{name}": value.detach().cpu().contiguous() for name, value in parts.items()}

    def write(temporary: str) -> None:
        try:
            save_file(tensors, temporary, {"relp": json.dumps(header)})
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomically(Path(path), write)


def load_scores(path: str | Path) -> Scores:
    """Read what `save_scores` wrote. Raises RunFailed for a file that is missing, truncated or of another schema."""
    try:
        with safe_open(str(path), "pt") as stream:
            header = json.loads((stream.metadata() or {}).get("relp", "null"))
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValueError) as error:
        raise RunFailed(f"score file {path} cannot be read ({error}); score again to replace it") from error
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise RunFailed(f"score file {path} was not written by this version of relp (schema {SCHEMA})")
    try:
        entries = {
            key: ({name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{key}/")}, about)
            for key, about in header["kinds"].items()
        }
        if len({tuple(about["labels"]) for _, about in entries.values()}) != 1 or not isinstance(header["meta"], dict):
            raise ValueError("its kinds have different positions")
        return space_for(list(entries)).load().from_tensors(entries, header["meta"])
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, RelpError) as error:
        raise RunFailed(f"score file {path} is damaged ({error}); score again to replace it") from error


def expect(tensors: Mapping[str, Tensor], **shapes: tuple[int | None, ...]) -> None:
    """Raises ValueError for tensors of another shape (None: of any size), or that are not finite, but for variances, which
    one example has none of.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            continue
        actual = tuple(tensors[name].shape)
        if len(actual) != len(shape) or any(want not in (None, got) for want, got in zip(shape, actual, strict=True)):
            raise ValueError(f"{name} has shape {list(actual)}, expected {[n or 'any' for n in shape]}")
        if "variance" not in name and not tensors[name].isfinite().all():
            raise ValueError(f"{name} is not finite")
    if len({len(tensors[name]) for name in ("examples", "present") if name in tensors}) > 1:
        raise ValueError("examples and present are of different lengths")
