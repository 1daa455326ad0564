"""Specs from user input, with validation errors as one line."""

from __future__ import annotations

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
