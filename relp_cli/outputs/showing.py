"""`relp show RUN`: what a run directory holds, gathered without loading a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.errors import RelpError
from relp_cli.nodes.kinds import mixed_warning
from relp_cli.report.characters import Strongest, strongest
from relp_cli.report.digest import top_nodes
from relp_cli.runs.evaluated import circuit_of, read_evaluation, suggested, swept_kinds
from relp_cli.runs.rundir import RunDir
from relp_cli.runs.scoring import open_run
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import SPACES
from relp_cli.studies.evaluating import own_circuit
from relp_cli.tasks.counted import pairs_text


@dataclass(frozen=True)
class RunView:
    """circuit, evaluation: None where there is none of these scores; `problems` says what is wrong with one that is not."""

    run: RunDir
    record: dict[str, Any]
    scores: Scores
    circuit: Circuit | None
    evaluation: pd.DataFrame | None
    problems: tuple[str, ...]

    @property
    def made(self) -> str:
        return str(self.record.get("provenance", {}).get("created", "at an unknown time"))[:16].replace("T", " ")

    @property
    def maps(self) -> list[Strongest]:
        return strongest(self.scores)

    def top(self, k: int) -> pd.DataFrame:
        return top_nodes(self.scores, k)

    @property
    def state(self) -> list[str]:
        """Lines on the circuit, its evaluation and what else was made of the scores."""
        lines = list(self.problems)
        if self.circuit is not None:
            lines.append(_of_circuit(self.circuit))
            lines += [warning] if (warning := mixed_warning(self.circuit.units.kinds)) else []
        elif not self.run.circuit.is_file():
            lines.append(f"circuit: none yet (relp circuit {self.run.path} --threshold τ)")
        if self.evaluation is not None:
            lines.append(_of_evaluation(self.evaluation))
        elif not (self.run.path / "evaluation.csv").is_file():
            lines.append(f"evaluation: none yet (relp evaluate {self.run.path})")
        more = [name for name in ("tests.csv", "robustness.csv", "report.html") if (self.run.path / name).is_file()]
        return lines + ([f"also there: {', '.join(more)}"] if more else [])

    def as_dict(self, k: int) -> dict[str, Any]:
        """For machines: the record, the k strongest units per kind, the maps as numbers, circuit and evaluation."""
        circuit = self.circuit
        return {
            "run": str(self.run.path),
            **{name: self.record.get(name) for name in ("spec", "behaviour", "notes", "provenance")},
            "n_units": self.scores.n_nodes,
            "positions": self.scores.labels,
            "top": _records(self.top(k)),
            "maps": {m.kind: {"layers": m.layers, "units": m.of, "scores": m.values} for m in self.maps},
            "circuit": None
            if circuit is None
            else {"n_nodes": circuit.n_nodes, "n_possible": circuit.n_possible, "hash": circuit.hash, **circuit.meta},
            "evaluation": None if self.evaluation is None else _records(self.evaluation),
            "problems": self.problems,
        }


def view_run(path: Path) -> RunView:
    """Raises RelpError or RunFailed for what is no run, and for scores that are not those that the run wrote."""
    run, _, scores = open_run(path)
    problems: list[str] = []
    circuit = evaluation = None
    try:
        circuit = own_circuit(run, scores) if run.circuit.is_file() else None
    except RelpError as error:
        problems.append(f"circuit: {error}")
    try:
        evaluation = read_evaluation(run.path / "evaluation.csv")
    except RelpError as error:
        problems.append(f"evaluation: {error}")
    if circuit_of(evaluation) not in (None, circuit and circuit.hash):
        evaluation = None
        problems.append(f"evaluation: evaluation.csv is of another circuit than circuit.json (relp evaluate {path})")
    return RunView(run, run.read(), scores, circuit, evaluation, tuple(problems))


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): None if pd.isna(v) else v for k, v in row.items()} for row in table.to_dict("records")]


def _of_circuit(circuit: Circuit) -> str:
    selection = circuit.meta.get("selection", {})
    said = {
        k: v
        for k, v in selection.items()
        if v and v not in ("none", "absolute") and (k != "tau" or not {"threshold", "ties"} & {*selection})
    }
    how = ", ".join(f"{k} = {v:g}" if isinstance(v, int | float) else f"{k} = {v}" for k, v in said.items())
    kept = f"{circuit.n_nodes} of {circuit.n_possible} {SPACES[circuit.units.space].noun}"
    return f"circuit: {kept}" + (f" ({how})" if how else "")


def _of_evaluation(table: pd.DataFrame) -> str:
    first = table.iloc[0]
    pairs = pairs_text(first.n_pairs, first.get("n_prompts"), "held-out pairs")
    about = f"{pairs} of {first.evaluated_on}, {first.ablation} ablation"
    if "circuit" not in table:
        sizes = f"{table.n_nodes.min()} to {table.n_nodes.max()} of {first.n_possible}"
        best = suggested(table)
        kinds = swept_kinds(table)
        what = f"{len(table)} circuits" + (f" of {kinds}" if kinds else "")
        return f"evaluation: a sweep of {what} ({sizes}), {about}" + ("" if best is None else f"; {best}")
    parts = [
        f"{name} {first[name]:z.2f} [{first[f'{name}_lo']:z.2f}, {first[f'{name}_hi']:z.2f}]"
        for name in ("faithfulness", "completeness")
    ]
    if pd.notna(first.get("random_faithfulness")):
        parts.append(f"random circuits' faithfulness {first['random_faithfulness']:z.2f}")
    return f"evaluation of this circuit: {', '.join(parts)} on {about}" + (f" ({first.note})" if first.note else "")
