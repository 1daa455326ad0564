"""One self-contained HTML page of a run: its own small script, no external file and no request, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.errors import RelpError
from relp_cli.files import write_atomically
from relp_cli.nodes.kinds import mixed_warning
from relp_cli.report.canvas import LIGHT, save_figure
from relp_cli.report.circuit_graph import Examples, graph_section
from relp_cli.report.curve_data import curve_panels
from relp_cli.report.curve_plot import curves_figure
from relp_cli.report.digest import circuit_counts, top_nodes
from relp_cli.report.explore import explorer
from relp_cli.report.graph import DRAWINGS, MOST_EDGES, circuit_figure
from relp_cli.report.heatmap import Over, heatmap_figure
from relp_cli.report.lead import run_lead
from relp_cli.report.maps import map_set
from relp_cli.report.names import counted
from relp_cli.report.page import Picture, Section, Sheet, render, script_data
from relp_cli.report.pairs import pair_picker
from relp_cli.report.tables import column_cells, is_numeric
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import SIGN, Scores
from relp_cli.spaces.table import SPACES
from relp_cli.tasks.counted import pairs_text

MAX_HEADS = 128


def write_html(
    run_folder: Path,
    record: Mapping[str, Any],
    scores: Mapping[str, Scores],
    circuit: Circuit | None = None,
    evaluation: pd.DataFrame | None = None,
    tokens: Sequence[str] | None = None,
    output: Path | None = None,
    top: int = 10,
    meanings: pd.DataFrame | None = None,
    examples: Examples | None = None,
    pairs: Mapping[str, Any] | None = None,
    more: Sequence[Section] = (),
    commands: Mapping[str, tuple[str, str]] | None = None,
    sweep: pd.DataFrame | None = None,
) -> list[Path]:
    """Write the run's figures (PNG) into its folder and one page, `report.html` or `output`; returns what was written.

    record:     run.json's content: spec, scores, behaviour, notes, provenance (missing parts are left out of the page).
    scores:     method → Scores; the first is the run's own, others (such as act_patch) stand beside it in the heatmaps.
    circuit, evaluation: circuit.json and evaluation.csv, where there are. sweep: of these scores, which curves are of (None:
                evaluation, where it is one).
    tokens:     per position label the token that all pairs share there, or "".
    pairs:      pairs.json's content, for the picker of single pairs.
    more:       further sections. commands: "circuit", "evaluation" → the command that made it, and when.
    meanings:   node and meaning, of features.
    examples:   position label → a few (clean token, corrupted token).
    Raises: RelpError for no scores, or an output that cannot be written.
    """
    if not scores:
        raise RelpError(f"report of {run_folder}: no scores")
    sweep = evaluation if sweep is None else sweep
    pictures = _pictures(scores, circuit, sweep, tokens)
    written = []
    for picture in pictures:
        written.append(run_folder / f"{picture.name}.png")
        save_figure(picture.light, written[-1])
    graph = graph_section(scores, circuit, evaluation, examples, meanings, sweep)
    page = render_page(
        record, next(iter(scores.values())), pictures, circuit, evaluation, tokens, top, meanings, graph, pairs, more,
        commands, sweep,
    )  # fmt: skip
    path = output or run_folder / "report.html"
    write_atomically(path, page)
    return [path, *written]


def render_page(
    record: Mapping[str, Any],
    scores: Scores,
    pictures: Sequence[Picture],
    circuit: Circuit | None = None,
    evaluation: pd.DataFrame | None = None,
    tokens: Sequence[str] | None = None,
    top: int = 10,
    meanings: pd.DataFrame | None = None,
    graph: str = "",
    pairs: Mapping[str, Any] | None = None,
    more: Sequence[Section] = (),
    commands: Mapping[str, tuple[str, str]] | None = None,
    sweep: pd.DataFrame | None = None,
) -> str:
    """The page as text; graph: `graph_section`'s."""
    about = {**scores.meta, **dict(record.get("scores") or {})}
    labels = scores.labels
    sweep = evaluation if sweep is None else sweep
    maps = map_set({str(about.get("method", "")): scores}, tokens)
    picker = pair_picker(pairs, scores) if pairs else None
    whole = () if evaluation is None else (Sheet("evaluation", evaluation, fold=True),)
    sections = [
        Section("evaluation", "", sheets=whole, curves=_curves(sweep, scores)),
        Section("scores", "", maps=maps),
        *more,
    ]
    data = explorer(scores, sweep, tokens) | {"pairs": picker} | script_data(sections)
    return render(
        "page.html.j2",
        data,
        about=about,
        pairs_said=pairs_text(about["n_pairs"], about.get("n_prompts")) if "n_pairs" in about else "? pairs",
        title=" · ".join(str(about.get(k, "?")) for k in ("task", "model", "method")),
        sign=SIGN,
        noun=SPACES[scores.units.space].noun,
        lead=run_lead(about, record.get("behaviour") or {}, scores, circuit, evaluation, record.get("spec")),
        record=record,
        behaviour=record.get("behaviour") or {},
        provenance=record.get("provenance") or {},
        notes=record.get("notes") or [],
        kinds=[(kind, s.n_nodes) for kind, s in scores.items()],
        tops=_top_tables(scores, top),
        tokens=_words(labels, tokens) or {},
        maps=maps,
        graph=graph,
        pairs=picker,
        more=more,
        commands=commands or {},
        meanings=[] if meanings is None else meanings.to_dict("records"),
        pictures=[(p, p.sources()) for p in pictures],
        circuit=_circuit(circuit) if circuit else None,
        evaluation=_evaluation(evaluation) if evaluation is not None and len(evaluation) else None,
    )


def _pictures(
    scores: Mapping[str, Scores],
    circuit: Circuit | None,
    evaluation: pd.DataFrame | None,
    tokens: Sequence[str] | None,
) -> list[Picture]:
    own = next(iter(scores.values()))
    title = " · ".join(
        str(own.meta.get(k, "?")) for k in ("task", "model", *(["method"] if len(scores) == 1 else []), "direction")
    )
    mapped = list(own) if own.units.space == "nodes" else []  # the others have no layer × position
    kinds = [kind for kind in mapped if all(kind in other for other in scores.values())]
    heads = [k for k in kinds if own[k].mean.ndim == 3 and own[k].mean.shape[2] <= MAX_HEADS]

    def maps(name: str, caption: str, chosen: Sequence[str], over: Over, words: Sequence[str] | None) -> Picture:
        return Picture(name, caption, heatmap_figure(scores, chosen, title, words, LIGHT, over))

    pictures = [maps("heatmaps", "Mean score per layer and position.", kinds, "units", tokens)] if kinds else []
    for kind in heads:
        caption = f"Mean score per layer and {'head' if kind == 'head' else 'unit'}, added up over positions."
        pictures.append(maps(f"heatmap-{kind}", caption, [kind], "positions", None))
    if drawn := _graph(circuit, own, tokens):
        pictures.append(drawn)
    if evaluation is not None and evaluation.get("n_nodes", pd.Series(dtype=int)).nunique() > 1:
        table = evaluation.assign(**{k: str(own.meta.get(k, "?")) for k in ("task", "method") if k not in evaluation})
        if table[["faithfulness", "completeness"]].notna().any(axis=None):
            caption = "Faithfulness and completeness on held-out pairs, with 95 % bootstrap bands."

            pictures.append(Picture("curves", caption, curves_figure(table)))
    return pictures


def _curves(evaluation: pd.DataFrame | None, scores: Scores) -> list[dict[str, Any]]:
    """Of a sweep; none of a single circuit."""
    if evaluation is None or "n_nodes" not in evaluation or not {"faithfulness", "completeness"} <= {*evaluation}:
        return []
    return curve_panels(
        evaluation.assign(**{k: str(scores.meta.get(k, "?")) for k in ("method",) if k not in evaluation})
    )


def _graph(circuit: Circuit | None, scores: Scores, tokens: Sequence[str] | None) -> Picture | None:
    """A picture of circuits that have edges."""
    if circuit is None or (row := DRAWINGS.get(circuit.units.space)) is None:
        return None
    count = row.count(circuit, scores)
    if count is None:
        return None
    words = _words(scores.labels, tokens)
    drawn = circuit_figure(circuit, scores, words, LIGHT)
    return Picture("circuit", f"The {min(count, MOST_EDGES)} strongest of {count} edges. {row.caption}", drawn)


def _words(labels: Sequence[str], tokens: Sequence[str] | None) -> dict[str, str] | None:
    """Label → token, where all pairs share one."""
    return {label: token for label, token in zip(labels, tokens, strict=True) if token} if tokens else None


def _top_tables(scores: Scores, top: int) -> list[dict[str, Any]]:
    """Per kind its strongest nodes; `share` scales the bars."""
    found = top_nodes(scores, top)
    tables = []
    for kind, rows in found.groupby("kind", sort=False):
        largest = float(rows.score.abs().max()) or 1.0
        tables.append(
            {
                "kind": kind,
                "units": bool(rows.unit.notna().any()),
                "rows": [r | {"share": abs(r["score"]) / largest} for r in rows.to_dict("records")],
            }
        )
    return tables


def _circuit(circuit: Circuit) -> dict[str, Any]:
    counts = circuit_counts(circuit)
    selection = {k: v for k, v in (circuit.meta.get("selection") or {}).items() if v not in (None, False, "none", 0)}
    if "ties" in selection or selection.get("tau") == selection.get("threshold"):
        selection.pop("tau", None)
    return {
        "warning": mixed_warning(circuit.units.kinds),
        "n_nodes": circuit.n_nodes,
        "noun": SPACES[circuit.units.space].noun,
        "n_possible": circuit.n_possible,
        "selection": ", ".join(f"{k} = {v:g}" if isinstance(v, float) else f"{k} = {v}" for k, v in selection.items()),
        "kinds": [
            {
                "kind": kind,
                "total": int(table.to_numpy().sum()),
                "possible": of,
                "largest": max(int(table.to_numpy().max()), 1),
                "labels": list(table.columns),
                "layers": table.to_numpy().tolist(),
            }
            for kind, (table, of) in counts.items()
        ],
    }


def _evaluation(table: pd.DataFrame) -> dict[str, Any]:
    """The columns that differ between rows, as text; what is the same for all rows is said once."""
    noun = counted(table.get("kind", ()))
    warning = "".join(mixed_warning(str(kinds).split("+")) for kinds in dict.fromkeys(table.get("kind", ())))
    hidden = {"task", "model", "method", "kind", "direction", "circuit"}
    table = table.drop(columns=[c for c in table.columns if c in hidden])
    if "note" in table.columns and not table["note"].fillna("").astype(str).str.strip().any():
        table = table.drop(columns="note")
    out = {}
    for name in table.columns:
        if name.endswith(("_lo", "_hi")):
            continue
        column = column_cells(str(name), table[name])
        if f"{name}_lo" in table.columns:
            ends = zip(column, table[f"{name}_lo"], table[f"{name}_hi"], strict=True)
            column = [f"{v} [{low:z.2f}, {high:z.2f}]" if low == low else v for v, low, high in ends]
        out[name] = (column, is_numeric(table[name]))
    same = {k: v[0][0] for k, v in out.items() if len(table) > 1 and len(set(v[0])) == 1 and k != "n_nodes"}
    shown = {k: v for k, v in out.items() if k not in same}
    names = {"tau": "τ", "n_nodes": noun, "n_possible": f"possible {noun}", "F_complement": "F(M∖C)", "F_C": "F(C)"}
    names |= {
        "F_M": "F(M)",
        "F_empty": "F(∅)",
        "n_pairs": "held-out pairs",
        "n_prompts": "of so many prompts",
        "exclude_layers": "first layers not evaluated",
    }
    return {
        "warning": warning,
        "same": [(names.get(k, k.replace("_", " ")), v) for k, v in same.items()],
        "head": [(names.get(k, k.replace("_", " ")), numeric) for k, (_, numeric) in shown.items()],
        "rows": [list(row) for row in zip(*(column for column, _ in shown.values()), strict=True)],
        "has_curve": table["n_nodes"].nunique() > 1 if "n_nodes" in table.columns else False,
    }
