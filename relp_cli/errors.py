"""The one error that becomes one clear line on stderr and an exit code."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

# What only another name or place mends.
BAD_PLACE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EROFS,
             errno.ELOOP)  # fmt: skip


class RelpError(Exception):
    """Bad input (exit code 2): one line that names what is wrong, what was expected, and the nearest valid name."""

    exit_code = 2


class RunFailed(RelpError):
    """Valid input whose execution failed (exit code 1): a full disk, a corrupt file, a failed cell."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


def unknown(what: str, name: str, known: Iterable[str], where: str = "") -> RelpError:
    """The error for a name that is not in a table. `where` is a `file:line: key: ` prefix."""
    return RelpError(f"{where}unknown {what} '{name}'{nearest(name, known)}")


def visible(text: str) -> str:
    """Text as one line that can stand on a terminal: what does not print (escapes, line ends, marks that turn the direction
    of writing) is shown as Python writes it, `\\n`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
