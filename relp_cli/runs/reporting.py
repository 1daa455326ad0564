"""`relp report`: gathers what a run directory holds and has the page written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relp_cli.errors import RelpError
from relp_cli.features.annotations import read_annotations
from relp_cli.features.kinds import SCORED
from relp_cli.files import check_writable
from relp_cli.report.html import write_html
from relp_cli.runs.comparing import example_tokens
from relp_cli.runs.evaluated import read_evaluation
from relp_cli.runs.evaluating import own_circuit
from relp_cli.runs.features import feature_meanings
from relp_cli.runs.scoring import Prepared, Session, open_run, prepare_again


def report_run(path: Path, output: Path | None = None, annotations: Path | None = None) -> list[Path]:
    """Figures and one HTML page of a run, with its circuit and evaluation where there are. Returns the files written.

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
    evaluation = read_evaluation(run.path / "evaluation.csv")
    theirs = None if evaluation is None or "circuit" not in evaluation else evaluation["circuit"][0]
    if theirs is not None and circuit is not None and theirs != circuit.hash:
        evaluation = None
        record["notes"] = [*record.get("notes", []), f"evaluation.csv is of another circuit: relp evaluate {path}"]
    tokens = meanings = examples = None
    try:
        session = Session()
        prepared = prepare_again(spec.model_copy(update={"only_correct": False}), scores, session)
        tokens = example_tokens(prepared, scores)
        examples = token_examples(prepared)
        if SCORED in scores:
            of_features = circuit if circuit is not None and circuit.units.space == "features" else None
            meanings = feature_meanings(spec, session, prepared, scores, of_features, annotations)
    except RelpError as error:
        if annotations is not None:
            raise
        # The model is elsewhere or another one by now: the page shows role labels without example tokens, and says so.
        record["notes"] = [*record.get("notes", []), f"no example tokens: {error}"]
    methods = {spec.method: scores}
    return write_html(
        run.path, record, methods, circuit, evaluation, tokens, output, meanings=meanings, examples=examples
    )


def token_examples(prepared: Prepared, most: int = 4) -> dict[str, list[tuple[str, str | None]]]:
    """Position label → the first `most` different (clean token, corrupted token) of the pairs; None where there is no patch."""
    found: dict[str, dict[tuple[str, str | None], None]] = {}
    tokenizer = prepared.model.tokenizer
    if tokenizer is None:
        return {}
    for batch in prepared.pairs:
        for at, label in enumerate(batch.labels):
            seen = found.setdefault(label, {})
            for row in range(len(batch.original)):
                if len(seen) == most:
                    break
                clean = tokenizer.decode([int(batch.original[row, at])])
                other = None if batch.patch is None else tokenizer.decode([int(batch.patch[row, at])])
                seen[clean, other] = None
    return {label: list(seen) for label, seen in found.items()}
