"""What of the package's annotations tests check at every call: the shapes (the type checker sees to the rest)."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def shapes(function: Callable) -> Callable:
    """The function, checked where its annotations name shapes. Not hooks: they are made anew at every pass."""
    named = any("jaxtyping." in str(a) for a in function.__annotations__.values())
    return _check(function) if named and "<locals>" not in function.__qualname__ else function
