"""How seconds and memory grow: rows of the benchmark while one size of the model or of its prompts varies."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.ticker import LogLocator, NullLocator

from relp_cli.costs.bench import BENCHES, SHAPES, Fixture, fixture, one_thread, timed
from relp_cli.costs.peaks import UNITS
from relp_cli.costs.rehearsal import peak
from relp_cli.errors import RelpError, unknown
from relp_cli.methods.request import Progress
from relp_cli.models.load import usable_device
from relp_cli.report.canvas import LIGHT, bare, method_colors, new_figure, save_figure, themed

OVER: dict[str, tuple[Any, ...]] = {
    "layers": (4, 8, 12, 24), "positions": (8, 16, 32, 64), "pairs": (1, 4, 8, 32), "shape": tuple(SHAPES),
    "memory": tuple(UNITS),
}  # fmt: skip
NAMED = {"shape": "shape", "memory": "sort of units"}
ROWS = ("relp", "relp, neurons", "ig_inputs, 10 steps", "eap", "act_patch, 1 node")


def sizes(over: str, values: Sequence[str]) -> list[Any]:
    """The values that vary. Raises RelpError for a size that does not, and for values that are none of it."""
    if over not in OVER:
        raise unknown("size", over, OVER, where="--over: ")
    if what := NAMED.get(over):
        for value in values:
            if value not in OVER[over]:
                raise unknown(what, value, OVER[over], where="--values: ")
        return list(values or OVER[over])
    for value in values:
        if not re.fullmatch(r"[1-9]\d{0,4}", value):
            raise RelpError(f"--values: expected numbers of {over} from 1 to 99999, got '{value}'")
    return [int(value) for value in values] or list(OVER[over])


def growth(
    over: str, values: Sequence[Any], rounds: int, device: str | None = None, progress: Progress | None = None
) -> pd.DataFrame:
    """A row per value and bench: medians of its seconds and of its baseline's, their ratio, and MiB: peak memory above what was
    held before it (of the process; on a GPU, of what torch allocates; NaN where the system does not say).

    over: a key of OVER but memory (`peaks`); the other sizes are GPT-2-small's, 16 positions and 8 pairs.
    """
    rows, target = [], usable_device(device or "cpu")
    chosen = [bench for bench in BENCHES if bench.name in ROWS]
    with one_thread():
        for value in values:
            f = fixture(**{over: value}, device=target)
            for bench in chosen:
                times = timed(f, bench, rounds)
                about = {over: value, "what": bench.name, "baseline": bench.baseline}
                cost = {name: times[name] for name in ("baseline s", "s", "ratio")}
                rows.append({**about, **cost, "MiB": _peak(bench.run, f)})
                if progress:
                    progress(len(rows), len(values) * len(chosen), f"rows ({over})")
            del f
            gc.collect()
    return pd.DataFrame(rows)


def _peak(run: Callable[[Fixture], Any], f: Fixture) -> float:
    """Peak memory above what is held before, in MiB."""
    with peak(f.batch.original.device) as found:
        run(f)
    return found.above


def on_device(device: str | None) -> str:
    """What the figures were measured on."""
    if device and device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device or 'cpu'}, one thread"


def draw_growth(table: pd.DataFrame, over: str, path: Path) -> None:
    """Seconds and MiB against the size that varies, both axes logarithmic where it is a number; baselines are dotted."""
    colors = method_colors(table["what"])
    with themed(LIGHT):
        figure = new_figure(8.4, 3.6)
        for axes, y, title in zip(figure.subplots(1, 2), ("s", "MiB"), ("seconds", "MiB above the model"), strict=True):
            for name, rows in table.groupby("what", sort=False):
                axes.plot(rows[over].astype(str), rows[y], "o-", ms=3.5, color=colors[str(name)], label=name)
                if y == "s":
                    axes.plot(rows[over].astype(str), rows["baseline s"], ":", color=colors[str(name)])
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            # Text of figures is not mathematics: 10^2 would be printed as typed.
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xlabel(over)
            axes.set_title(title, loc="left", fontweight="bold")
            bare(axes)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=len(handles), fontsize=7.5)
        save_figure(figure, path)
