"""`relp report`: gathers what a run directory holds and has the page written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.errors import RelpError, RunFailed
from relp_cli.report.html import write_html
from relp_cli.runs.comparing import example_tokens
from relp_cli.runs.evaluating import read_circuit
from relp_cli.runs.scoring import Session, open_run, prepare


def report_run(path: Path, output: Path | None = None) -> list[Path]:
    """Figures and one HTML page of a run, with its circuit and evaluation where there are. Returns the files written."""
    run, spec, scores = open_run(path)
    circuit: Any = read_circuit(run.circuit) if run.circuit.is_file() else None
    table = run.path / "evaluation.csv"
    try:
        evaluation = pd.read_csv(table, keep_default_na=True) if table.is_file() else None
    except (ValueError, pd.errors.ParserError) as error:
        raise RunFailed(f"{table} cannot be read ({error}); evaluate again to replace it") from error
    if evaluation is not None and "note" in evaluation:
        evaluation["note"] = evaluation["note"].fillna("")
    try:
        tokens = example_tokens(prepare(spec.model_copy(update={"only_correct": False}), Session()), scores)
    except RelpError:
        tokens = None  # the model is elsewhere; the page then shows role labels without example tokens
    return write_html(run.path, run.read(), {spec.method: scores}, circuit, evaluation, tokens, output)
