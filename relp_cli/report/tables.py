"""Tables: the form of the paper's Table 5, files (CSV, Markdown, LaTeX, parquet) and the terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from relp_cli.errors import RelpError, RunFailed
from relp_cli.files import write_atomically
from relp_cli.report.names import kind_title, need, varying
from relp_cli.report.terminal import Column, print_table

if TYPE_CHECKING:
    from rich.console import Console

MISSING = "—"
HALF = 0.5  # of the variance: more, and one unit outweighs all others together
# Columns with a form of their own: what is small on purpose keeps its digits, and what is counted has no decimals.
FORMS = {"p": ".2g", "p_holm": ".2g", "tau": ".4g", "passes": "g", "forward": "g", "backward": "g"}
_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "τ": r"$\tau$", "δ": r"$\delta$", "Δ": r"$\Delta$",
    "∅": r"$\emptyset$", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "≈": r"$\approx$", "−": r"$-$",
    "±": r"$\pm$", "∖": r"$\setminus$", "→": r"$\to$", MISSING: "---",
}  # fmt: skip


def table5(table: pd.DataFrame, value: str = "pcc") -> pd.DataFrame:
    """`compare`'s rows in the form of the paper's Table 5: one row per model (× task, and × direction or seed where
    they vary), one numeric column "residual atp", "residual relp", "attention atp", … per node kind and method.

    `attrs["best"]` lists the columns that compete (one list per node kind): writers set the largest of each in bold.
    `attrs["notes"]` says why a value is missing. `value` may be another measure (spearman, topk, pcc_per_pair).
    Raises: RelpError for a table without these columns or with two rows for one cell.
    """
    need(table, ("model", "method", "kind", value), "table 5")
    keys = ["model", *(["task"] if "task" in table.columns else []), *varying(table)]
    repeated = table[table.duplicated([*keys, "kind", "method"])]
    if len(repeated):
        one = repeated.iloc[0]
        raise RelpError(f"table 5: several rows for {one.model}, {one.kind}, {one.method}; expected one")
    kinds, methods = list(dict.fromkeys(table.kind)), list(dict.fromkeys(table.method))
    rows = []
    for key, group in table.groupby(keys, sort=False):
        cells = {(r["kind"], r["method"]): r[value] for r in group.to_dict("records")}
        row = dict(zip(keys, key, strict=True))
        rows.append(row | {f"{kind_title(k)} {m}": cells.get((k, m), math.nan) for k in kinds for m in methods})
    out = pd.DataFrame(rows)
    out.attrs["best"] = [[f"{kind_title(k)} {m}" for m in methods] for k in kinds]
    noted = table[table[value].isna()] if "note" in table.columns else table.iloc[:0]
    out.attrs["notes"] = [
        ", ".join(str(r[k]) for k in (*keys, "kind", "method")) + f": {r['note']}"
        for r in noted.to_dict("records")
        if isinstance(r["note"], str) and r["note"]
    ]
    return out


def write_table(table: pd.DataFrame, path: str | Path, digits: int = 3) -> None:
    """Write by file ending: .csv and .parquet in full precision, .md and .tex (booktabs) rounded to `digits`.

    Raises: RelpError for another ending, and for .parquet where pyarrow is not installed.
    """
    path = Path(path)
    writers: dict[str, Callable[[pd.DataFrame, int], str | bytes]] = {
        ".csv": _csv,
        ".md": markdown,
        ".tex": latex,
        ".parquet": _parquet,
    }
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise RelpError(f"table {path}: unknown file ending '{path.suffix}'; expected one of {', '.join(writers)}")
    write_atomically(path, writer(table, digits))


def read_table(path: Path, may_be_empty: bool = False) -> pd.DataFrame:
    """A CSV that `write_table` wrote. Raises RunFailed for one that cannot be read, or has no rows, unless it may be so."""
    try:
        table = pd.read_csv(path, dtype={"circuit": str})
    except pd.errors.EmptyDataError:  # no columns either
        table = pd.DataFrame()
    except (OSError, ValueError) as error:
        raise RunFailed(f"{path} cannot be read ({error}); compute it again to replace it") from error
    if table.empty and not may_be_empty:
        raise RunFailed(f"{path} has no rows; compute it again to replace it")
    return table


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A Markdown table (numbers right-aligned, best values bold), with its notes below."""
    numeric = [is_numeric(table[c]) for c in table.columns]
    header = [str(c).replace("|", "\\|") for c in table.columns]
    lines = [_md_row(header), _md_row(["---:" if n else ":---" for n in numeric])]
    for row, best in zip(cells(table, digits), best_cells(table, digits), strict=True):
        text = [t.replace("|", "\\|").replace("\n", " ") for t in row]
        lines.append(_md_row([f"**{t}**" if b else t for t, b in zip(text, best, strict=True)]))
    notes = [f"- {note}" for note in table.attrs.get("notes", [])]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def latex(table: pd.DataFrame, digits: int = 3) -> str:
    """A LaTeX `tabular` (needs the booktabs package), best values bold; notes follow as comments."""
    columns = "".join("r" if is_numeric(table[c]) else "l" for c in table.columns)
    lines = ["% needs \\usepackage{booktabs}", f"\\begin{{tabular}}{{{columns}}}", "\\toprule"]
    lines += [_tex_row([tex(str(c)) for c in table.columns]), "\\midrule"]
    for row, best in zip(cells(table, digits), best_cells(table, digits), strict=True):
        lines.append(_tex_row([f"\\textbf{{{tex(t)}}}" if b else tex(t) for t, b in zip(row, best, strict=True)]))
    lines += ["\\bottomrule", "\\end{tabular}", *(f"% {note}" for note in table.attrs.get("notes", []))]
    return "\n".join(lines) + "\n"


def show(table: pd.DataFrame, console: Console, title: str | None = None, digits: int = 3, keys: int = 1) -> None:
    """Print: numbers right-aligned, best values bold, missing ones as —, notes below. An empty `note` column is left out.

    keys: how many of the first columns name a row; they are repeated where a wide table is cut into blocks.
    """
    attrs = table.attrs
    if "note" in table.columns and not table["note"].fillna("").astype(str).str.strip().any():
        table = table.drop(columns="note")
    body, best = cells(table, digits), best_cells(table, digits)
    columns = [
        Column(str(name), [row[i] for row in body], is_numeric(table[name]), [row[i] for row in best])
        for i, name in enumerate(table.columns)
    ]
    print_table(console, columns, keys, title, attrs.get("notes", []))


def cells(table: pd.DataFrame, digits: int = 3) -> list[list[str]]:
    """Every cell as text; a column's numbers have one form (`column_cells`)."""
    columns = [column_cells(str(name), table.iloc[:, i], digits) for i, name in enumerate(table.columns)]
    return [list(row) for row in zip(*columns, strict=True)]


def column_cells(name: str, values: pd.Series, digits: int = 3) -> list[str]:
    """Numbers of one column in one form: so many decimals, where any of them is large enough to have them and none too large;
    else as `cell` has them. Columns in `FORMS` have theirs.
    """
    known = [v for v in values if isinstance(v, float) and math.isfinite(v)]
    largest = max(map(abs, known), default=0.0)
    form = FORMS.get(name, f"z.{digits}f" if largest == 0 or 10**-digits <= largest < 1e5 else "")
    return [f"{v:{form}}" if form and isinstance(v, float) and math.isfinite(v) else cell(v, digits) for v in values]


def cell(value: Any, digits: int = 3) -> str:
    """A number with `digits` decimals (very small and very large ones in scientific form), — for a missing one."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if pd.api.types.is_bool(value):
        return "yes" if value else "no"
    if isinstance(value, float):
        plain = value == 0 or 10**-digits <= abs(value) < 1e5 or math.isinf(value)
        return f"{value:z.{digits}f}" if plain else f"{value:.{digits}g}"
    return str(value)


def best_cells(table: pd.DataFrame, digits: int = 3) -> list[list[bool]]:
    """Which cells hold the largest value, as it is shown, among the columns that compete (`attrs["best"]`)."""
    marks = pd.DataFrame(False, index=range(len(table)), columns=table.columns)
    for group in table.attrs.get("best", []):
        columns = [c for c in group if c in table.columns]
        if len(columns) < 2:
            continue
        values = table[columns].astype(float).round(digits).reset_index(drop=True)
        marks[columns] = values.eq(values.max(axis=1), axis=0)
    return marks.to_numpy().tolist()


def is_numeric(column: pd.Series) -> bool:
    """Numbers, also where some are None (an object column)."""
    if pd.api.types.is_bool_dtype(column):
        return False
    values = column.dropna()
    return bool(len(values)) and all(isinstance(v, int | float) or pd.api.types.is_number(v) for v in values)


def tex(text: str) -> str:
    """Text as it can stand in LaTeX."""
    return "".join(_TEX.get(character, character) for character in text)


def _md_row(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def _tex_row(row: Sequence[str]) -> str:
    return " & ".join(row) + r" \\"


def _csv(table: pd.DataFrame, _: int) -> str:
    return table.map(_harmless).to_csv(index=False)


def _harmless(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula gets a quote before it; numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _parquet(table: pd.DataFrame, _: int) -> bytes:
    stream = io.BytesIO()
    try:
        table.to_parquet(stream, index=False, engine="pyarrow")
    except ImportError as error:
        raise RelpError(
            "writing .parquet needs pyarrow, which is not installed: pip install 'relp-cli[parquet]'"
        ) from error
    except (TypeError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise RelpError(f"this table cannot be written as parquet ({error}); write .csv instead") from error
    return stream.getvalue()


def rests_on_one(table: pd.DataFrame) -> list[str]:
    """Of `compare`'s rows, a sentence for each kind (of a task and model, where there are several) of whose exact scores one node
    is more than half of the variance: what PCC and slope rest on, and the PCCs without it.
    """
    if not {"largest", "largest_share", "pcc_without"} <= {*table}:
        return []  # of an older version
    places = [c for c in ("task", "model", "direction", "seed") if c in table and table[c].nunique() > 1]
    said = []
    rows = table[table.largest_share > HALF]
    for key, part in rows.groupby([*places, "kind", "largest", "largest_share"], sort=False):
        where, first = [str(k) for k in key[: len(places)]], part.iloc[0]
        exact = str(first.get("reference", "act_patch"))
        of = "the exact effects" if exact in ("act_patch", "edge_patch") else f"{exact}'s scores"
        noun = {"edges": "edge", "feature": "feature or error term"}.get(str(first.kind), "node")
        without = ", ".join(f"{c.method} {cell(c.pcc_without, 3)}" for c in part.itertuples())
        whose = ", ".join([*where, kind_title(str(first.kind))])
        said.append(
            f"{whose}: one {noun} ({first.largest}) is {100 * first.largest_share:.0f} % "
            f"of the variance of {of}: PCC and slope rest on it; PCC without it: {without}"
        )
    return said
