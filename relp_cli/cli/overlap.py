"""relp overlap A B"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import JsonFlag, out, print_json


def command(
    first: Annotated[Path, typer.Argument(help="A circuit JSON, or a run that has one (circuit.json).")],
    second: Annotated[str, typer.Argument(help="Another one, or a published circuit (ioi_gpt2_small).")],
    json: JsonFlag = False,
) -> None:
    """Overlap of two circuits (Jaccard, precision, recall of the first against the second), and for two runs the
    correlation of their scores.

    Example: relp overlap runs/ioi-seed0 runs/ioi-seed1
    """
    from relp_cli.studies.overlapping import overlap_of

    rows = overlap_of(first, second)
    if json:
        print_json(rows)
        return
    import pandas as pd

    from relp_cli.report.tables import show

    show(pd.DataFrame([rows]), out, f"{first} against {second}")
