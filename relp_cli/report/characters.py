"""Layer × position heatmaps in characters, for terminals of any width: layers down, positions across."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.errors import visible
from relp_cli.spaces.scores import Scores

if TYPE_CHECKING:
    from rich.console import Console

CELL = 3  # characters of a position: a blank, a sign, a digit
NOTHING = "·"
KEY = "a digit d: from d² % of the largest |score| up (9: 81 % and more, 1: from 1 %); ·: below 1 %"


@dataclass(frozen=True)
class Strongest:
    """values: per layer and position, the score of the unit with the largest |score| (0 where the layer has none).

    layers: as `Units.layer` numbers them (edges: their reader's, the logits last). largest: the largest |score|.
    of: the most units that a layer has.
    """

    kind: str
    layers: tuple[int, ...]
    values: Float[Tensor, "layer pos"]
    of: int

    @property
    def largest(self) -> float:
        return float(self.values.abs().max()) if self.values.numel() else 0.0


def strongest(scores: Scores) -> list[Strongest]:
    """Per kind, the strongest unit of every layer and position; units without a score count as 0."""
    units, dense = scores.units, scores.dense(scores.mean.double().nan_to_num(0))
    found = []
    for kind in units.kinds:
        layer, of_kind = units.layer[units.span(kind)], dense[:, units.span(kind)]
        layers, sizes = layer.unique(return_counts=True)
        rows = []
        for number in layers.tolist():
            part = of_kind[:, layer == number]
            rows.append(part.gather(1, part.abs().argmax(1, keepdim=True))[:, 0])
        found.append(Strongest(kind, tuple(layers.tolist()), torch.stack(rows), int(sizes.max())))
    return found


def digit(value: float, largest: float) -> str:
    """d where a score is at least d² % of the largest |score|: "9" from 81 % up, "-3" from 9 %, "·" below 1 %. In tenths of the
    largest itself, one dominating node would leave nothing but itself.
    """
    if not largest:
        return NOTHING
    root = min(9, int(10 * (abs(value) / largest) ** 0.5 + 1e-9))  # 0.09 is nine hundredths, whatever it rounds to
    return NOTHING if not root else f"{'-' if value < 0 else ''}{root}"


def print_map(console: Console, table: Strongest, labels: Sequence[str]) -> None:
    """Print one kind's map, in blocks of as many positions as fit, and which position is which."""
    from rich.text import Text

    what = f"strongest of up to {table.of} per cell" if table.of > 1 else "one per cell"
    console.print(f"{table.kind}: {what}, largest |score| {table.largest:.4g}")
    margin = 5  # of `layer`, `embed`
    wide = max(1, (console.width - margin - 1) // CELL)
    for start in range(0, len(labels), wide):
        stop = min(start + wide, len(labels))
        numbers = "".join(f"{at % 100:>{CELL}}" for at in range(start, stop))
        console.print(Text(f"{'layer':>{margin}} {numbers}", style="dim"))
        for names, row in _folded(table, start, stop):
            line = Text(f"{names[0]:>{margin}} ")
            if len(names) > 1:
                console.print(line.append(f"  {NOTHING} … {NOTHING}  to layer {names[-1]}", style="dim"))
                continue
            for value in row:
                line.append(f"{digit(value, table.largest):>{CELL}}", style="blue" if value < 0 else "red")
            console.print(line)


def _folded(table: Strongest, start: int, stop: int) -> list[tuple[list[str], list[float]]]:
    """Layers with their values; of three and more below each other that show nothing, one entry with all their names."""
    entries: list[tuple[list[str], list[float]]] = []
    names = ["embed" if layer < 0 else str(layer) for layer in table.layers]
    rows = table.values[:, start:stop].tolist()
    for empty, group in groupby(
        zip(names, rows, strict=True), lambda pair: all(digit(v, table.largest) == NOTHING for v in pair[1])
    ):
        part = list(group)
        if empty and len(part) > 2:
            entries.append(([name for name, _ in part], part[0][1]))
        else:
            entries += [([name], row) for name, row in part]
    return entries


def print_positions(console: Console, labels: Sequence[str]) -> None:
    """Print which number stands for which position, unless the labels are these numbers."""
    from rich.text import Text

    if list(labels) != [str(i) for i in range(len(labels))] and list(labels) != ["*"]:
        numbered = " ".join(f"{i}={label}" for i, label in enumerate(labels))
        console.print(Text(visible(f"positions: {numbered}"), style="dim"))
    elif list(labels) == ["*"]:
        console.print(Text("position 0: all positions together", style="dim"))
