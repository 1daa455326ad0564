"""`relp circuit`: what a circuit keeps, one line a unit, and what is said where no threshold was chosen. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from relp_cli.cli.common import note, out, print_json
from relp_cli.errors import RelpError

if TYPE_CHECKING:
    from relp_cli.runs.evaluated import Suggestion
    from relp_cli.runs.rundir import RunDir
    from relp_cli.spaces.circuit import Circuit
    from relp_cli.spaces.scores import Scores


def listed(path: Path) -> tuple[Scores, Circuit, Path]:
    """A run's scores, its circuit and the circuit's file. Raises RelpError where it has none."""
    from relp_cli.runs.scoring import open_run
    from relp_cli.studies.evaluating import own_circuit

    run, _, scores = open_run(path)
    if not run.circuit.is_file():
        raise RelpError(f"run '{path}' has no circuit to list; select one: relp circuit {path} --threshold τ")
    return scores, own_circuit(run, scores), run.circuit


def list_of(scores: Scores, circuit: Circuit) -> list[dict[str, Any]]:
    """For machines: a record per kept unit, strongest first."""
    from relp_cli.spaces.top import circuit_table

    return [{str(k): v for k, v in row.items()} for row in circuit_table(scores, circuit).to_dict("records")]


def show_list(scores: Scores, circuit: Circuit, path: Path, json: bool = False, title: str = "") -> None:
    """Print every kept unit with its score, and the edges between features where they were scored. title: what it is called."""
    import pandas as pd

    from relp_cli.report.tables import show
    from relp_cli.spaces.table import SPACES
    from relp_cli.spaces.top import circuit_table

    if json:
        more = {} if circuit.edges is None else {"edges": circuit.edges.columns()}
        print_json({"circuit": str(path), "n_nodes": circuit.n_nodes, "units": list_of(scores, circuit), **more})
        return
    table, noun = circuit_table(scores, circuit), SPACES[circuit.units.space].noun
    if table.empty:
        out.print(f"{path}: no {noun}")
        return
    title = f"{title or f'{path}: {circuit.n_nodes} of {circuit.n_possible} {noun}'}, strongest first"
    empty = {"unit": None, "position": "*", "se": None}  # of vector nodes; of edges of all positions; of sums
    table = table.drop(columns=[n for n, v in empty.items() if (table[n].isna() if v is None else table[n] == v).all()])
    show(table, out, title, digits=4)
    if circuit.n_nodes > len(table):
        out.print(f"{circuit.n_nodes - len(table)} more are in the circuit, and 0 in every pair")
    if circuit.edges is not None:
        columns = circuit.edges.columns()
        edges = pd.DataFrame({name: columns[name] for name in ("source", "target", "score", "n")})
        show(edges, out, f"{len(edges)} edges between them and to the metric", digits=4)


def undecided_threshold(run: RunDir, scores: Scores, options: dict[str, Any], plain: bool, json: bool) -> Suggestion:
    """The threshold that the run's evaluated sweep suggests for a plain selection, said on stderr.

    Raises: RelpError where there is none, after a table of what thresholds would keep.
    """
    from relp_cli.report.tables import show
    from relp_cli.runs.choosing import choices, of_curve
    from relp_cli.spaces.table import SPACES

    units = scores.units
    suggestion = of_curve(run, SPACES[units.space].called(units.kinds)) if plain else None
    if suggestion is not None:
        note(f"no threshold was given; {suggestion}")
        return suggestion
    table = choices(scores, options)
    if json:
        print_json({"choices": table.to_dict("records")})
    else:
        show(table, out, "what thresholds would keep", digits=4)
    kinds = f" --nodes {','.join(units.kinds)}" if units.space == "nodes" else ""
    command = f"relp evaluate {run.path}{kinds} --sweep counts:log:15"
    hint = f", or evaluate a sweep of these, which suggests one: {command}" if plain else ""
    raise RelpError(f"choose by --threshold, --fraction, --top-k or --top-p{hint}")
