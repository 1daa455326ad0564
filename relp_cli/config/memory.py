"""Sizes of memory as people write them: 8GB, 500MB, 2.5GiB. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

from relp_cli.errors import RelpError

UNITS = {
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def bytes_of(given: Any, where: str = "memory") -> int:
    """Bytes, of a text such as 8GB (10⁹ bytes each) or 8GiB (2³⁰), or of a number of bytes.

    Raises: RelpError for anything else.
    """
    size = given if isinstance(given, int) and not isinstance(given, bool) else 0
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([kKMGT]i?B)", given.strip()) if isinstance(given, str) else None
    if match:
        unit = match[2][0].upper() + match[2][1:]
        size = int(float(match[1]) * UNITS[unit])
    if size < 1:
        raise RelpError(f"{where} {given}: expected a size such as 8GB or 500MB (GiB, MiB: powers of 1,024)")
    return size


def written(size: float) -> str:
    """Bytes as GB or MB, rounded up: 1.21 GB."""
    unit = "GB" if size >= UNITS["GB"] else "MB"
    step = 1 if unit == "MB" else 0.01
    steps = -int(-size // (UNITS[unit] * step))
    return f"{steps * step:.2f} GB" if unit == "GB" else f"{steps} MB"
