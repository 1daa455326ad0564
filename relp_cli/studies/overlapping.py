"""Overlap between circuits of runs, files and the literature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relp_cli.errors import RelpError
from relp_cli.evaluation.agreement import agreement
from relp_cli.evaluation.overlap import overlap
from relp_cli.evaluation.reference import reference_circuit, reference_names
from relp_cli.runs.folders import RUN, folders_holding, meant
from relp_cli.runs.rundir import RunDir
from relp_cli.runs.scoring import open_run
from relp_cli.studies.evaluating import own_circuit, read_circuit


def overlap_of(first: Path, second: str) -> dict[str, Any]:
    """`overlap(first, second)`; for two runs with common kinds and positions also the PCC of their scores per kind, or of their
    sizes where those of one run have no sign.
    """
    rows = overlap(_circuit(str(first)), _circuit(second))
    if RunDir(first).exists() and RunDir(Path(second)).exists():
        runs = [open_run(path)[2] for path in (first, Path(second))]
        estimate, exact = sorted(runs, key=lambda scores: bool(scores.meta.get("signed", True)))  # without sign: first
        unsigned = not estimate.meta.get("signed", True)
        for kind in (k for k in runs[0] if k in runs[1] and estimate[k].labels == exact[k].labels):
            name = f"PCC of |{kind} scores|" if unsigned else f"PCC of {kind} scores"
            rows[name] = agreement(estimate.table(kind), exact.table(kind), bootstrap=0, unsigned=unsigned).pcc
    return rows


def _circuit(where: str) -> Any:
    path = Path(where)
    if path.is_dir():
        run, _, scores = open_run(path)
        if not run.circuit.is_file():
            raise RelpError(f"run '{path}' has no circuit yet; run `relp circuit {path} --threshold …`")
        return own_circuit(run, scores)
    if path.is_file():
        return read_circuit(path)
    if where in reference_names():
        return reference_circuit(where)
    like, known = meant(where, folders_holding(RUN), reference_names()), ", ".join(reference_names())
    raise RelpError(f"'{where}' is neither a run, a circuit file nor a published circuit ({known}){like}")
