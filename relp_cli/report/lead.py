"""What a page says first: of a run what was scored, whether the model does the task, the strongest units, the circuit, what to
trust; of a comparison which method agrees best.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import pandas as pd

from relp_cli.errors import RelpError
from relp_cli.evaluation.areas import enough
from relp_cli.methods.table import Method, row_of
from relp_cli.report.digest import of_all_kinds, top_nodes
from relp_cli.report.heatmap import REFERENCE
from relp_cli.report.names import SITE_TITLES, kind_title
from relp_cli.report.tables import cell, rests_on_one
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import SPACES
from relp_cli.tasks.counted import pairs_text

ROUGH = 30  # independent pairs: with fewer, standard errors themselves are rough (textbooks' number for a normal mean)
FEW = ", which is few: standard errors are rough"
SURE = 2  # standard errors from 0
NAMED = 3  # units
MANY = 10_000  # patched runs a pair: exact patching of all units is nothing that a page should propose


def run_lead(
    about: Mapping[str, Any],
    behaviour: Mapping[str, Any],
    scores: Scores,
    circuit: Circuit | None = None,
    evaluation: pd.DataFrame | None = None,
    spec: Mapping[str, Any] | None = None,
) -> list[tuple[str, str]]:
    """(what, a sentence) each. about: of the scores and their run; behaviour: `Behaviour.as_dict`'s, or empty;
    evaluation: of this circuit, or of a sweep of these scores; spec: what the run was asked, as its run.json has it.
    """
    said = [("Scored", _scored(about, scores))]
    if behaviour:
        said.append(("Model", _does(behaviour)))
    top = top_nodes(scores, 10)
    top = top[top.score != 0]
    if len(top):
        said.append(("Strongest", _named(top) + _estimated(str(about.get("method", "?")), top)))
    if circuit is not None:
        noun = SPACES[circuit.units.space].noun
        kept = f"{circuit.n_nodes:,} of {circuit.n_possible:,} {noun}"
        said.append(("Circuit", kept + _measured(circuit, evaluation)))
    elif evaluation is not None and of_all_kinds(evaluation, scores.units) and (row := _smallest(evaluation)):
        where = f" ({counted})" if (counted := _where(row)) else ""
        kept = f"from {row['n_nodes']:,} of {row['n_possible']:,} on{where}, circuits of these scores have a "
        said.append(("Circuit", f"none chosen yet; {kept}{_faithful(row)}."))
    said.append(("Trust", _trust(about, scores.n_nodes, top, spec or {})))
    return said


def agreement_lead(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Of `compare`'s rows, one task or many: per node kind the methods by their PCC with exact patching, and how many pairs."""
    places = table[["task", "model"]].drop_duplicates() if {"task", "model"} <= {*table} else table[:1]
    said = []
    for kind, rows in table.groupby("kind", sort=False):
        order = rows.groupby("method", sort=False).pcc.mean().dropna().sort_values(ascending=False, kind="stable")
        best = ", ".join(f"{method} {value:.3f}" for method, value in order.head(4).items())
        more = f" and {len(order) - 4} more" if len(order) > 4 else ""
        said.append((kind_title(str(kind)), (best or "no method's agreement is defined") + more))
    mean = f", the mean of {len(places)} tasks × models" if len(places) > 1 else ""
    out = [("PCC", f"agreement with exact patching, 1 is perfect{mean}; the best method first."), *said]
    out += [("One alone", f"{line}.") for line in rests_on_one(table)]
    if "n_pairs" in table and len(table):
        few = table.sort_values("n_pairs").iloc[0].to_dict()
        n, prompts = int(few["n_pairs"]), few.get("n_prompts")
        alone = n if prompts is None or pd.isna(prompts) else min(n, int(prompts))
        why = f"{pairs_text(n, prompts)}{FEW if alone < ROUGH else ''}"
        out.append(("Trust", f"{why}; intervals are in the figure, costs in the table."))
    return out


def _scored(about: Mapping[str, Any], scores: Scores) -> str:
    kinds = [kind_title(kind) for kind in scores]
    metric, task = about.get("metric", "the metric"), about.get("task", "?")
    start = {"noising": "original", "denoising": "patch"}.get(str(about.get("direction")), "")
    source = {"patch": "the other prompt", "zero": "zero", "mean": "its mean over pairs"}.get(
        str(about.get("baseline", "patch")), str(about.get("baseline"))
    )
    how = f"how {metric} changes when its value on the {start} prompt is replaced by that of {source}"
    how = how.replace("that of zero", "zero").replace("that of its mean", "its mean").replace("  ", " ")
    each = "edge" if list(scores) == ["edges"] else "node"
    what = f"{scores.n_nodes:,} units ({', '.join(kinds)}) of {about.get('model', '?')} on {task}"
    return f"{what} by {about.get('method', '?')}: for each {each}, {how}."


def _does(behaviour: Mapping[str, Any]) -> str:
    """Whether the model does the task, as the test against chance has it."""
    n, share = int(behaviour.get("n", 0)), float(behaviour["accuracy"])
    sure = ""
    if "accuracy_lo" in behaviour:
        sure = f" (accuracy {share:.2f} [{behaviour['accuracy_lo']:.2f}, {behaviour['accuracy_hi']:.2f}])"
    verdict = {"above": "does the task", "at": "is at chance", "below": "is below chance"}
    does = verdict.get(str(behaviour.get("against_chance", "")), "")
    right = f"{round(share * n)} of {n} pairs right{sure}"
    unsure = ", too few to tell from chance" if behaviour.get("against_chance") == "undecided" else ""
    return f"{does}: {right}." if does else f"{right}{unsure}."


def _named(top: pd.DataFrame) -> str:
    """The strongest unit of every kind, or several where there is one kind."""
    each = top.drop_duplicates("kind") if top.kind.nunique() > 1 else top.head(NAMED)
    return "; ".join(f"{_unit(r)} {_signed(r['score'])}{_error(r)}" for r in each.to_dict("records")) + "."


def _estimated(method: str, top: pd.DataFrame) -> str:
    """That estimates are none of the effects themselves, and what their ± leaves out."""
    row = _row(method)
    if row is None or _exact(method):
        return ""
    effects = row_of(row.alias_of or row.name).estimates.lstrip("|").startswith("c(")
    spread = "± is the standard error over pairs" if top.se.notna().any() else ""
    if not effects:
        return f" These are scores of {method}, not effects{'; ' if spread else ''}{spread}."
    return f" Estimated by {method}, not measured{f'; {spread}, without the error of {method}' if spread else ''}."


def _unit(row: Mapping[Any, Any]) -> str:
    kind, layer, unit, position = row["kind"], row["layer"], row["unit"], str(row["position"])
    if kind == "edges":
        return position.removesuffix(" @ *")
    where = "" if position == "*" else f" at {position}"
    numbered = "" if pd.isna(unit) else f" {int(unit)}"
    if isinstance(layer, str):  # of features: their site
        return f"{_one(kind)} {SITE_TITLES.get(layer, layer)}{numbered}{where}"
    return f"layer {layer} {_one(kind)}{numbered}{where}"


def _one(kind: str) -> str:
    """heads → head, queries → query."""
    title = kind_title(kind)
    return f"{title[:-3]}y" if title.endswith("ies") else title.removesuffix("s")


def _measured(circuit: Circuit, evaluation: pd.DataFrame | None) -> str:
    """What was measured of this circuit, or of the circuit of a sweep that has its threshold."""
    if evaluation is None or not len(evaluation) or "faithfulness" not in evaluation:
        return "; not evaluated yet."
    if "circuit" in evaluation:
        return _own(circuit, evaluation.iloc[0].to_dict())
    for row in evaluation.to_dict("records"):
        if _same(circuit, evaluation, row):
            return _own(circuit, row)
    return "; not evaluated itself (the sweep below is of others)."


def _own(circuit: Circuit, row: Mapping[Any, Any]) -> str:
    """Which part of the circuit was measured, how, and what came out."""
    where, part = _where(row), ""
    if where and {"n_nodes", "n_possible"} <= {*row}:
        part = f"its {row['n_nodes']:,} of {row['n_possible']:,} {SPACES[circuit.units.space].noun} {where}, "
    ablation = f"{row['ablation']} ablation" if isinstance(row.get("ablation"), str) else ""
    how = f"{part}{ablation}".removesuffix(", ")
    return f"; measured: {how}{': ' if how else ''}{_faithful(row)}."


def _where(row: Mapping[Any, Any]) -> str:
    """The layers that were ablated and counted, where these are not all."""
    first = row.get("exclude_layers")
    if first is None or pd.isna(first) or not int(first):
        return ""
    return f"from layer {int(first)} up, lower layers whole"


def _same(circuit: Circuit, evaluation: pd.DataFrame, row: Mapping[Any, Any]) -> bool:
    """Whether a row of a sweep is of this circuit: of its kinds, by its threshold, and with as many units where these count."""
    tau, first = (circuit.meta.get("selection") or {}).get("threshold"), row.get("exclude_layers")
    counted = circuit.mask if first is None or pd.isna(first) else circuit.mask[:, circuit.units.layer >= int(first)]
    alike = tau is not None and row.get("tau") == tau and of_all_kinds(evaluation, circuit.units)
    return bool(alike and row["n_nodes"] in (int(counted.sum()), circuit.n_nodes))


def _smallest(evaluation: pd.DataFrame) -> dict[str, Any] | None:
    """The smallest circuit of a sweep that, like all larger ones, is enough."""
    if not {"n_nodes", "n_possible", "faithfulness"} <= {*evaluation}:
        return None
    rows = enough(evaluation)
    return None if rows.empty else {str(k): v for k, v in rows.iloc[-1].items()}


def _faithful(row: Mapping[Any, Any]) -> str:
    text = f"faithfulness {row['faithfulness']:z.2f}"
    if not pd.isna(row.get("faithfulness_lo", float("nan"))):
        text += f" [{row['faithfulness_lo']:z.2f}, {row['faithfulness_hi']:z.2f}]"
    if not pd.isna(row.get("random_faithfulness", float("nan"))):
        text += f", of random ones of its size {row['random_faithfulness']:z.2f}"
    return text + (f", on {int(row['n_pairs'])} held-out pairs" if "n_pairs" in row else "")


def _trust(about: Mapping[str, Any], n_units: int, top: pd.DataFrame, spec: Mapping[str, Any]) -> str:
    """How many pairs, whether the method is exact, and which of the strongest are not far from 0."""
    n, method = int(about.get("n_pairs", 0)), str(about.get("method", "?"))
    text = pairs_text(n, about.get("n_prompts"))
    if min(n, int(about.get("n_prompts") or n)) < ROUGH:  # pairs of one prompt are no independent ones
        text += FEW
    if _exact(method):
        text += ". Scores are exact patching effects."
    elif n_units > MANY:
        text += (
            f". {method} is an estimate: `relp circuit RUN --top-k 20 --verify` measures the effects of the strongest."
        )
    else:
        text += f". {method} is an estimate: `{_comparison(about, spec)}` tells how well it agrees with exact patching."
    known = top[top.se.notna()]
    unsure = int((known.score.abs() < SURE * known.se).sum())
    if not unsure:  # that the strongest are far from 0 is how they were chosen
        return text
    of = f"the {len(known)} strongest" if known.kind.nunique() == 1 else f"the {len(known)} in the tables below"
    return text + f" {unsure} of {of} {'is' if unsure < 2 else 'are'} within {SURE} standard errors of 0."


def _comparison(about: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """The command that compares a run's method with exact patching, of the names that the run was asked with."""
    asked = {"model": about.get("model", "MODEL"), "method": about.get("method"), **spec}
    words = ["relp", "compare", str(asked.get("task") or about.get("task", "TASK")), "--model", str(asked["model"])]
    words += ["--methods", str(asked["method"])]
    if spec.get("nodes"):
        words += ["--nodes", ",".join(spec["nodes"])]
    for name, value in (spec.get("params") or {}).items():
        if name in ("dictionary", "rules"):
            words += [f"--{name}", value if isinstance(value, str) else ",".join(value)]
        else:
            words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    for name, usual in (("direction", "noising"), ("baseline", "patch"), ("metric", None)):
        if spec.get(name, usual) != usual:
            words += [f"--{name}", str(spec[name])]
    return shlex.join(words)


def _exact(method: str) -> bool:
    row = _row(method)
    return row is not None and REFERENCE in (row.name, row.alias_of)


def _row(method: str) -> Method | None:
    try:
        return row_of(method)
    except RelpError:
        return None


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{cell(float(value), 2)}".replace("-", "−")


def _error(row: Mapping[Any, Any]) -> str:
    return "" if pd.isna(row["se"]) else f" ± {cell(float(row['se']), 2)}"
