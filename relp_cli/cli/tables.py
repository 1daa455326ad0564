"""Terminal forms of a few results. Plain tables go through `report.tables.show`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from relp_cli.cli.common import out
from relp_cli.report.names import kind_title
from relp_cli.report.tables import cell, rests_on_one, show
from relp_cli.tasks.counted import pairs_text

if TYPE_CHECKING:
    from relp_cli.spaces.scores import Scores


def show_scores(scores: Scores, k: int = 10) -> None:
    """The k nodes of each kind with the largest |mean score|, and the rules that were applied."""
    from relp_cli.report.digest import top_nodes

    meta = scores.meta
    table = top_nodes(scores, k)
    if meta["rules"]:
        table.attrs["notes"] = ["rules applied (layers): " + ", ".join(f"{r}×{n}" for r, n in meta["rules"].items())]
    where = f"{meta.get('task', '?')}, {meta['model']} ({meta['family']}), {pairs_text(meta['n_pairs'], meta.get('n_prompts'))}"
    show(named(table), out, f"{meta['method']} on {where}, {meta['direction']}, {meta['metric']}", digits=4)


def named(table: pd.DataFrame) -> pd.DataFrame:
    """`top_nodes`' rows for a terminal: edges are called so, and a column without any unit is left out."""
    out_ = table.drop(columns="unit") if table["unit"].isna().all() else table
    edges = len(out_) and (out_["kind"] == "edges").all()
    return out_.drop(columns="kind").rename(columns={"position": "edge"}) if edges else out_


def show_evaluation(df: pd.DataFrame, title: str) -> None:
    """`evaluate`'s rows, intervals in the cells, one line per circuit."""
    rows = [
        {
            "τ": "—" if pd.isna(r["tau"]) else f"{r['tau']:.6g}",
            "edges" if r.get("kind") == "edges" else "nodes": f"{r['n_nodes']}/{r['n_possible']}",
            **{n: _interval(r, n) for n in ("faithfulness", "completeness")},
            "random": r.get("random_faithfulness"),
            "F(C)": r["F_C"],
            "note": r["note"],
        }
        for r in df.to_dict("records")
    ]
    table = pd.DataFrame(rows)
    if len(table) > 1 and table["note"].nunique() == 1:  # said once
        table.attrs["notes"] = [note for note in (table["note"].iloc[0],) if note]
        table = table.drop(columns="note")
    show(table, out, title)


def _interval(row: Any, name: str) -> str:
    if pd.isna(row[name]):
        return "—"
    return f"{row[name]:z.2f} [{row[f'{name}_lo']:z.2f}, {row[f'{name}_hi']:z.2f}]"


def show_agreement(df: pd.DataFrame) -> None:
    """Per task, in the form of the paper's Table 5 (rows model × nodes, a column per method): PCC with its interval;
    then per method the other measures and the cost."""
    if "slope" not in df:  # of an older version
        df = df.assign(slope=float("nan"))
    for task, rows in df.groupby("task", sort=False):
        first, methods = rows.iloc[0], list(dict.fromkeys(rows.method))
        intervals = len(methods) <= 4  # more do not fit beside each other
        table = [
            {"model": model, "nodes": kind_title(str(kind))}
            | {str(c.method): _pcc(c, intervals) for c in part.itertuples()}
            for (model, kind), part in rows.groupby(["model", "kind"], sort=False)
        ]
        about = f"{pairs_text(first.n_pairs, first.get('n_prompts'))}, {first.direction}, {first.metric}"
        what = "[95 % bootstrap over pairs]" if intervals else "(intervals: compare.csv)"
        reference = str(first.get("reference", "act_patch"))  # a job's table has no such column
        exact = "exact patching" if reference in ("act_patch", "edge_patch") else reference
        title = f"{task}: PCC with {exact} over {first.axis}, {about} {what}"
        agreed = pd.DataFrame(table)
        agreed.attrs["notes"] = rests_on_one(rows)
        show(agreed, out, title, keys=2)
        title = f"{task}: per-pair PCC / Spearman / top-{first.k} overlap / slope, and cost per pair"
        measures = _measures(rows)
        measures.attrs["notes"] = [f"slope: 1 where scores are as large as those of {exact}, 2 where twice as large"]
        show(measures, out, title, 2, keys=2)


def _pcc(row: Any, interval: bool) -> str:
    if row.pcc != row.pcc:
        return f"— ({row.note})"
    return f"{row.pcc:.3f}" + (
        f" [{row.pcc_lo:.3f}, {row.pcc_hi:.3f}]" if interval and row.pcc_lo == row.pcc_lo else ""
    )


def _measures(rows: pd.DataFrame) -> pd.DataFrame:
    table = []
    for (model, method), part in rows.groupby(["model", "method"], sort=False):
        measures = {
            kind_title(str(c.kind)): " / ".join(cell(v, 2) for v in (c.pcc_per_pair, c.spearman, c.topk, c.slope))
            for c in part.itertuples()
        }
        one = part.iloc[0]
        cost = {"forward": one.forwards_per_pair, "backward": one.backwards_per_pair, "seconds": one.seconds}
        table.append({"model": model, "method": method, **measures, **cost})
    return pd.DataFrame(table)
