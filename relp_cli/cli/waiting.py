"""One line on a terminal that says what is loaded, until there is something to say. Imports next to nothing.

Neither a thread nor a hidden cursor: an interrupt at any time leaves a plain terminal.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from relp_cli.errors import visible

_WIDEST = 70  # characters: a line that wraps cannot be taken back
_state = {"shown": False, "silent": False}


def silence(on: bool) -> None:
    """While a bar of progress is shown there is no such line."""
    _state["silent"] = on


def waiting(what: str) -> None:
    """Show, in place of what was shown before, what one waits for. Nothing where stderr is no terminal, or one that takes no
    line back.
    """
    with suppress(OSError, ValueError):
        if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") and not _state["silent"]:
            line = visible(what)
            sys.stderr.write(f"\r\x1b[K{line if len(line) < _WIDEST else line[: _WIDEST - 1] + '…'}")
            sys.stderr.flush()
            _state["shown"] = True


def settle() -> None:
    """Take the line back: something is printed now."""
    if _state["shown"]:
        _state["shown"] = False
        with suppress(OSError, ValueError):
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
