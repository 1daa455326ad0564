"""Feature annotations: JSON lines, as Marks et al. publish them or with keys site, feature, annotation.

{"Name": "resid_3/17490", "Annotation": "plural nouns"}
{"site": "resid_out_layer3", "feature": 17490, "annotation": "plural nouns"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from relp_cli.errors import RelpError
from relp_cli.features.sites import Site, parse_site

Annotations = Mapping[tuple[Site, int], str]


def read_annotations(path: str | Path) -> Annotations:
    """(site, feature) → annotation. Raises RelpError, naming the line, for a file that holds anything else."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RelpError(f"annotations {path} cannot be read: {error}") from error
    found: dict[tuple[Site, int], str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RelpError(f"{path}:{number}: not a JSON object ({error})") from error
        key, text = _entry(row) if isinstance(row, dict) else (None, "")
        if key is None:
            raise RelpError(
                f'{path}:{number}: expected {{"Name": "resid_3/17490", "Annotation": "…"}} or '
                '{"site": "resid_out_layer3", "feature": 17490, "annotation": "…"}'
            )
        found[key] = text
    return found


def _entry(row: Mapping[str, object]) -> tuple[tuple[Site, int] | None, str]:
    if "Name" in row:
        where, _, number = str(row["Name"]).rpartition("/")
        text = row.get("Annotation")
    else:
        where, number, text = str(row.get("site")), str(row.get("feature")), row.get("annotation")
    site = parse_site(where)
    if site is None or not number.isdigit() or not isinstance(text, str):
        return None, ""
    return (site, int(number)), text
