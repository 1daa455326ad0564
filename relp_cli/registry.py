"""Name → object, with did-you-mean. Every table of rows (methods, rules, node kinds, families, metrics) is one of these."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from relp_cli.errors import RelpError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """An ordered table of named rows.

    Raises: RelpError on an unknown name (with the nearest valid one) and on a name registered twice.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._rows: dict[str, T] = {}

    def add(self, name: str, row: T) -> T:
        if name in self._rows:
            raise RelpError(f"{self.what} '{name}' is registered twice")
        self._rows[name] = row
        return row

    def __getitem__(self, name: str) -> T:
        if not isinstance(name, str):
            raise RelpError(
                f"expected the name of a {self.what} ({', '.join(self._rows)}), got a {type(name).__name__}"
            )
        if name not in self._rows:
            raise unknown(self.what, name, self._rows)
        return self._rows[name]

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def items(self) -> list[tuple[str, T]]:
        return list(self._rows.items())


def load(where: str) -> Any:
    """What a row names as `module:object`, imported."""
    module, name = where.split(":")
    return getattr(importlib.import_module(module), name)
