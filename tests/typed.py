"""What of the package's annotations tests check at every call: the shapes (the type checker sees to the rest)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import wraps
from inspect import isclass, isfunction
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError, jaxtyped

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def shapes(*, typechecker: Any) -> Callable[[Any], Any]:  # noqa: ARG001 - the import hook names one
    """In place of `jaxtyped`, as the import hook calls it: around those functions alone whose annotations name shapes, and
    with one check for arguments and result: its own wrapper costs more than most functions."""
    return _checked


def _checked(item: Any) -> Any:
    if isclass(item) and is_dataclass(item):
        item.__init__ = _checked(item.__init__)  # type: ignore[misc]
    if not isfunction(item) or not _named(item):
        return item
    checked = _check(item)

    @wraps(item)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):  # axes of one name are of one size in one call
            try:
                return checked(*args, **kwargs)
            except BeartypeCallHintViolation as error:
                raise TypeCheckError(str(error)) from error

    return call


def _named(function: Any) -> bool:
    """Whether its annotations name shapes. Hooks' do not count: they are made anew at every pass."""
    words = set(re.findall(r"\w+", " ".join(map(str, function.__annotations__.values()))))
    known = function.__globals__
    return "<locals>" not in function.__qualname__ and any("jaxtyping." in str(known.get(word)) for word in words)
