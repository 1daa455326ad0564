"""Specs from user input, with validation errors as one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from relp_cli.errors import RelpError, nearest
from relp_cli.runs.spec import ScoreSpec


def score_spec(where: str = "", **values: Any) -> ScoreSpec:
    """A ScoreSpec. Raises RelpError with one line that names the option, what was expected, and the nearest name."""
    try:
        return ScoreSpec(**values)
    except ValidationError as error:
        raise RelpError(where + one_line(error)) from error


def one_line(error: ValidationError) -> str:
    """The first complaint of a validation error, with the nearest valid name."""
    first = error.errors()[0]
    name = ".".join(str(p) for p in first["loc"])
    if first["type"] == "literal_error":
        known = [k.strip(" '") for k in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{name}: unknown value '{first['input']}'{nearest(str(first['input']), known)}"
    if first["type"] == "extra_forbidden":
        return f"unknown key '{name}'{nearest(name, ScoreSpec.model_fields)}"
    return f"{name}: {first['msg']} (got {first['input']!r})"


def distinct(what: str, names: Sequence[Any]) -> None:
    """Raises RelpError for a name that is there twice: its rows could not be told apart."""
    for name, count in Counter(names).items():
        if count > 1:
            raise RelpError(f"{what} '{name}' is given {count} times; expected each once")


def model_labels(models: Sequence[str]) -> dict[str, str]:
    """What tables call each model: a folder's name, or the path as it was typed where two folders have one name.

    Raises: RelpError for a model that is there twice.
    """
    distinct("model", [str(Path(m).expanduser().resolve()) if Path(m).expanduser().is_dir() else m for m in models])
    names = {m: Path(m).name if Path(m).is_dir() else m for m in models}
    count = Counter(names.values())
    return {m: name if count[name] == 1 else m for m, name in names.items()}


def file_label(name: str) -> str:
    """A model's or task's label as part of a file name: `./a/m` → `a_m`."""
    return "_".join(part for part in name.split("/") if part not in ("", ".", "..", "~")) or "model"
