"""relp bench"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import DeviceOption, JsonFlag, comma, count_option, out, print_json, progress
from relp_cli.errors import RelpError
from relp_cli.files import check_file_writable


def command(
    rounds: Annotated[int, count_option(1, help="Timed rounds per row.")] = 7,
    layers: Annotated[int, count_option(1, help="Layers of the GPT-2-small-shape model.")] = 12,
    only: Annotated[str, typer.Option(help="Rows whose name contains this (of --over memory: methods).")] = "",
    over: Annotated[
        str | None,
        typer.Option(
            help="How costs grow with layers, positions, pairs or shape, and peak memory. memory: whether dry runs predict "
            "the peak of every method and sort of units."
        ),
    ] = None,
    values: Annotated[
        str | None, typer.Option(help="Of --over: the sizes, comma-separated: 4,12,24; of memory: edges,heads.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Of --over: a figure (.png, .svg, .pdf).")] = None,
    device: DeviceOption = None,
    json: JsonFlag = False,
) -> None:
    """Cost of the methods as ratios to plain Hugging Face passes (GPT-2-small shape, random weights, one thread).

    Example: relp bench --only relp
    """
    memory = over == "memory"
    if over is None and not (values is plot is device is None):
        raise RelpError("--values, --plot and --device belong to --over: relp bench --over layers --values 4,12,24")
    if over is not None and (layers != 12 or (only and not memory)):
        raise RelpError("--over has rows and layers of its own: leave --only and --layers out")
    if memory and not (plot is device is None):
        raise RelpError("--over memory is a table of processes on the CPU: leave --plot and --device out")
    import pandas as pd

    from relp_cli.costs.bench import run_benches
    from relp_cli.costs.growth import draw_growth, growth, on_device, sizes
    from relp_cli.report.canvas import check_ending
    from relp_cli.report.tables import show

    if over is None:
        with progress() as bar:
            table = pd.DataFrame(run_benches(rounds, layers, only, bar))
        sized = f"batch 8 × 16 tokens, {layers} layers"
    else:
        at = sizes(over, comma(values, "--values") if values is not None else ())
        if memory:
            _peaks(at, only, json)
            return
        if plot is not None:
            check_ending(plot)
            check_file_writable(plot)
        with progress() as bar:
            table = growth(over, at, rounds, device, bar)
        sized = "12 layers, batch 8 × 16 tokens but for what varies"
        if plot is not None:
            draw_growth(table, over, plot)
    if json:
        print_json(table.to_dict("records"))
        return
    show(table, out, f"medians of {rounds} rounds, {sized}, {on_device(device)}", keys=1 if over is None else 2)


def _peaks(units: Sequence[str], only: str, json: bool) -> None:
    """--over memory"""
    from relp_cli.costs.peaks import Fixture, cells_of, outside, peaks, sized
    from relp_cli.report.tables import show

    chosen = cells_of(units, only)
    with progress() as bar:
        table = peaks(Fixture.make(), chosen, bar)
    if json:
        print_json(table.to_dict("records"))
        return
    table.attrs["notes"] = [
        f"{len(table)} cells; predicted / measured is off by more than 25 % in {len(list(outside(table)))}"
    ]
    show(table, out, sized(), digits=2, keys=2)
