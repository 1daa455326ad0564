"""relp export RUN FILE, relp import FILE"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import DeviceMapOption, DeviceOption, JsonFlag, log, note, out, output_option, print_json
from relp_cli.errors import RelpError, unknown
from relp_cli.files import check_file_writable
from relp_cli.models.placement import arguments, placed

FORMATS = ("eap-ig", "mib", "table", "circuit-tracer")
TABLES = (".csv", ".parquet")


def export(
    run: Annotated[Path, typer.Argument(help="A run, with its circuit.json if there is one.")],
    file: Annotated[
        Path,
        typer.Argument(
            help="What to write: a name in .csv, .parquet (all scores), .json or .pt (edges); for mib, a folder."
        ),
    ],
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="table, eap-ig, mib (a submission to its leaderboard), or circuit-tracer (an attribution graph, "
            "which Neuronpedia reads too). Default: by the file's name.",
        ),
    ] = None,
    as_: Annotated[
        str | None, typer.Option("--as", help="For mib: the folder's name, task_model (default: from the run).")
    ] = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    json: JsonFlag = False,
) -> None:
    """Write a run's scores and circuit for other programs. To .csv or .parquet: a row per unit with kind, layer, position, unit,
    score (with the run's own sign), se, n, in_circuit.

    To .json or .pt, edge scores and circuit in the format of EAP-IG, which MIB's evaluator reads. Scores are written with
    support of the behaviour positive, as MIB ranks them; the file's cfg.relp says what they were made from.

    With --format mib, scores of edges, of components (head,mlp_out) or of neurons (mlp_dim) become a folder task_model of a
    submission, which is checked as a whole: one file each, 50 MB, graphs, ranks.

    With --format circuit-tracer, a circuit of features with edges, or of edges that keep their positions, becomes an attribution
    graph over one of its prompts: weights are the edges' scores, with their own sign.

    Example: relp export runs/ioi scores.csv

    Example: relp export runs/ioi-edges ioi.json

    Example: relp export runs/ioi-edges submission --format mib

    Example: relp export runs/features graph.json --format circuit-tracer
    """
    if form is None:
        form = "table" if file.suffix.lower() in TABLES else "eap-ig"
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    place = placed(device, device_map)
    from relp_cli.runs.rundir import RunDir

    RunDir(run).read()  # what is none is said before torch is imported
    if form == "mib":
        _submit(run, file, as_, place, json)
        return
    if as_ is not None:
        raise RelpError("--as names a folder of a submission; it goes with --format mib")
    if form == "circuit-tracer":
        _graph(run, file, place, json)
        return
    if form == "table":
        _table(run, file, json)
        return
    from relp_cli.edges.exchange import check_circuit_name, export_circuit
    from relp_cli.runs.scoring import open_run
    from relp_cli.studies.evaluating import own_circuit

    check_circuit_name(file)
    check_file_writable(file)
    run_dir, _, scores = open_run(run)
    if "edges" not in scores:
        raise RelpError(
            f"run '{run}' scored {', '.join(scores)}; this format holds edges (score with --nodes edges; .csv holds all)"
        )
    edges = scores["edges"]
    circuit = own_circuit(run_dir, scores) if run_dir.circuit.is_file() else None
    export_circuit(file, int(edges.meta["d_model"]), circuit, edges)
    kept = 0 if circuit is None else circuit.n_nodes
    if json:
        print_json({"file": str(file), "n_edges": kept})
        return
    if circuit is None:
        note("no circuit.json in this run: scores are exported, and no edge is marked as in the circuit")
    log.print(str(file))


def _table(run: Path, file: Path, json: bool) -> None:
    if file.suffix.lower() not in TABLES:
        raise RelpError(f"{file}: expected a name that ends in {' or '.join(TABLES)}")
    from relp_cli.outputs.exporting import export_table

    done = export_table(run, file)
    if json:
        print_json({"file": str(file), "rows": done.rows, "zeros_left_out": done.zeros, "in_circuit": done.kept})
        return
    if done.zeros:
        note(f"{done.zeros} units at positions are 0 in every pair and have no row")
    if done.kept is None:
        note("no circuit.json in this run: in_circuit is empty")
    log.print(f"{file}: {done.rows} rows" + ("" if done.kept is None else f", {done.kept} in the circuit"))


def _graph(run: Path, file: Path, place: str | None, json: bool) -> None:
    if file.suffix.lower() != ".json":
        raise RelpError(f"{file}: expected a name that ends in .json")
    from relp_cli.outputs.exporting import export_graph

    done = export_graph(run, file, place)
    if json:
        about = {"nodes": done.nodes, "links": done.links, "left_out": done.lost, "prompt": done.prompt}
        print_json({"file": str(file), **about})
        return
    if done.lost:
        note(f"{done.lost} units of the circuit are at positions that this prompt does not have, and left out")
    log.print(f"{file}: {done.nodes} nodes and {done.links} links over {done.prompt!r}", markup=False)


def _submit(run: Path, folder: Path, name: str | None, place: str | None, json: bool) -> None:
    from relp_cli.outputs.submission import checked_submission, export_submission
    from relp_cli.report.tables import show

    file = export_submission(run, folder, name, place)
    rows, notes = checked_submission(folder)
    if json:
        print_json({"file": str(file), "folders": rows, "notes": notes})
        return
    import pandas as pd

    show(pd.DataFrame(rows), out, f"{folder}: {len(rows)} folder{'s' if len(rows) > 1 else ''}, valid", digits=2)
    for line in notes:
        note(line)
    log.print(str(file))


def import_(
    file: Annotated[
        Path, typer.Argument(help="A circuit of EAP-IG or MIB, .json or .pt; or a folder with an InterpBench case.")
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Check that it is of this model's graph.")] = None,
    output: Annotated[
        Path | None, output_option(help="The circuit file to write (circuit.json), or the case's folder (cases/NAME).")
    ] = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    json: JsonFlag = False,
) -> None:
    """Read an edge circuit of EAP-IG or MIB and write it as a relp circuit. `relp evaluate RUN --circuit FILE` takes both.
    Support is taken to be positive in the file; the circuit's meta says whether the file itself says so.
    A folder is an InterpBench case in safetensors and JSON (docs/known-circuits.md), for relp evaluate known_circuits --cases.

    Example: relp import ioi.pt --model gpt2 -o circuit.json
    """
    if file.is_dir():
        from relp_cli.known.interpbench import import_case

        if model is not None:
            raise RelpError(f"--model is for circuits; '{file}' is a folder, whose case brings its own model")
        case = import_case(file, output or Path("cases") / file.resolve().name)
        about = {"case": str(case.folder), "nodes": case.nodes, "edges": case.edges}
        print_json(about) if json else log.print(f"{case.folder}: {len(case.nodes)} nodes of the circuit")
        return
    place = placed(device, device_map)
    output = output or Path("circuit.json")
    from relp_cli.edges.exchange import import_circuit
    from relp_cli.models.load import load_model

    check_file_writable(output)
    circuit, _ = import_circuit(file, None if model is None else load_model(model, **arguments(place)))
    circuit.save(output)
    if json:
        print_json({"circuit": str(output), "n_edges": circuit.n_nodes, "n_possible": circuit.n_possible})
        return
    log.print(f"{output}: {circuit.n_nodes} of {circuit.n_possible} edges")
