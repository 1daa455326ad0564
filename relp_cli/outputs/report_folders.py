"""Pages of comparisons, jobs, diagnoses, and of several runs side by side: what their folders hold, as sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.errors import RelpError, RunFailed
from relp_cli.jobs.summary import areas_of
from relp_cli.report.bars import agreement_figure
from relp_cli.report.circuit_graph import graph_section
from relp_cli.report.curve_data import curve_panels
from relp_cli.report.dots import in_both, intervals_figure, lines_figure
from relp_cli.report.heatmap import REFERENCE
from relp_cli.report.interval_data import agreement_panels, interval_panel
from relp_cli.report.lead import agreement_lead
from relp_cli.report.names import kind_title, model_title, varying
from relp_cli.report.page import Page, Picture, Section, Sheet, script_data, script_text
from relp_cli.report.published import beside
from relp_cli.report.side import side_by_side
from relp_cli.report.tables import read_table
from relp_cli.runs.checked import score_spec
from relp_cli.runs.evaluated import circuit_of, read_evaluation, read_sweep
from relp_cli.runs.made import command_of, read_made, when
from relp_cli.runs.pairs import read_pairs, token_examples
from relp_cli.runs.rundir import RunDir
from relp_cli.runs.scoring import open_run
from relp_cli.runs.spec import ScoreSpec, method_names
from relp_cli.spaces.scores import SIGN, Scores
from relp_cli.studies.comparing import shared_tokens
from relp_cli.studies.diagnosing import RECORD, read_diagnosis
from relp_cli.studies.evaluating import own_circuit
from relp_cli.tasks.counted import pairs_text

FREE = (
    "method",
    "params",
    "keep_examples",
    "nodes",
    "batch_size",
    "memory",
    "dtype",
)  # what runs side by side may differ in
MOST_BYTES = 3_000_000  # of the sections of scores on one page


def runs_page(paths: Sequence[Path]) -> Page:
    """Several runs of one task and model, side by side. Raises RelpError where they are not."""
    opened = [open_run(path) for path in paths]
    first = opened[0]
    for path, (_, spec, scores) in zip(paths[1:], opened[1:], strict=True):
        wrong = [k for k in ScoreSpec.model_fields if k not in FREE and getattr(spec, k) != getattr(first[1], k)]
        wrong += [k for k in ("task_hash", "revision", "metric") if scores.meta.get(k) != first[2].meta.get(k)]
        if wrong:
            raise RelpError(
                f"runs {paths[0]} and {path} cannot stand side by side: they differ in {', '.join(dict.fromkeys(wrong))}"
            )
    names = _names([(path, spec) for path, (_, spec, _) in zip(paths, opened, strict=True)])
    by_name = {name: one for name, (_, _, one) in zip(names, opened, strict=True)}
    meta = first[2].meta
    section = side_by_side("scores", "Scores", by_name, _tokens(first[0], first[2]), [f"{SIGN}."])
    costs = pd.DataFrame([{"run": n, **{k: s.meta.get(k) for k in _COSTS}} for n, s in by_name.items()])
    records = [run.read() for run, _, _ in opened]
    return Page(
        f"{meta.get('task', '?')} · {meta['model']}: {len(paths)} runs side by side",
        f"{', '.join(names)} · {pairs_text(meta['n_pairs'], meta.get('n_prompts'))} · {meta['direction']} · {meta['metric']}",
        (section, Section("cost", "Cost", ("Passes per pair, and seconds in all.",), sheets=(Sheet("cost", costs),))),
        tuple(dict.fromkeys(line for record in records for line in record.get("notes", []))),
        tuple((f"run {path}", f"hash {record['hash']}, {spec.method}") for path, record, (_, spec, _) in
              zip(paths, records, opened, strict=True)),
        tuple(_of_record(record) for record in records), _graph(dict(zip(names, opened, strict=True))),
    )  # fmt: skip


def _graph(runs: Mapping[str, tuple[RunDir, ScoreSpec, Scores]]) -> str:
    """The first run's graph, or that of the first one with a circuit; cards of nodes have all runs' scores."""
    name = next((n for n, (run, *_) in runs.items() if run.circuit.is_file()), next(iter(runs)))
    run, _, scores = runs[name]
    circuit = own_circuit(run, scores) if run.circuit.is_file() else None
    evaluation, sweep = read_evaluation(run.path / "evaluation.csv"), read_sweep(run.path)
    if circuit_of(evaluation) not in (None, circuit and circuit.hash):
        evaluation = None  # of another circuit
    pairs = read_pairs(run, run.read())
    by_name = {name: scores} | {n: one for n, (*_, one) in runs.items()}
    examples = None if pairs is None else token_examples(pairs)
    return graph_section(by_name, circuit, evaluation, examples, sweep=None if sweep is None else sweep[1])


_COSTS = ("forwards_per_pair", "backwards_per_pair", "seconds", "rules")


def comparison_page(folder: Path) -> Page:
    """compare.csv, and below it every task × model with its methods side by side."""
    file = folder / "compare.csv"
    table = read_table(file)
    first = table.iloc[0]
    rows = tuple(dict.fromkeys(zip(table.task, table.model, strict=True)))
    note = f"PCC over {first.axis}; [lo, hi]: 95 % bootstrap over pairs; topk: overlap of the {first.k} strongest."
    sections = [
        Section(
            "agreement", "Agreement with exact patching", (note,), intervals=agreement_panels(table), pictures=_bars(table),
            sheets=(*_measures(table), Sheet("compare", table, "All measures", fold=True)),
        )
    ]  # fmt: skip
    made = read_made(file) or {}
    cells = made.get("cells", [])
    notes = [] if cells else ["this comparison does not say which runs it is of: relp compare again, for its heatmaps"]
    for number, cell in enumerate(cells):
        paths = {name: folder / path for name, path in cell["runs"].items()}
        title, before = f"{cell['task']}, {cell['model']}", len(sections)
        sections, said = _add_side(sections, f"scores-{number}", title, paths, cell.get("reference", REFERENCE))
        notes += said
        if len(sections) == before and not said:
            notes.append(_too_large(len(cells) - number, len(cells), folder))
            break
    return Page(
        "Comparison: " + (f"{first.task} · {model_title(first.model)}" if len(rows) == 1 else f"{len(rows)} tasks × models"),
        f"{', '.join(f'{t} on {model_title(m)}' for t, m in rows)} · {pairs_text(first.n_pairs, first.get('n_prompts'))} · "
        f"{first.direction} · {first.metric}",
        tuple(sections), (*made.get("notes", []), *notes), (("file", str(file)),), (command_of(file),),
        lead=tuple(agreement_lead(table)),
    )  # fmt: skip


def job_page(folder: Path) -> Page:
    """results.csv of a batch job: agreement, curves, failed cells, and the scores of each of its groups."""
    file = folder / "results.csv"
    table, made = read_table(file), read_made(file) or {}
    job = made.get("job", {})
    sections = []
    agreement, circuits = (table[table.what == part].dropna(axis=1, how="all") for part in ("agreement", "evaluation"))
    if len(agreement) and "pcc" in agreement:
        sheets = [*_measures(agreement)]
        if job.get("published") == "table5":
            sheets.append(Sheet("published", beside(agreement), "Beside the paper's Table 5"))
        sections.append(
            Section(
                "agreement",
                "Agreement with exact patching",
                intervals=agreement_panels(agreement),
                pictures=_bars(agreement),
                sheets=tuple(sheets),
            )
        )
    if len(circuits):
        measured = circuits.reindex(columns=list(dict.fromkeys([*circuits.columns, "faithfulness", "completeness"])))
        sheets = [Sheet("areas", areas_of(measured), "Areas under the curves", by="CPR", fold=True)]
        if job.get("published") == "figure3":
            sheets.append(Sheet("published", beside(measured), "Beside the paper's Figure 3"))
        said = "Faithfulness and completeness on held-out pairs."
        sections.append(Section("circuits", "Circuits", (said,), curves=curve_panels(measured), sheets=tuple(sheets)))
    failed = pd.DataFrame(list(dict(made.get("errors", {})).items()), columns=["cell", "error"])
    if len(failed):
        sections.append(Section("failed", "Cells that failed", sheets=(Sheet("failed", failed),)))
    sections.append(Section("rows", "All rows", sheets=(Sheet("results", table, fold=True),)))
    notes = [f"{len(failed)} cells failed"] if len(failed) else []
    groups, unread = _groups(folder / "scores")
    notes += [f"{unread} of its runs cannot be read"] if unread else []
    order = {method: i for i, method in enumerate(job.get("methods", []))}
    for number, (title, unsorted) in enumerate(groups):
        paths = {name: unsorted[name] for name in sorted(unsorted, key=lambda n: order.get(n, len(order)))}
        before = len(sections)
        sections, why = _add_side(sections, f"scores-{number}", title, paths)
        notes += why
        if len(sections) == before and not why:
            notes.append(_too_large(len(groups) - number, len(groups), folder))
            break
    axes = [(axis, ", ".join(map(str, job[axis]))) for axis in ("tasks", "models", "methods", "kinds") if axis in job]
    return Page(
        f"Job {job.get('name', folder.name)}", str(job.get("description", "") or f"{len(table)} rows"), tuple(sections),
        tuple(notes), (("file", str(file)), *axes), (command_of(file),),
        lead=tuple(agreement_lead(agreement)) if len(agreement) and "pcc" in agreement else (),
    )  # fmt: skip


def diagnosis_page(folder: Path) -> Page:
    """What `relp diagnose --output` wrote."""
    found = read_diagnosis(folder)
    about, tables = found.about, found.tables
    nodes, methods = tables["nodes"], tables["methods"]
    nodes = nodes.assign(reason=nodes.reason.fillna(""), unit=nodes.unit.astype("Int64").where(nodes.unit >= 0))
    names, place = [m for m in methods.method if m in nodes], ["kind", "layer", "position", "unit"]
    why = ["why"] if "why" in nodes else []  # diagnoses of older versions do not say it
    patched = nodes[nodes.exact.notna()][[*place, "reason", *why, "exact", *names]]
    suspects = nodes[nodes.reason != ""].sort_values("moved", ascending=False)[
        [*place, "reason", "repair", "moved", *names]
    ]
    panels = [
        {"kind": kind, "x": "exact", "y": m, "title": f"{kind_title(kind)}: {m}"}
        for kind in dict.fromkeys(patched.kind)
        for m in dict.fromkeys([about["diagnosed"], about["recommended"]])
    ]
    wrong = "Σ|estimate − exact| / Σ|exact| on the patched nodes"
    ends = ("error", "lo", "hi")
    bars = Picture(
        "methods", f"{wrong}, with 95 % bootstrap over nodes.", intervals_figure(methods, "method", ends, wrong)
    )
    layers = [c for c in tables["gradient"].columns if c.startswith("layer ")]
    path = in_both(
        "gradient", "Gradient norm along the path from the run to its source, relative to its mean, per layer.",
        lambda theme: lines_figure(tables["gradient"], "alpha", layers, ("share of the path", "relative norm"), theme),
    )  # fmt: skip
    causes = tables.get("causes", pd.DataFrame())
    said = f"Shares of {about['diagnosed']}'s Σ|error| over the patched nodes; nodes: where the cause has the largest part."
    sections = (
        Section("summary", "Summary", tuple(f"• {line}" for line in about["summary"])),
        *([Section("causes", "Causes of errors", (said,), sheets=(Sheet("causes", causes, by="share"),))] if len(causes) else []),
        Section("methods", "Methods", intervals=interval_panel(methods, "method", ends, "error"), pictures=(bars,),
                sheets=(Sheet("methods", methods.sort_values("error")),)),
        Section("patched", "Patched exactly", ("Suspects and random controls; the dashed line is equality.",),
                scatters={"table": "patched", "words": place, "panels": panels},
                sheets=(Sheet("patched", patched, by="exact", sizes=("exact", *names)),)),
        Section("suspects", "Suspects", (f"Their {about['diagnosed']} score a repair moves by more than {about['floor']:.3g}.",),
                sheets=(Sheet("suspects", suspects, by="moved"),)),
        Section("attention", "Attention", sheets=(Sheet("attention", tables["attention"], by="moved"),)),
        Section("cancellation", "Cancellation", sheets=(Sheet("cancelling", tables["cancelling"], by="offset"),)),
        Section("gradient", "Gradient along the path", pictures=(path,), sheets=(Sheet("gradient", tables["gradient"]),)),
    )  # fmt: skip
    keys = ("task", "model", "direction", "metric", "pairs")
    return Page(
        f"Diagnosis of {about['diagnosed']}: {about['task']} · {about['model']}",
        f"{pairs_text(about['pairs'], about.get('prompts'))} · {about['direction']} · "
        f"{about['metric']} · recommended: {about['recommended']}",
        sections, tuple(about.get("notes", [])), tuple((k, str(about[k])) for k in keys), (command_of(folder / RECORD),),
        lead=(("Best", about["recommended"]), ("Error", _errors(methods)),
              ("Trust", f"{pairs_text(about['pairs'], about.get('prompts'))}; {len(patched):,} nodes were patched exactly, "
                        "suspects and random controls.")),
    )  # fmt: skip


def _errors(methods: pd.DataFrame) -> str:
    rows = methods.sort_values("error").to_dict("records")
    text = ", ".join(f"{r['method']} {r['error']:.2f} [{r['lo']:.2f}, {r['hi']:.2f}]" for r in rows)
    return f"{text}: Σ|estimate − exact| as a share of Σ|exact|, 0 is perfect."


def _too_large(left: int, of: int, folder: Path) -> str:
    return (
        f"the scores of {left} of {of} groups of runs are not on this page, which would be too large (relp report RUN RUN… of "
        f"{folder / 'scores'} shows them)"
    )


def _add_side(
    sections: list[Section], id: str, title: str, paths: dict[str, Path], reference: str = REFERENCE
) -> tuple[list[Section], list[str]]:
    """The sections with one more, of these runs, unless the page would be too large; and what else is the reason, if not."""
    try:
        opened = {name: open_run(path) for name, path in paths.items()}
        first = next(iter(opened.values()))
        scores = {name: replace(one, examples=None, present=None) for name, (_, _, one) in opened.items()}
        more = side_by_side(id, title, scores, _tokens(first[0], first[2]), [f"{SIGN}."], reference)
    except (RelpError, RunFailed) as error:
        return sections, [f"{title}: its scores are not shown ({error})"]
    both = [*sections, more]
    size = len(script_text(script_data(both)))
    alone = not any(s.scatters for s in sections)
    return (both, []) if alone or size < MOST_BYTES else (sections, [])


def _groups(folder: Path) -> tuple[list[tuple[str, dict[str, Path]]], int]:
    """The runs of a folder that can stand side by side, two and more with a title; and how many runs cannot be read."""
    unread = 0
    by_key: dict[str, list[tuple[Path, ScoreSpec]]] = {}
    for file in sorted(folder.glob("*/run.json")):
        try:
            record = RunDir(file.parent).read()
            spec = score_spec(f"run record {file}: ", **record["spec"])
        except (RelpError, RunFailed):
            unread += 1
            continue
        shared = spec.model_dump(mode="json", exclude={*FREE} - {"nodes"})
        by_key.setdefault(str(shared), []).append((file.parent, spec))
    groups = [runs for runs in by_key.values() if len(runs) > 1]
    firsts = [runs[0][1] for runs in groups]
    titles = [f"{Path(s.task).stem}, {model_title(s.model)}, {', '.join(map(kind_title, s.nodes))}" for s in firsts]
    more = [
        f"{t}, {s.direction}, seed {s.seed}" if titles.count(t) > 1 else t for t, s in zip(titles, firsts, strict=True)
    ]
    named = [dict(zip(_names(r), (path for path, _ in r), strict=True)) for r in groups]
    return list(zip(more, named, strict=True)), unread


def _names(runs: Sequence[tuple[Path, ScoreSpec]]) -> list[str]:
    """A run's method, with its dtype where these are several, and its folder's name where two runs have the same one."""
    methods = method_names([spec for _, spec in runs])
    return [m if methods.count(m) == 1 else f"{m} ({path.name})" for m, (path, _) in zip(methods, runs, strict=True)]


def _tokens(run: RunDir, scores: Scores) -> list[str] | None:
    pairs = read_pairs(run, run.read())
    return None if pairs is None else shared_tokens(pairs, scores)


def _of_record(record: dict[str, Any]) -> tuple[str, str]:
    said = record.get("provenance", {})
    return str(said.get("command", "?")), when(said)


def _measures(table: pd.DataFrame) -> tuple[Sheet, ...]:
    """PCC and slope, which tables of older versions do not have."""
    titles = {"pcc": "PCC", "slope": "Slope: 1 where scores are as large as the exact ones, 2 where twice as large"}
    return tuple(Sheet(name, _by_method(table, name), title) for name, title in titles.items() if name in table)


def _by_method(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """One measure: a row per task, model, node kind and whatever else varies, a column per method."""
    keys = [*(k for k in ("task", "model") if k in table), *varying(table), "kind"]
    rows = []
    for key, group in table.groupby(keys, sort=False, dropna=False):
        values = dict(zip(group.method, group[measure], strict=True))
        rows.append(dict(zip(keys, key, strict=True)) | {m: values.get(m) for m in dict.fromkeys(table.method)})
    out = pd.DataFrame(rows)
    return out.assign(kind=out.kind.map(kind_title))


def _bars(table: pd.DataFrame) -> tuple[Picture, ...]:
    caption = "PCC with exact patching, with 95 % bootstrap over pairs."
    return (Picture("agreement", caption, agreement_figure(table)),)
