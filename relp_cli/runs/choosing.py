"""What `relp circuit RUN` says where nobody chose a threshold: the one that its evaluation suggests, or what some would keep."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from relp_cli.errors import RelpError
from relp_cli.runs.evaluated import Suggestion, read_sweep, suggested
from relp_cli.runs.rundir import RunDir
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores

SHARES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # of the largest strength


def of_curve(run: RunDir, kinds: str) -> Suggestion | None:
    """The threshold that the run's newest sweep suggests, of those of these kinds (as tables call them). A sweep selects by
    |score|, at every position.
    """
    sweep = read_sweep(run.path, kinds)
    return None if sweep is None else suggested(sweep[1], sweep[0].name)


def choices(scores: Scores, options: dict[str, Any]) -> pd.DataFrame:
    """How many units thresholds from half of the largest |score| down would keep: threshold, kept, of, largest_share."""
    largest = float(scores.mean.double().abs().nan_to_num(0).max()) if len(scores.mean) else 0.0
    if options.get("aggregate") == "sum":
        largest = float(scores.summed(scores.mean.nan_to_num(0)).abs().max())
    if not 0 < largest < math.inf:
        raise RelpError("every score is 0: no threshold selects anything; --top-k takes units all the same")
    rows = []
    for share in SHARES:
        tau = float(f"{share * largest:.2g}")
        circuit = select(scores, tau, **options)
        rows.append({"--threshold": tau, "kept": circuit.n_nodes, "of": circuit.n_possible})
    return pd.DataFrame(rows)


def refuse_empty(circuit: Circuit, path: Any, how: dict[str, Any]) -> None:
    """Raises RelpError where an empty circuit would take the place of a file that is there."""
    if circuit.n_nodes or not path.exists():
        return
    given = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in how.items() if value is not None)
    raise RelpError(f"{given} keeps nothing, and {path} is there already; --allow-empty replaces it")
