"""relp bench"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import DeviceOption, JsonFlag, comma, count_option, out, print_json
from relp_cli.errors import RelpError
from relp_cli.files import check_file_writable


def command(
    rounds: Annotated[int, count_option(1, help="Timed rounds per row.")] = 7,
    layers: Annotated[int, count_option(1, help="Layers of the GPT-2-small-shape model.")] = 12,
    only: Annotated[str, typer.Option(help="Rows whose name contains this.")] = "",
    over: Annotated[
        str | None, typer.Option(help="How costs grow with layers, positions, pairs or shape, and peak memory.")
    ] = None,
    values: Annotated[str | None, typer.Option(help="Of --over: the sizes, comma-separated: 4,12,24.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Of --over: a figure (.png, .svg, .pdf).")] = None,
    device: DeviceOption = None,
    json: JsonFlag = False,
) -> None:
    """Cost of the methods as ratios to plain Hugging Face passes (GPT-2-small shape, random weights, one thread).

    Example: relp bench --only relp
    """
    if over is None and not (values is plot is device is None):
        raise RelpError("--values, --plot and --device belong to --over: relp bench --over layers --values 4,12,24")
    if over is not None and (only or layers != 12):
        raise RelpError("--over has rows and layers of its own: leave --only and --layers out")
    import pandas as pd

    from relp_cli.report.canvas import check_ending
    from relp_cli.report.tables import show
    from relp_cli.runs.bench import run_benches
    from relp_cli.runs.growth import draw_growth, growth, on_device, sizes

    if over is None:
        table, sized = pd.DataFrame(run_benches(rounds, layers, only)), f"batch 8 × 16 tokens, {layers} layers"
    else:
        at = sizes(over, comma(values, "--values") if values is not None else ())
        if plot is not None:
            check_ending(plot)
            check_file_writable(plot)
        table, sized = growth(over, at, rounds, device), "12 layers, batch 8 × 16 tokens but for what varies"
        if plot is not None:
            draw_growth(table, over, plot)
    if json:
        print_json(table.to_dict("records"))
        return
    show(table, out, f"medians of {rounds} rounds, {sized}, {on_device(device)}")
