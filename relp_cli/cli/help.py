"""`--help` at any width: typer crops what has no space to break at, such as a default of several names; it is folded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.text import Text


def fold_help() -> None:
    """Have typer write an option's help, default and `[required]` as lines that fold where they do not fit."""
    from typer import rich_utils

    rich_utils.Columns = _folded  # type: ignore[assignment, misc]


def _folded(items: Sequence[Any]) -> Any:
    if not all(isinstance(item, Text) for item in items):
        return Group(*items)
    text = Text(" ", overflow="fold").join(items)
    text.overflow = "fold"
    return text
