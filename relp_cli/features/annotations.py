"""Feature annotations: JSON lines, as Marks et al. publish them or with keys site, feature, annotation.

{"Name": "resid_3/17490", "Annotation": "plural nouns"}
{"site": "resid_out_layer3", "feature": 17490, "annotation": "plural nouns"}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from relp_cli.errors import RelpError
from relp_cli.files import read_text
from relp_cli.spaces.sites import Site, parse_site

Annotations = Mapping[tuple[Site, int], str]


def read_annotations(path: str | Path) -> Annotations:
    """(site, feature) → annotation. Raises RelpError, naming the line, for a file that holds anything else."""
    text = read_text(path, "annotations")
    found: dict[tuple[Site, int], str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RelpError(f"{path}:{number}: not a JSON object ({error})") from error
        key, note = _entry(row) if isinstance(row, dict) else (None, "")
        if key is None:
            raise RelpError(
                f'{path}:{number}: expected {{"Name": "resid_3/17490", "Annotation": "…"}} or '
                '{"site": "resid_out_layer3", "feature": 17490, "annotation": "…"}'
            )
        if found.setdefault(key, note) != note:
            raise RelpError(f"{path}:{number}: {key[0].name}/{key[1]} has another annotation above")
    if not found:
        raise RelpError(f"annotations {path} has none")
    return found


def _entry(row: Mapping[str, object]) -> tuple[tuple[Site, int] | None, str]:
    """(site, feature) and what is said of it; None where the row is of neither form. Control characters become spaces."""
    if "Name" in row:
        where, _, number = str(row["Name"]).rpartition("/")
        text = row.get("Annotation")
    else:
        where, number, text = str(row.get("site")), str(row.get("feature")), row.get("annotation")
    site = parse_site(where)
    if site is None or not re.fullmatch(r"[0-9]{1,9}", number) or not isinstance(text, str):
        return None, ""
    return (site, int(number)), " ".join("".join(c if c.isprintable() else " " for c in text).split())
