"""The pages' common frame: what a page is made of, and how it becomes one self-contained file."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from relp_cli.report.canvas import rendered
from relp_cli.report.maps import short
from relp_cli.report.names import kind_title
from relp_cli.report.tables import cell

CSS_DPI = 96
SCRIPTS = (
    "base",
    "table",
    "maps",
    "scatter",
    "intervals",
    "curves",
    "pairs",
    "explore",
)  # in this order: the first ones serve the others
MOST_ROWS = 10_000  # of a table


@dataclass(frozen=True)
class Picture:
    """One figure, drawn for both colour schemes, or only where there is no script (without `dark`)."""

    name: str
    caption: str
    light: Figure
    dark: Figure | None = None

    @property
    def width(self) -> int:
        """In CSS pixels: text in figures is as large as on the page."""
        return round(self.light.get_figwidth() * CSS_DPI)

    def sources(self) -> dict[str, str]:
        """Those that there are as data URIs."""
        return {k: "data:image/png;base64," + base64.b64encode(rendered(f, dpi=2 * CSS_DPI)).decode()
                for k, f in (("light", self.light), ("dark", self.dark)) if f is not None}  # fmt: skip


@dataclass(frozen=True)
class Sheet:
    """A table that can be sorted, searched and downloaded. name: of the file. by: the column that orders it at first, downwards.
    sizes: columns that are ordered by |value|. of: how many rows there are, where the table has only the first of them.
    fold: columns that are the same in all rows are said once, above the table (the downloaded file has them all).
    """

    name: str
    table: pd.DataFrame
    title: str = ""
    by: str | None = None
    sizes: tuple[str, ...] = ()
    of: int | None = None
    digits: int = 3
    fold: bool = False

    def plain(self) -> dict[str, Any]:
        """For the script; numbers have six significant digits. A table of more than `MOST_ROWS` has its first ones."""
        shown = self.table.head(MOST_ROWS)
        one = [c for c in shown.columns if shown[c].nunique(dropna=False) == 1] if self.fold and len(shown) > 1 else []
        same = [[str(c), plain(shown[c].iloc[0])] for c in one]
        shown = shown.drop(columns=one) if len(one) < len(shown.columns) else shown
        columns = [str(c) for c in shown.columns]
        kinds = [_kind(shown[c]) for c in shown.columns]
        return {
            "title": self.title,
            "columns": columns,
            "types": kinds,
            "rows": [[plain(value) for value in row] for row in shown.itertuples(index=False, name=None)],
            "of": len(self.table) if self.of is None else self.of,
            "file": f"{self.name}.csv",
            "by": columns.index(self.by) if self.by in columns else -1,
            "sizes": [columns.index(c) for c in self.sizes if c in columns],
            "digits": self.digits,
            "same": same,
        }


@dataclass(frozen=True)
class Section:
    """A part of a page: text, then heatmaps, scatter plots, figures, tables. id: of its link.

    maps: `map_set(...)`. scatters: {"table": a sheet's name, "words": columns that name a point, "panels": a list of {title,
    kind, x, y}}. curves: `curve_panels(...)`. intervals: `interval_data`'s panels; pictures of the same stand only where there
    is no script. commands: what made it, and when.
    """

    id: str
    title: str
    text: tuple[str, ...] = ()
    maps: Mapping[str, Any] | None = None
    scatters: Mapping[str, Any] | None = None
    curves: Sequence[Mapping[str, Any]] = ()
    intervals: Sequence[Mapping[str, Any]] = ()
    pictures: tuple[Picture, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    commands: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Page:
    """What a page says besides its sections: notes stand on top, facts at the end beside the commands that made it.

    graph: `circuit_graph.graph_section`'s, or "". lead: (what, a sentence), before everything else.
    """

    title: str
    about: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    commands: tuple[tuple[str, str], ...] = ()
    graph: str = ""
    lead: tuple[tuple[str, str], ...] = ()


def script_data(sections: Sequence[Section]) -> dict[str, Any]:
    """What the scripts read of sections: tables, sets of maps and scatter plots by name."""
    return {
        "tables": {sheet.name: sheet.plain() for section in sections for sheet in section.sheets},
        "sets": {section.id: section.maps for section in sections if section.maps},
        "curves": {section.id: section.curves for section in sections if section.curves},
        "intervals": {section.id: section.intervals for section in sections if section.intervals},
        "scatters": {section.id: section.scatters for section in sections if section.scatters},
    }


def render(template: str, data: Mapping[str, Any], names: Sequence[str] = SCRIPTS, **context: Any) -> str:
    """The text of a page, or of a part of one; data: what its scripts read. names: of the scripts, in their order."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "kind": kind_title, "json": lambda v: json.dumps(v, indent=1, default=str)}
    scripts = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in names)
    style = (folder / "style.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(data=script_text(data), script=scripts, style=style, **context)


def render_sections(page: Page) -> str:
    """A page that is nothing but sections."""
    return render("sections.html.j2", script_data(page.sections), page=page)


def script_text(data: Any) -> str:
    """JSON that can stand in a script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def plain(value: Any) -> Any:
    """A table's value as JSON has it: text, a whole number, a number of six digits, or None."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        return short(value) if math.isfinite(value) else str(value)
    return value if isinstance(value, int) else str(value)


def _kind(column: pd.Series) -> str:
    """text, int or float: whether numbers of a column are shown with decimals."""
    values = [v for v in column if not (v is None or v is pd.NA or v != v)]
    if pd.api.types.is_bool_dtype(column) or not values or not all(pd.api.types.is_number(v) for v in values):
        return "text"
    return "int" if all(float(v).is_integer() for v in values) else "float"
