"""`relp report`: gathers what folders hold and has the page written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relp_cli.errors import RelpError
from relp_cli.features.annotations import read_annotations
from relp_cli.features.kinds import SCORED
from relp_cli.files import check_file_writable, check_writable, write_atomically
from relp_cli.outputs.report_folders import comparison_page, diagnosis_page, job_page, runs_page
from relp_cli.outputs.report_more import more_sections
from relp_cli.report.html import write_html
from relp_cli.report.page import Page, render_sections
from relp_cli.runs.checked import distinct, file_label
from relp_cli.runs.evaluated import circuit_of, read_evaluation, read_sweep
from relp_cli.runs.folders import FOLDERS
from relp_cli.runs.made import command_of
from relp_cli.runs.pairs import pair_records, read_pairs, token_examples
from relp_cli.runs.rundir import RunDir
from relp_cli.runs.scoring import Session, open_run, prepare_again
from relp_cli.studies.comparing import shared_tokens
from relp_cli.studies.evaluating import own_circuit
from relp_cli.studies.features import feature_meanings

PAGES: dict[str, Callable[[Path], Page]] = {
    "a comparison": comparison_page,
    "a diagnosis": diagnosis_page,
    "a job": job_page,
}


@dataclass(frozen=True)
class Reported:
    """The page and all files written, the page first."""

    files: tuple[Path, ...]

    @property
    def page(self) -> Path:
        return self.files[0]

    def as_dict(self) -> dict[str, Any]:
        """path, bytes, the ids of its sections, and the other files that were written."""
        text = self.page.read_text(encoding="utf-8")
        return {
            "path": str(self.page),
            "bytes": len(text.encode()),
            "sections": re.findall(r'<(?:h2|section) id="([^"]+)"', text),
            "files": [str(path) for path in self.files[1:]],
        }


def report(paths: Sequence[Path], output: Path | None = None, annotations: Path | None = None) -> Reported:
    """One page of a run, a comparison, a job or a diagnosis, or of several runs side by side.

    Raises: RelpError for a folder that holds none of these, runs that cannot stand side by side, and a page that cannot be
    written; RunFailed for files that are not those that were written.
    """
    distinct("folder", [str(path.resolve()) for path in paths])
    if len(paths) == 1 and _page_of(paths[0]) is None:
        return Reported(tuple(report_run(paths[0], output, annotations)))
    if annotations is not None:
        raise RelpError("--annotations is for a run of features")
    if len(paths) > 1:
        names = "-".join(file_label(path.resolve().name) for path in paths)[:120]
        place = output or Path("runs") / f"report-{names}.html"
        check_file_writable(place)
        page = runs_page(paths)
    else:
        place, make = output or paths[0] / "report.html", _page_of(paths[0])
        check_file_writable(place)
        assert make is not None
        page = make(paths[0])
    write_atomically(place, render_sections(page))
    return Reported((place,))


def _page_of(path: Path) -> Callable[[Path], Page] | None:
    """What makes the page of a folder that is no run; None for a run, or what should be one."""
    if RunDir(path).exists() or not path.is_dir():
        return None
    for name, what in FOLDERS.items():
        if (path / name).is_file():
            return PAGES[what]
    known = ", ".join(f"{what} ({name})" for name, what in FOLDERS.items())
    raise RelpError(f"'{path}' holds nothing to report: expected a run directory (run.json), {known}")


def report_run(path: Path, output: Path | None = None, annotations: Path | None = None) -> list[Path]:
    """Figures and one HTML page of a run, with its circuit, evaluations and tests where there are. Returns the files written.

    annotations: what features mean (JSON lines); without them, contexts and promoted tokens are shown.
    """
    if annotations is not None:
        read_annotations(annotations)  # found to be wrong before anything is drawn
    run, spec, scores = open_run(path)
    for place in (run.path, output or run.path):
        check_writable(place)  # before the figures
    if annotations is not None and SCORED not in scores:
        raise RelpError("--annotations is for runs of features; this run scored " + ", ".join(scores))
    circuit: Any = own_circuit(run, scores) if run.circuit.is_file() else None
    record = run.read()
    table = run.path / "evaluation.csv"
    evaluation = read_evaluation(table)
    if circuit is not None and circuit_of(evaluation) not in (None, circuit.hash):
        evaluation = None
        record["notes"] = [*record.get("notes", []), f"evaluation.csv is of another circuit: relp evaluate {path}"]
    sweep = read_sweep(run.path)
    if sweep is not None and sweep[0] == table:
        sweep = None  # the evaluation itself
    if sweep is not None:
        record["notes"] = [*record.get("notes", []), f"curves are those of {sweep[0].name}"]
        if evaluation is None:
            table, evaluation = sweep
    meanings = None
    pairs = read_pairs(run, record)
    try:
        if pairs is None or SCORED in scores:
            session = Session()
            prepared = prepare_again(spec, scores, session)
            seen = prepared.behaviour
            pairs = pairs or pair_records(prepared.model.tokenizer, prepared.pairs, seen, prepared.metric)
        if SCORED in scores:
            of_features = circuit if circuit is not None and circuit.units.space == "features" else None
            meanings = feature_meanings(spec, session, prepared, scores, of_features, annotations)
    except RelpError as error:
        if annotations is not None:
            raise
        # The model is elsewhere or another one by now: the page goes without what only the model can tell, and says so.
        what = "no pairs" if pairs is None else "no meanings of features"
        record["notes"] = [*record.get("notes", []), f"{what}: {error}"]
    tokens = None if pairs is None else shared_tokens(pairs, scores)
    made = {"circuit": run.circuit, "evaluation": table}
    return write_html(
        run.path, record, {spec.method: scores}, circuit, evaluation, tokens, output, meanings=meanings, pairs=pairs,
        examples=None if pairs is None else token_examples(pairs),
        more=more_sections(run.path, None if circuit is None else circuit.hash),
        commands={name: command_of(file) for name, file in made.items() if file.is_file()},
        sweep=None if sweep is None else sweep[1],
    )  # fmt: skip
