"""`relp test`: hypothesis tests of a run's circuit, on held-out pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.evaluation.circuit_tests import circuit_tests
from relp_cli.evaluation.verdicts import Levels
from relp_cli.methods.request import Progress
from relp_cli.report.tables import write_table
from relp_cli.runs.earlier import Say, keep_earlier, quiet
from relp_cli.runs.made import note_made
from relp_cli.runs.scoring import open_run
from relp_cli.studies.evaluating import Ready, own_circuit, read_circuit


def run_tests(
    at: Ready, levels: Levels, progress: Progress | None = None, say: Say = quiet
) -> tuple[tuple[Path, Path], pd.DataFrame, pd.DataFrame]:
    """Test the circuit, and write tests.csv and tests-units.csv (on another task: tests-TASK.csv, …) into the run.

    say: is told what becomes of tests of other settings (`keep_earlier`).
    Returns: the files, the table of tests and that of units.
    """
    tests, units = circuit_tests(
        at.prepared.model, at.prepared.pairs, at.circuits[0], levels, metric=at.prepared.metric, progress=progress,
        **{k: v for k, v in at.asked.how(at.exclude, at.dictionary).items() if k != "memory"},  # tests take none
    )  # fmt: skip
    about = {**at.about, "circuit": at.circuits[0].hash}
    tables = []
    for table in (tests, units):  # a unit has a kind of its own
        first = {k: v for k, v in about.items() if k not in table} if len(table) else {}
        tables.append(table.assign(**first)[[*first, *table.columns]])
    files = at.run.path / f"tests{at.stem}.csv", at.run.path / f"tests-units{at.stem}.csv"
    keep_earlier(files[0], tables[0], say, beside=files[1:])
    for table, file in zip(tables, files, strict=True):
        write_table(table, file)
        note_made(file)
    return files, tests, units


def testing_cost(path: Path, circuit: Path | None, pairs: int, levels: Levels) -> dict[str, Any]:
    """What tests would cost in forward passes per pair: F(M), F(∅), F(C), F(M∖C); two per random circuit, two per random path
    and one per tested unit. Passes for ablation values come on top.
    """
    levels.check()
    run, _, scores = open_run(path)
    units = (read_circuit(circuit) if circuit else own_circuit(run, scores)).n_nodes
    tested = min(units, levels.units)
    return {
        "units of the circuit": units,
        "held-out pairs": f"at most {pairs}",
        "forward passes per pair": f"at most {4 + 4 * levels.references + tested}",
        "when interrupted": "starts over: nothing is kept until the tests are done",
    }
