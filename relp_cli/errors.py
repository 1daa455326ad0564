"""The one error that becomes one clear line on stderr and an exit code."""

from __future__ import annotations

import difflib
import errno
import inspect
from collections.abc import Callable, Iterable
from typing import Any

# What only another name or place mends.
BAD_PLACE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EROFS,
             errno.ELOOP)  # fmt: skip

OUT_OF_MEMORY = (
    "out of memory: a smaller --batch-size needs less, --memory SIZE sets a limit (in a job: batch_size, memory)"
)


class RelpError(Exception):
    """Bad input (exit code 2): one line that names what is wrong, what was expected, and the nearest valid name."""

    exit_code = 2


class RunFailed(RelpError):
    """Valid input whose execution failed (exit code 1): a full disk, a corrupt file, a failed cell."""

    exit_code = 1


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is no more memory, on whatever device; torch's errors are known without importing it."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "can't allocate memory" in str(error)


def near(name: str, known: Iterable[str]) -> str | None:
    """The closest known name, if one is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, else the list of known names."""
    known = sorted(known)
    if meant := near(name, known):
        return f"; did you mean '{meant}'?"
    return f"; known: {', '.join(known)}" if known else ""


def unknown(what: str, name: str, known: Iterable[str], where: str = "") -> RelpError:
    """The error for a name that is not in a table. `where` is a `file:line: key: ` prefix."""
    return RelpError(f"{where}unknown {what} '{name}'{nearest(name, known)}")


def check_keywords(function: Callable[..., Any], given: Iterable[str], more: Iterable[str] = ()) -> None:
    """Raises RelpError for a given keyword that was meant to be one of the function's own, or of `more`."""
    names = [*inspect.signature(function).parameters, *more]
    for key in given:
        if meant := near(key, names):
            raise RelpError(f"{function.__name__} has no keyword '{key}'; did you mean '{meant}'?")


def visible(text: str) -> str:
    """Text as one line that can stand on a terminal: what does not print (escapes, line ends, marks that turn the direction
    of writing) is shown as Python writes it, `\\n`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
