"""relp bench"""

from __future__ import annotations

from typing import Annotated

import typer

from relp_cli.cli.common import JsonFlag, count_option, out, print_json


def command(
    rounds: Annotated[int, count_option(1, help="Timed rounds per row.")] = 7,
    layers: Annotated[int, count_option(1, help="Layers of the GPT-2-small-shape model.")] = 12,
    only: Annotated[str, typer.Option(help="Rows whose name contains this.")] = "",
    json: JsonFlag = False,
) -> None:
    """Cost of the methods as ratios to plain Hugging Face passes (GPT-2-small shape, random weights, one thread).

    Example: relp bench --only relp
    """
    import pandas as pd

    from relp_cli.report.tables import show
    from relp_cli.runs.bench import run_benches

    rows = run_benches(rounds, layers, only)
    if json:
        print_json(rows)
        return
    show(pd.DataFrame(rows), out, f"medians of {rounds} rounds, batch 8 × 16 tokens, {layers} layers, one thread")
