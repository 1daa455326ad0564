"""What all figures share: themes, one colour per method, and files that are the same bytes for the same data."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import FuncNorm, LinearSegmentedColormap
from matplotlib.figure import Figure

from relp_cli.errors import RelpError
from relp_cli.files import write_atomically

ENDINGS = (".png", ".svg", ".pdf")
# No dates and no random ids: a figure drawn again is the same file.
_METADATA = {"png": {"Software": "relp"}, "svg": {"Date": None, "Creator": "relp"}, "pdf": {"CreationDate": None}}
_METHOD_COLORS = {
    "act_patch": "#6d6d6d", "atp": "#e08a1e", "relp": "#2f7fc8", "relp+ah": "#2aa198", "random": "#a3a3a3",
    "delta": "#b9a27c",
}  # fmt: skip
_MORE_COLORS = ("#c2504b", "#8c62b8", "#6f9b34", "#d073a9", "#4d61b8", "#93762f", "#2b8a57", "#b0572c")
_NO_GLYPH = re.compile(r"Glyph \d+ .* missing from font")


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; `diverging` runs negative → 0 → positive, and 0 is the background's tone."""

    name: str
    face: str
    ink: str
    soft: str
    line: str
    diverging: tuple[str, ...]

    def cmap(self) -> LinearSegmentedColormap:
        return LinearSegmentedColormap.from_list(f"relp-{self.name}", self.diverging)


LIGHT = Theme("light", "#ffffff", "#1d2129", "#6a7180", "#d5d9e0",
              ("#0b3c7a", "#2f75b8", "#8fbbe0", "#f7f7f7", "#f0a58a", "#c7412f", "#7d0f1e"))  # fmt: skip
DARK = Theme("dark", "#171a20", "#e4e7ec", "#9aa2b1", "#3a404c",
             ("#b9dcff", "#5ea4e6", "#2b5d94", "#1e2229", "#99392f", "#ea7a5e", "#ffd6c4"))  # fmt: skip


def root_scale(limit: float) -> FuncNorm:
    """Colours from −limit over 0 to limit, in depth the square root of |value|: a hundredth of the limit has a tenth of the
    colour, so that one dominating value does not leave all others white.
    """
    return FuncNorm((lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda r: np.sign(r) * np.square(r)), -limit, limit)


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Draw inside this: the theme's colours and one text size, whatever the user's matplotlibrc says."""
    colors: Any = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), theme.ink)
    colors |= dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), theme.ink)
    colors |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme.soft)
    colors |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.face)
    sizes = {"font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8}
    other = {"grid.color": theme.line, "axes.linewidth": 0.7, "legend.frameon": False, "text.parse_math": False}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(colors | sizes | other)
        yield


class Drawn(Figure):
    """A figure that a notebook shows though nobody imported pyplot, which is what teaches notebooks to show figures."""

    def _repr_png_(self) -> bytes:
        return rendered(self, dpi=110)


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, outside pyplot: nothing global, nothing to close."""
    figure = Drawn(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write PNG, SVG or PDF by file ending, atomically. Raises: RelpError for another ending."""
    path = Path(path)
    check_ending(path)
    write_atomically(path, rendered(figure, path.suffix.lower().lstrip(".")))


def check_ending(path: Path) -> None:
    """Raises RelpError for a figure's file of no known sort."""
    if path.suffix.lower() not in ENDINGS:
        raise RelpError(f"figure {path}: unknown file ending '{path.suffix}'; expected one of {', '.join(ENDINGS)}")


def rendered(figure: Figure, form: str = "png", dpi: int = 180) -> bytes:
    """The bytes of a figure file."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "relp", "text.parse_math": False}):
        warnings.filterwarnings("ignore", message=_NO_GLYPH.pattern)  # a token in a script that the font lacks
        figure.savefig(stream, format=form, dpi=dpi, metadata=_METADATA[form])
    return stream.getvalue()


def method_colors(methods: Iterable[str]) -> dict[str, str]:
    """One colour per method: the usual ones keep theirs in every figure, others get one by order."""
    names = list(dict.fromkeys(methods))
    others = [name for name in names if name not in _METHOD_COLORS]
    more = {name: _MORE_COLORS[i % len(_MORE_COLORS)] for i, name in enumerate(others)}
    return {name: _METHOD_COLORS.get(name) or more[name] for name in names}


def bare(axes: Axes) -> None:
    """No box around the data: left and bottom axes only."""
    axes.spines[["top", "right"]].set_visible(False)


def one_line(text: str, limit: int = 18) -> str:
    """A token as it can stand in a label: visible white space, cut to `limit` characters."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").strip(" ") or "␣"
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
