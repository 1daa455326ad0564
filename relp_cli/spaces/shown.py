"""What notebooks ask of scores and their views: a short repr, an HTML table, a data frame, a figure."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from relp_cli.errors import visible
from relp_cli.registry import load
from relp_cli.tasks.counted import pairs_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TABLES, FIGURES = "relp_cli.spaces.top", "relp_cli.report.notebook"  # imported when they are asked for
SHOWN = 10  # rows


class Shown:
    """Scores, or a view of them (`whole` leads back)."""

    def __repr__(self) -> str:
        return title_of(self)

    def _repr_html_(self) -> str:
        return table_html(f"{title_of(self)}: the strongest", self.top(SHOWN))

    def to_pandas(self) -> pd.DataFrame:
        """A row per unit and position: kind, layer (of features: the site), position, unit (an edge's name; missing for vector
        nodes and error terms), score (mean over pairs, in the metric's units), se (standard error), n (pairs with that position).

        Features that are 0 in every pair have no row. The order is that of `mean`, positions first for several kinds.
        """
        frame: pd.DataFrame = load(f"{TABLES}:unit_table")(whole(self))
        return frame

    def top(self, n: int = SHOWN) -> pd.DataFrame:
        """The n rows of `to_pandas` with the largest |score|, the strongest first. Raises RelpError unless n is from 1 up."""
        frame: pd.DataFrame = load(f"{TABLES}:strongest")(whole(self), n)
        return frame

    def plot(self) -> Figure:
        """A matplotlib figure: layer × position maps of nodes (units added up), bars of the strongest edges or features."""
        figure: Figure = load(f"{FIGURES}:scores_figure")(whole(self))
        return figure


class ShownView(Shown):
    """A view: as long as it has units at positions, which iteration gives as named tuples, the rows of `to_pandas`."""

    def __len__(self) -> int:
        return int(getattr(self, "n_nodes"))  # noqa: B009 - of the class that this is mixed into

    def __iter__(self) -> Iterator[Any]:
        return self.to_pandas().itertuples(index=False, name="Row")


class ShownCircuit:
    """A circuit: as long as it keeps units at positions; iteration gives them as named tuples, the rows of `to_pandas`."""

    def __repr__(self) -> str:
        circuit: Any = self
        kinds = ", ".join(circuit.units.kinds)
        what = f"{circuit.n_nodes} of {circuit.n_possible} units ({kinds}; {_positions(circuit.labels)})"
        model = circuit.meta.get("model")
        return f"Circuit({what}{f' of {visible(str(model))}' if model else ''})"

    def _repr_html_(self) -> str:
        return table_html(f"{self!r}: the first in order", self.to_pandas().head(SHOWN))

    def __len__(self) -> int:
        return int(getattr(self, "n_nodes"))  # noqa: B009 - of the class that this is mixed into

    def __bool__(self) -> bool:
        return True  # one that keeps nothing is a circuit too

    def __iter__(self) -> Iterator[Any]:
        return self.to_pandas().itertuples(index=False, name="Row")

    def to_pandas(self) -> pd.DataFrame:
        """A row per kept unit and position: kind, layer, position ("*": all of them), unit (as in `Scores.to_pandas`)."""
        frame: pd.DataFrame = load(f"{TABLES}:kept_units")(self)
        return frame

    def top(self, n: int, scores: Any) -> pd.DataFrame:
        """The n kept units with the largest |score| in the scores that it was selected from, with score, se and n.

        Raises: RelpError for scores of other positions, and unless n is from 1 up.
        """
        frame: pd.DataFrame = load(f"{TABLES}:strongest_kept")(self, scores, n)
        return frame

    def plot(self, scores: Any = None) -> Figure:
        """A matplotlib figure: kept nodes per layer and position, or the graph of edges (drawn by their scores) or features.

        Raises: RelpError for edges without the scores that they were selected from.
        """
        figure: Figure = load(f"{FIGURES}:kept_figure")(self, scores)
        return figure


def whole(scores: Any) -> Any:
    """The scores of units that a view is of."""
    return scores.whole


def title_of(scores: Any) -> str:
    """`Scores(relp: head; 96 units at 6 positions, 8 pairs, logit_diff, noising, tiny-gpt2)`."""
    kinds = getattr(scores, "kind", None) or ", ".join(getattr(scores, "keys", lambda: ())())
    pairs = int(scores.n.max()) if scores.n.numel() else 0
    parts = [
        f"{type(scores).__name__}({visible(str(scores.meta.get('method', 'scores')))}{f': {kinds}' if kinds else ''}",
        f"{scores.n_nodes} units ({_positions(scores.labels)})",
        pairs_text(pairs, scores.meta.get("n_prompts")),
        *(visible(str(scores.meta[key])) for key in ("metric", "direction", "model") if key in scores.meta),
    ]
    return f"{', '.join(parts)})"


def table_html(title: str, frame: pd.DataFrame) -> str:
    """Everything in it is text: pandas escapes the cells."""
    table = frame.to_html(index=False, float_format=lambda value: f"{value:.4g}", na_rep="—", border=0, escape=True)
    return f"<div><p>{html.escape(title)}</p>{table}</div>"


def _positions(labels: tuple[str, ...]) -> str:
    return "all positions as one" if labels == ("*",) else f"{len(labels)} positions"
