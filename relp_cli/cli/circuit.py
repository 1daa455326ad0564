"""relp circuit RUN"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relp_cli.cli.circuit_options import CircuitOptions
from relp_cli.cli.common import comma, log, note, out, print_json, progress, refuse_typed
from relp_cli.cli.listing import list_of, listed, show_list, undecided_threshold
from relp_cli.cli.options import takes
from relp_cli.cli.waiting import waiting
from relp_cli.errors import RelpError
from relp_cli.files import check_file_writable
from relp_cli.nodes.kinds import mixed_warning
from relp_cli.report.terminal import Column, print_table
from relp_cli.spaces.table import SPACES

if TYPE_CHECKING:
    from relp_cli.runs.rundir import RunDir
    from relp_cli.runs.scoring import Session
    from relp_cli.runs.spec import ScoreSpec
    from relp_cli.spaces.circuit import Circuit
    from relp_cli.spaces.scores import Scores

OF_LISTS = ("run", "listing", "json")  # what --list takes besides, where nothing is selected


@takes(CircuitOptions)
def command(
    asked: CircuitOptions,
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run directory that `relp score` wrote.")],
) -> None:
    """Select a circuit from a run's scores and write it as one readable JSON file. Without --threshold, --fraction, --top-k
    or --top-p: the threshold that the run's evaluated sweep suggests, or else a table of what thresholds would keep.

    Example: relp circuit runs/ioi --threshold 0.005

    Example: relp circuit runs/ioi --list
    """
    from relp_cli.runs.rundir import RunDir

    RunDir(run).read()  # what is none is said before torch is imported
    if asked.listing and asked.undecided:
        refuse_typed(context, OF_LISTS, "selects; --list alone prints the circuit that the run has")
        show_list(*listed(run), asked.json)
        return
    place = asked.check()
    from relp_cli.runs.choosing import refuse_empty
    from relp_cli.runs.made import note_made
    from relp_cli.runs.scoring import Session, open_run, prepare_again

    run_dir, spec, scores = open_run(run)
    session = Session(place, say=waiting)
    kinds = comma(asked.nodes, "--nodes") if asked.nodes is not None else tuple(scores)
    if asked.clusters is not None:
        _clustered(asked, run_dir, spec, scores.only(kinds), session)
        return
    circuit, how, evaluated_from = _selected(asked, run_dir, spec, scores.only(kinds))
    path = asked.output or run_dir.circuit
    check_file_writable(path)
    _note_selection(circuit)
    if asked.edge_threshold is not None and circuit.units.space != "features":
        raise RelpError("--edge-threshold is for feature circuits; edges of heads and MLPs: relp score --nodes edges")
    if asked.resamples:
        _note_stability(asked, how, scores.only(kinds))
    if asked.verify:
        circuit = _verified(asked, spec, scores, circuit, session)
    if asked.edge_threshold is not None:
        from relp_cli.studies.features import show_edges, with_edges

        prepared = prepare_again(spec, scores, session)
        with progress() as bar:
            circuit = with_edges(spec, prepared, session, circuit, asked.edge_threshold, asked.annotations, bar)
    if not asked.allow_empty:
        refuse_empty(circuit, path, how)
    if circuit.n_nodes in (0, circuit.n_possible):
        note(f"WARNING: this threshold keeps {'nothing' if circuit.n_nodes == 0 else 'everything'}")
    circuit.save(path)
    if asked.output is None:
        note_made(path)
    if asked.json:
        about = {"circuit": str(path), "n_nodes": circuit.n_nodes, "n_possible": circuit.n_possible, **circuit.meta}
        units = {"units": list_of(scores, circuit)} if asked.listing else {}
        edges = {"edges": circuit.edges.columns()} if asked.edge_threshold is not None else {}
        print_json({**about, **units, **edges})
        return
    title = _title(circuit, evaluated_from)
    if asked.listing:
        show_list(scores, replace(circuit, edges=None), path, title=title)  # edges follow
    else:
        print_table(out, (_sites_table if circuit.units.space == "features" else _layers_table)(circuit), title=title)
    if asked.edge_threshold is not None:
        show_edges(spec, prepared, session, circuit, asked.annotations, out)
    log.print(str(path))


def _clustered(asked: CircuitOptions, run: RunDir, spec: ScoreSpec, scores: Scores, session: Session) -> None:
    """A circuit for each cluster of pairs, written into a folder and shown."""
    from relp_cli.cli.clusters import show_clusters
    from relp_cli.studies.clustering import cluster_run, clusters_asked

    how = {**asked.how, "sign": asked.ranked_by, **asked.of_space}
    with progress() as bar:
        made = cluster_run(
            spec, scores, clusters_asked(str(asked.clusters)), how, session, asked.output or run.clusters, bar
        )
    print_json({"folder": str(made.folder), **made.as_dict()}) if asked.json else show_clusters(made)


def _selected(
    asked: CircuitOptions, run: RunDir, spec: ScoreSpec, scores: Scores
) -> tuple[Circuit, dict[str, Any], int]:
    """The circuit of these scores, how it was selected (as asked, or as the run's evaluation suggests), and from which layer up
    that evaluation counted.
    """
    from relp_cli.runs.selecting import refined
    from relp_cli.selection import select

    others = [Path(other) for other in asked.average]
    source = refined(scores, tuple(scores), asked.ranked_by, asked.aggregate, asked.stable_signs, others, spec.seed)
    for line in source.notes:
        note(line)
    options = {"sign": source.sign, "aggregate": source.aggregate, "union": asked.union, **asked.of_space}
    how, evaluated_from = asked.how, 0
    if asked.undecided:
        suggestion = undecided_threshold(run, source.scores, options, asked.plain, asked.json)
        how, evaluated_from = {"threshold": suggestion.tau}, suggestion.from_layer
    return source.recorded(select(source.scores, **how, **options)), how, evaluated_from


def _note_stability(asked: CircuitOptions, how: dict[str, Any], scores: Scores) -> None:
    from relp_cli.evaluation.overlap import stability

    options = {"sign": asked.ranked_by, "aggregate": asked.aggregate, "union": asked.union, **asked.of_space}
    mean, _ = stability(scores, asked.resamples, **how, **options)
    note(f"stability: mean Jaccard overlap with {asked.resamples} circuits from resampled pairs: {mean:.3f}")


def _verified(asked: CircuitOptions, spec: ScoreSpec, scores: Scores, circuit: Circuit, session: Session) -> Circuit:
    """The nodes that exact patching confirms."""
    from relp_cli.studies.verifying import verify_circuit

    with progress() as bar:
        circuit, lines = verify_circuit(spec, scores, circuit, asked.confirm, session, bar)
    for line in lines:
        note(line)
    return circuit


def _note_selection(circuit: Circuit) -> None:
    """What people have to know of how the last units were kept, and of kinds that do not go together."""
    selection = circuit.meta["selection"]
    if "ties" in selection:
        note(
            f"{selection['ties']} more score {selection['tied_at']:g}, as the last that was kept: no τ keeps just these, "
            f"--threshold {selection['tau']} all of them"
        )
    if selection.get("connected"):
        best = "the best there are" if not selection["gap"] else f"within {selection['gap']:.2%} of the best"
        note(
            f"connected: of {selection['candidates']} edges, {best}: {selection['share_of_strongest']:.1%} of the total strength "
            "of the strongest as many, connected or not"
        )
    if mixed := mixed_warning(circuit.units.kinds):
        note(mixed)


def _title(circuit: Any, evaluated_from: int) -> str:
    """How many units are kept, of how many; where an evaluation chose them and left out lower layers, of what it counted too."""
    from relp_cli.evaluation.ratios import tau_of

    title, tau = f"{circuit.n_nodes} of {circuit.n_possible} {SPACES[circuit.units.space].noun}", tau_of(circuit.meta)
    if evaluated_from:
        upper = f"{circuit.counted(evaluated_from)} of {circuit.possible(evaluated_from)}"
        title += f" of all layers, {upper} of those from layer {evaluated_from} up"
    return title if tau is None else f"{title} (τ = {tau:g})"


def _layers_table(circuit):  # type: ignore[no-untyped-def]
    """Nodes kept per layer and kind."""
    masks = circuit.masks
    counts = {kind: mask.flatten(1).sum(1).tolist() for kind, mask in masks.items()}
    layers = range(max(map(len, counts.values()), default=0))
    sums = {kind: str(sum(of_kind)) for kind, of_kind in counts.items()}
    return [
        Column("layer", [*map(str, layers), "all"], numeric=True),
        *(Column(kind, [*map(str, of_kind), sums[kind]], numeric=True) for kind, of_kind in counts.items()),
    ]


def _sites_table(circuit):  # type: ignore[no-untyped-def]
    """Features and error terms kept per site."""
    from relp_cli.spaces.features import feature_masks, sites_of

    sites, rows = sites_of(circuit.units), []
    for site, (mask, kept) in feature_masks(circuit).items():
        errors = str(int(kept.sum())) if sites.has_error(site) else "removed"
        rows.append((site.name, str(int(mask.sum())), str(int(mask.any(1).sum())), errors))
    names = ("site", "features", "positions", "error terms")
    return [Column(n, c, numeric=i > 0) for i, (n, c) in enumerate(zip(names, zip(*rows, strict=True), strict=True))]
