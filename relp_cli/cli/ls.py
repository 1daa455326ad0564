"""relp ls tasks|methods|models|nodes|rules|runs (imports no torch, but for rules)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from relp_cli.cli.common import JsonFlag, out, print_json
from relp_cli.errors import RelpError, unknown


def command(
    what: Annotated[str, typer.Argument(help="tasks, methods, models, nodes, rules, jobs, cases or runs")],
    json: JsonFlag = False,
) -> None:
    """List what there is.

    Example: relp ls methods
    """
    if what not in LISTS:
        raise unknown("list", what, LISTS)
    rows = LISTS[what]()
    if json:
        print_json(rows)
        return
    if not rows:
        out.print(f"no {what}")
        return
    from relp_cli.report.terminal import Column, print_table

    names = list(dict.fromkeys(key for row in rows for key in row))
    print_table(out, [Column(name, [str(row.get(name, "")) for row in rows]) for name in names])


def _tasks() -> list[dict[str, Any]]:
    from relp_cli.tasks.spec import list_tasks, read_task

    return [{"task": t, "metric": (s := read_task(t).spec).metric, "description": s.description} for t in list_tasks()]


def _methods() -> list[dict[str, Any]]:
    from relp_cli.methods.table import METHODS

    return [
        {"method": m.name, "for": ", ".join(m.serves), "estimates": m.estimates, "cost": m.cost, "addresses": m.addresses,
         "source": m.source}
        for _, m in METHODS.items()
    ]  # fmt: skip


def _models() -> list[dict[str, Any]]:
    from relp_cli.models.catalog import card, embedded_names, shape_of

    rows = []
    for name in embedded_names():
        solved = {task: cell["accuracy"] for task, cell in card(name).get("heldout", {}).items()}
        accuracy = ", ".join(f"{t} {a:.2f}" for t, a in solved.items())
        rows.append({"model": name, **shape_of(name), "held-out accuracy": accuracy})
    return rows


def _nodes() -> list[dict[str, Any]]:
    from relp_cli.nodes.kinds import NODE_KINDS

    return [
        {"kind": k.name, "axes": ", ".join(k.axes), "hook": k.hook, "what": k.description}
        for _, k in NODE_KINDS.items()
    ] + [
        {"kind": kind, "axes": axes, "hook": "embedding, attention, MLP, residual stream", "what": what}
        for kind, axes, what in (
            (
                "feature",
                "site, pos, feature",
                "feature of a sparse autoencoder (--dictionary); its error terms come with it",
            ),
            (
                "feature_error",
                "site, pos",
                "what the autoencoder leaves out of a site's activation; scored with feature",
            ),
        )
    ]


def _rules() -> list[dict[str, Any]]:
    from relp_cli.lrp.rules import RULE_SETS, RULES
    from relp_cli.models.families import FAMILIES

    presets = {name: [f.name for _, f in FAMILIES.items() if name in f.rules] for name in RULES}
    return [
        {"rule": r.name + (f"={r.default:g}" if r.default is not None else ""), "acts on": r.site,
         "what": r.description, "preset of": ", ".join(presets[r.name]), "source": r.source}
        for _, r in RULES.items()
    ] + [
        {"rule": r.name, "acts on": "all of these", "what": f"{r.description}: {', '.join(r.rules)}", "preset of": "",
         "source": r.source}
        for _, r in RULE_SETS.items()
    ]  # fmt: skip


def _jobs() -> list[dict[str, Any]]:
    from relp_cli.config.load import read_yaml
    from relp_cli.config.paths import find_config, list_configs

    return [
        {"job": name, "description": read_yaml(find_config("jobs", name)).values.get("description", "")}
        for name in list_configs("jobs")
    ]


def _cases() -> list[dict[str, Any]]:
    from relp_cli.known.case import case_names, read_case

    return [
        {"case": c.name, "kind": c.kind, "nodes": " ".join(c.nodes), "edges": "" if c.edges is None else len(c.edges),
         "about": c.about}
        for c in map(read_case, case_names())
    ]  # fmt: skip


def _runs() -> list[dict[str, Any]]:
    from relp_cli.runs.rundir import RunDir

    rows: list[dict[str, Any]] = []
    for path in sorted(Path("runs").glob("**/run.json")):
        keys = ("task", "model", "method", "direction", "pairs")
        try:
            record = RunDir(path.parent).read()
            spec, made = record["spec"], str(record.get("provenance", {}).get("created", ""))
            nodes, done = ", ".join(spec["nodes"]), ", ".join(["scored", *_later(path.parent)])
            rows.append(
                {"run": str(path.parent)}
                | {k: spec[k] for k in keys}
                | {"nodes": nodes, "made": made[:16], "state": done}
            )
        except (RelpError, KeyError):
            rows.append({"run": str(path.parent), "task": "(damaged run.json)"})
    return rows


def _later(folder: Path) -> list[str]:
    """What was made of a run's scores."""
    files = {"circuit.json": "circuit", "evaluation.csv": "evaluated", "tests.csv": "tested", "report.html": "report"}
    return [what for name, what in files.items() if (folder / name).is_file()]


LISTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "tasks": _tasks,
    "methods": _methods,
    "models": _models,
    "nodes": _nodes,
    "rules": _rules,
    "jobs": _jobs,
    "cases": _cases,
    "runs": _runs,
}
