"""Published numbers (datasets/published/*.yaml, each with its source) and ours beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.config.load import read_yaml
from relp_cli.config.paths import data_root
from relp_cli.errors import RelpError, unknown
from relp_cli.report.curves import at, curve, mean_curve, reach
from relp_cli.report.names import kind_title, need, varying


def published(name: str) -> dict[str, Any]:
    """The data file `datasets/published/<name>.yaml`. Raises: RelpError for an unknown name."""
    folder = data_root("datasets") / "published"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise unknown("published table", name, [p.stem for p in folder.glob("*.yaml")])
    return read_yaml(path).values


def published_table5() -> pd.DataFrame:
    """The paper's Table 5, one row per number: model (the paper's name), task, kind, method, pcc."""
    data = published("relp_table5")
    return pd.DataFrame(
        {"model": m["name"], "task": data["task"], "kind": kind, "method": method, "pcc": value}
        for m in data["models"]
        for method in ("atp", "relp")
        for kind, value in zip(data["columns"], m[method], strict=True)
    )


def published_figure3() -> pd.DataFrame:
    """Points of the paper's Figure 3: model, kind, n_nodes, faithfulness, from ("text" or "figure")."""
    data = published("figure3")
    return pd.DataFrame(
        {
            "model": data["model"],
            "kind": f["kind"],
            "n_nodes": f["nodes"],
            "faithfulness": f["value"],
            "from": f["from"],
        }
        for f in data["faithfulness"]
    )


def published_name(model: str, models: list[dict[str, Any]]) -> str | None:
    """The paper's name of a model that was loaded by a hub name or from a local folder named like one; else None."""
    for row in models:
        known = {hub.casefold() for hub in row["hub"]} | {Path(hub).name.casefold() for hub in row["hub"]}
        if model.casefold() in known or Path(model).name.casefold() in known:
            return str(row["name"])
    return None


def beside(ours: pd.DataFrame) -> pd.DataFrame:
    """Our numbers beside the paper's: `compare`'s rows (with pcc) beside Table 5, `evaluate`'s rows (with faithfulness)
    beside Figure 3. `attrs["notes"]` has the source and what differs in the setting."""
    if "pcc" in ours.columns:
        return beside_table5(ours)
    if "faithfulness" in ours.columns:
        return beside_figure3(ours)
    raise RelpError("beside: expected a table with a column 'pcc' (Table 5) or 'faithfulness' (Figure 3)")


def beside_table5(ours: pd.DataFrame) -> pd.DataFrame:
    """One row per model and node kind; per method the paper's PCC, ours, and ours − paper. Models of the paper that did
    not run and models of ours that the paper lacks are there too, with — for what is missing."""
    need(ours, ("model", "method", "kind", "pcc"), "beside table 5")
    data, paper = published("relp_table5"), published_table5()
    if "task" in ours.columns:
        ours = ours[ours.task == data["task"]]
    ours = ours.assign(model=[published_name(str(m), data["models"]) or m for m in ours.model])
    theirs = {(r["model"], r["kind"], r["method"]): r["pcc"] for r in paper.to_dict("records")}
    more = varying(ours)
    kinds = [k for k in paper.kind.unique() if k in set(ours.kind) or ours.empty] + [
        k for k in ours.kind.unique() if k not in set(paper.kind)
    ]
    methods = list(dict.fromkeys([*paper.method, *ours.method]))
    settings = list(ours[more].drop_duplicates().itertuples(index=False, name=None)) if more else [()]
    mine = {tuple(r[k] for k in ("model", "kind", "method", *more)): r["pcc"] for r in ours.to_dict("records")}
    rows = []
    for model in dict.fromkeys([*paper.model, *ours.model]):
        for kind in kinds:
            for setting in settings:
                row = {"model": model, "nodes": kind_title(kind), **dict(zip(more, setting, strict=True))}
                for method in methods:
                    published_value = theirs.get((model, kind, method), math.nan)
                    value = mine.get((model, kind, method, *setting), math.nan)
                    row |= {f"{method} paper": published_value, f"{method} ours": value}
                    row |= {f"{method} ours − paper": value - published_value}
                rows.append(row)
    table = pd.DataFrame(rows)
    table = table.drop(columns=[c for c in table.columns if c.endswith("paper") and table[c].isna().all()])
    table.attrs["notes"] = [f"paper: {data['source']}; {data['measure']}, {data['pairs']} pairs", *_differs(ours, data)]
    return table


def _differs(ours: pd.DataFrame, data: dict[str, Any]) -> list[str]:
    """What our rows were measured with that the paper's were not."""
    notes = []
    for name, theirs in (("metric", data["metric"]), ("direction", "noising"), ("n_pairs", data["pairs"])):
        if name in ours.columns and (others := sorted({str(v) for v in ours[name]} - {str(theirs)})):
            notes.append(f"ours: {name} {', '.join(others)} (paper: {theirs})")
    return notes


def beside_figure3(ours: pd.DataFrame) -> pd.DataFrame:
    """One row per published point of Figure 3 and method of ours: our mean faithfulness over the structures at as many
    nodes, and the number of nodes at which ours reaches the published value (between measured points: linear in log
    nodes; — outside their range), for every model of that node kind."""
    need(ours, ("model", "task", "kind", "method", "n_nodes", "faithfulness"), "beside figure 3")
    data, paper = published("figure3"), published_figure3()
    rows = []
    for point in paper.to_dict("records"):
        chosen = ours[ours.kind == point["kind"]]
        found = list(chosen.groupby(["model", "method"], sort=False)) or [(("not run", ""), chosen)]
        for (model, method), group in found:
            mean = mean_curve([curve(g, "n_nodes", "faithfulness") for _, g in group.groupby("task", sort=False)])
            value, nodes = float(at(mean, float(point["n_nodes"]))), reach(mean, point["faithfulness"])
            rows.append(
                {
                    "nodes": kind_title(point["kind"]),
                    "n_nodes": point["n_nodes"],
                    f"{data['model']}, paper": point["faithfulness"],
                }
                | {
                    "from": point["from"],
                    "our model": model,
                    "method": method,
                    "ours": value,
                    "our nodes for as much": nodes,
                }
            )
    table = pd.DataFrame(rows)
    whole = [math.ceil(n) if n == n else n for n in table["our nodes for as much"]]
    table["our nodes for as much"] = pd.Series(whole, dtype=object)
    missing = sorted(set(data["tasks"]) - set(ours.task))
    others = [
        str(m)
        for m in ours.model.unique()
        if published_name(str(m), [{"name": data["model"], "hub": data["hub"]}]) is None
    ]
    table.attrs["notes"] = [f"paper: {data['source']}; numbers of nodes are approximate"]
    table.attrs["notes"] += [f"ours lacks the structures {', '.join(missing)}"] if missing else []
    table.attrs["notes"] += [f"not the paper's model: {', '.join(others)}"] if others else []
    return table
