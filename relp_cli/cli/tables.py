"""Rich tables that several verbs print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from relp_cli.methods.scores import Scores


def top_nodes(scores: Scores, k: int = 10) -> Table:
    """The k nodes of each kind with the largest |mean score|, with standard errors."""
    meta = scores.meta
    rules = ", ".join(f"{name}×{n}" for name, n in meta["rules"].items())
    where = f"{meta.get('task', '?')}, {meta['model']} ({meta['family']})"
    title = f"{meta['method']} on {where}, {meta['direction']}, {meta['metric']}"
    table = Table(title=title, caption=f"rules applied (layers): {rules}" if rules else None, title_justify="left")
    for name, justify in (("kind", "left"), ("layer", "right"), ("position", "left"), ("unit", "right"),
                          ("score", "right"), ("± s.e.", "right"), ("n", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for kind, s in scores.items():
        flat = s.mean.flatten()
        best = flat.abs().topk(min(k, flat.numel())).indices
        for index in best.tolist():
            at = _unravel(index, s.mean.shape)
            n = int(s.n[at[1]])
            error = (s.variance[at].item() / n) ** 0.5 if n > 1 else float("nan")
            unit = str(at[2]) if len(at) == 3 else ""
            table.add_row(kind, str(at[0]), s.labels[at[1]], unit, f"{flat[index]:+.4f}", f"{error:.4f}", str(n))
        table.add_section()
    return table


def _unravel(index: int, shape: Any) -> tuple[int, ...]:
    at = []
    for size in reversed(shape):
        at.append(index % size)
        index //= size
    return tuple(reversed(at))


def frame(df: Any, title: str | None = None, digits: int = 3) -> Table:
    """A pandas DataFrame as a rich table; numbers right-aligned, missing ones as —."""
    table = Table(title=title, title_justify="left")
    for column in df.columns:
        table.add_column(str(column), justify="right" if df[column].dtype.kind in "fi" else "left")
    for row in df.itertuples(index=False):
        table.add_row(*(_cell(v, digits) for v in row))
    return table


def _cell(value: Any, digits: int) -> str:
    if value is None or value != value:
        return "—"
    if isinstance(value, float):
        return (
            f"{value:.{digits}g}"
            if value and (abs(value) < 10**-digits or abs(value) >= 1e5)
            else f"{value:.{digits}f}"
        )
    return str(value)


def evaluation_table(df: Any, title: str) -> Table:
    """`evaluate`'s rows with intervals in the cells: one line per circuit."""
    table = Table(title=title, title_justify="left")
    table.box = SIMPLE_HEAD
    for name in ("τ", "nodes", "faithfulness", "completeness", "random", "F(C)"):
        table.add_column(name, justify="right", no_wrap=True)
    noted = any(df["note"])
    if noted:
        table.add_column("note")
    for row in df.to_dict("records"):
        table.add_row(
            "—" if row["tau"] is None else f"{row['tau']:.3g}",
            f"{row['n_nodes']}/{row['n_possible']}",
            *(
                f"{_cell(row[n], 2)} \\[{row[n + '_lo']:.2f}, {row[n + '_hi']:.2f}]"
                for n in ("faithfulness", "completeness")
            ),
            _cell(row.get("random_faithfulness"), 2),
            f"{row['F_C']:.3f}",
            *([row["note"]] if noted else []),
        )
    return table


KIND_TITLES = {"resid_pre": "residual", "attn_out": "attention", "mlp_out": "MLP"}


def agreement_tables(df: Any) -> list[Table]:
    """Per task, in the form of the paper's Table 5: rows = models, columns = kind × method, PCC with its interval; then
    the other measures per method."""
    tables = []
    for task, rows in df.groupby("task", sort=False):
        methods, kinds = list(dict.fromkeys(rows.method)), list(dict.fromkeys(rows.kind))
        first = rows.iloc[0]
        intervals = len(methods) <= 4  # more do not fit beside each other
        table = Table(
            title=f"{task}: PCC with exact patching of pair-averaged scores over {first.axis} "
            f"({first.n_pairs} pairs, {first.direction}, {first.metric})"
            + (" \\[95 % bootstrap over pairs]" if intervals else "; intervals are in compare.csv"),
            title_justify="left",
        )
        table.add_column("model")
        table.add_column("nodes")
        for method in methods:
            table.add_column(method, justify="right")
        for model in dict.fromkeys(rows.model):
            for kind in kinds:
                cells = rows[(rows.model == model) & (rows.kind == kind)].set_index("method")
                best = cells.pcc.max()
                table.add_row(model, KIND_TITLES.get(kind, kind), *(_pcc(cells.loc[m], best, intervals) for m in methods))
            table.add_section()
        tables.append(table)
        tables.append(_other_measures(rows, methods, kinds))
    return tables


def _pcc(row: Any, best: float, with_interval: bool) -> str:
    if row.pcc != row.pcc:
        return f"— ({row.note})"
    text = f"{row.pcc:.3f}"
    interval = f" [{row.pcc_lo:.2f}, {row.pcc_hi:.2f}]".replace("[", "\\[") if with_interval and row.pcc_lo == row.pcc_lo else ""
    return (f"[bold]{text}[/]" if row.pcc == best else text) + interval


def _other_measures(rows: Any, methods: list[str], kinds: list[str]) -> Table:
    table = Table(title=f"per-pair PCC / Spearman / top-{rows.iloc[0].k} overlap; cost per pair", title_justify="left")
    table.add_column("model")
    table.add_column("method")
    for kind in kinds:
        table.add_column(KIND_TITLES.get(kind, kind), justify="right")
    for name in ("forward", "backward", "seconds"):
        table.add_column(name, justify="right")
    for model in dict.fromkeys(rows.model):
        for method in methods:
            cells = rows[(rows.model == model) & (rows.method == method)].set_index("kind")
            measures = [
                " / ".join(_cell(float(cells.loc[k][m]), 2) for m in ("pcc_per_pair", "spearman", "topk"))
                for k in kinds
            ]
            one = cells.iloc[0]
            table.add_row(
                model,
                method,
                *measures,
                f"{one.forwards_per_pair:g}",
                f"{one.backwards_per_pair:g}",
                f"{one.seconds:.2f}",
            )
    return table
