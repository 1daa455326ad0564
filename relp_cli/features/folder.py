"""What a dictionary's folder holds, read strictly: settings of the expected types, finite tensors in floating point."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from relp_cli import files
from relp_cli.errors import RelpError
from relp_cli.precision import wide

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INFINITE = ("threshold", "topk_threshold")  # a feature with an infinite threshold is never active


class Settings(BaseModel):
    """Settings of a file that others write: what is read has its type, what is not read may be anything."""

    model_config = ConfigDict(extra="ignore", strict=True)


def read_object(path: Path, form: type[BaseModel]) -> dict[str, Any]:
    """A JSON file's object as it is. Raises RelpError, naming the key, for one that is not of this form."""
    content = files.read_object(path)
    try:
        form.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise RelpError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return content


def floats(path: Path, state: Mapping[str, Tensor], counts: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors in float32 at least; `counts` as they are.

    Raises: RelpError for other numbers than floating point (integers, float8), and for values that are not finite.
    """
    for name, tensor in state.items():
        if name in counts:
            continue
        if tensor.dtype not in FLOATS:
            raise RelpError(
                f"dictionary {path}: {name} is {dtype_name(tensor)}; expected {', '.join(map(_name, FLOATS))}"
            )
        if tensor.isnan().any() or (name not in INFINITE and tensor.isinf().any()):
            raise RelpError(f"dictionary {path}: {name} holds values that are not finite")
    return {name: tensor if name in counts else wide(tensor) for name, tensor in state.items()}


def dtype_name(tensor: Tensor) -> str:
    """As people write it: `float32`."""
    return _name(tensor.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def agree(path: Path, said: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises RelpError for the first setting (key → what the file says, what the tensors have) that is another number."""
    for key, (theirs, found) in said.items():
        if theirs is not None and theirs != found:
            raise RelpError(f"{path}: {key} is {theirs}, but the tensors beside it have {found}")
