"""What of the package's annotations tests check at every call: the shapes (the type checker sees to the rest)."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import isfunction
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def shapes(function: Callable) -> Callable:
    """The function, checked where its annotations name shapes."""
    return _check(function) if any("jaxtyping." in str(a) for a in function.__annotations__.values()) else function


def where_named(*, typechecker: Any) -> Callable[[Any], Any]:
    """In place of `jaxtyped`, as the import hook calls it: around those functions alone whose annotations name shapes, as
    its wrapper costs more than most functions. Not around hooks: they are made anew at every pass."""

    def decorate(item: Any) -> Any:
        return item if isfunction(item) and not _named(item) else jaxtyped(item, typechecker=typechecker)

    return decorate


def _named(function: Any) -> bool:
    words = set(re.findall(r"\w+", " ".join(map(str, function.__annotations__.values()))))
    known = function.__globals__
    return "<locals>" not in function.__qualname__ and any("jaxtyping." in str(known.get(word)) for word in words)
