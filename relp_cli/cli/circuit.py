"""relp circuit RUN"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relp_cli.cli.common import (
    DeviceMapOption,
    DeviceOption,
    JsonFlag,
    comma,
    count_option,
    log,
    note,
    out,
    output_option,
    print_json,
    progress,
    refuse_typed,
)
from relp_cli.cli.listing import list_of, listed, show_list, undecided_threshold
from relp_cli.errors import RelpError
from relp_cli.files import check_file_writable
from relp_cli.models.placement import placed
from relp_cli.nodes.kinds import mixed_warning
from relp_cli.report.terminal import Column, print_table
from relp_cli.spaces.table import SPACES

if TYPE_CHECKING:
    from relp_cli.runs.scoring import Session
    from relp_cli.runs.spec import ScoreSpec
    from relp_cli.spaces.scores import Scores

OF_LISTS = ("run", "listing", "json")  # what --list takes besides, where nothing is selected
DEFAULTS = ("absolute", "none")  # sign and aggregate of an evaluated sweep


def command(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run directory that `relp score` wrote.")],
    threshold: Annotated[float | None, typer.Option("--threshold", "-t", help="Keep |score| > τ.")] = None,
    fraction: Annotated[float | None, typer.Option(help="τ as a fraction of mean |L(x_o)| (0.005: Transluce).")] = None,
    top_k: Annotated[int | None, count_option(0, help="Keep the k largest |score|.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the fewest nodes that hold this share of Σ|score|.")] = None,
    nodes: Annotated[
        str | None, typer.Option(help="Only these kinds (default: all that were scored, together).")
    ] = None,
    sign: Annotated[str, typer.Option(help="absolute, positive or negative.")] = "absolute",
    signed: Annotated[
        bool, typer.Option("--signed", help="Rank from support to opposition, not by |score| (MIB's --signed).")
    ] = False,
    aggregate: Annotated[str, typer.Option(help="none (per position) or sum (over positions).")] = "none",
    union: Annotated[bool, typer.Option(help="Keep what passes for any example, not on average.")] = False,
    greedy: Annotated[bool, typer.Option(help="Edges: grow from the logits (with --top-k or --threshold).")] = False,
    prune: Annotated[
        str | None, typer.Option(help="Edges: none, dangling, or from_input (exact for counterfactual ablation only).")
    ] = None,
    connected: Annotated[
        bool, typer.Option("--connected", help="Edges: the best --top-k that lie on paths from input to logits (ILP).")
    ] = False,
    average: Annotated[
        list[str], typer.Option(help="Another run, whose ranks are averaged with this one's (may be repeated).")
    ] = [],  # noqa: B006
    stable_signs: Annotated[
        float | None,
        typer.Option(help="Only units whose sign is the same in this share of bootstrap resamples of the pairs (.95)."),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Patch the selected nodes exactly and keep those it confirms.")] = False,
    confirm: Annotated[
        float | None, typer.Option(help="--verify keeps |exact effect| > this (default: the selection's τ).")
    ] = None,
    resamples: Annotated[
        int, count_option(0, "--stability", help="Select again from that many bootstrap resamples of the pairs.")
    ] = 0,
    clusters: Annotated[
        str | None,
        typer.Option(help="auto or K: group the pairs by their scores, a circuit per group (without positions)."),
    ] = None,
    errors: Annotated[
        str | None, typer.Option(help="Error terms of feature circuits: all, residual (not of attention, MLP), none.")
    ] = None,
    edge_threshold: Annotated[
        float | None,
        typer.Option(
            "--edge-threshold", "-e", help="Feature circuits: score edges between nodes, keep |score| > this."
        ),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="What features mean: JSON lines (default: contexts and promoted tokens).")
    ] = None,
    listing: Annotated[
        bool,
        typer.Option("--list", help="Print every node or edge of the circuit with its score; alone: of circuit.json."),
    ] = False,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Let a circuit of nothing replace a file that is there.")
    ] = False,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    output: Annotated[Path | None, output_option(help="Default: circuit.json in the run.")] = None,
    json: JsonFlag = False,
) -> None:
    """Select a circuit from a run's scores and write it as one readable JSON file. Without --threshold, --fraction, --top-k
    or --top-p: the threshold that the run's evaluated sweep suggests, or else a table of what thresholds would keep.

    Example: relp circuit runs/ioi --threshold 0.005

    Example: relp circuit runs/ioi --list
    """
    from relp_cli.runs.rundir import RunDir

    RunDir(run).read()  # what is none is said before torch is imported
    from relp_cli.runs.scoring import Session, open_run, prepare_again

    how: dict[str, Any] = {"threshold": threshold, "fraction": fraction, "top_k": top_k, "top_p": top_p}
    undecided = all(value is None for value in how.values())
    if listing and undecided:
        refuse_typed(context, OF_LISTS, "selects; --list alone prints the circuit that the run has")
        show_list(*listed(run), json)
        return
    if signed and sign != "absolute":
        raise RelpError(f"give --signed or --sign {sign}, not both")
    sign = "signed" if signed else sign
    check_numbers(confirm, verify, edge_threshold, annotations)
    if clusters is not None:
        count = clusters_of(
            clusters,
            {
                "--average": average, "--stable-signs": stable_signs is not None, "--verify": verify, "--union": union,
                "--stability": resamples, "--edge-threshold": edge_threshold is not None,
            },
        )  # fmt: skip
    if average or stable_signs is not None:
        check_refining(average, stable_signs, union, resamples, fraction, top_p, verify and confirm is None)
    place = placed(device, device_map)
    from relp_cli.selection import select

    run_dir, spec, scores = open_run(run)
    session = Session(place)
    kinds = comma(nodes, "--nodes") if nodes is not None else tuple(scores)
    chosen = scores.only(kinds)
    more: dict[str, Any] = {} if errors is None else {"errors": errors}
    more |= {
        k: v
        for k, v in (("greedy", greedy or None), ("connected", connected or None), ("prune", prune))
        if v is not None
    }
    if clusters is not None:
        clustered(spec, chosen, count, {**how, "sign": sign, **more}, session, output or run_dir.clusters, json)
        return
    from relp_cli.runs.choosing import refuse_empty
    from relp_cli.runs.selecting import refined

    source = refined(chosen, kinds, sign, aggregate, stable_signs, [Path(other) for other in average], spec.seed)
    for line in source.notes:
        note(line)
    options = {"sign": source.sign, "aggregate": source.aggregate, "union": union, **more}
    evaluated_from = 0
    if undecided:
        plain = not (average or stable_signs is not None or union or more or (sign, aggregate) != DEFAULTS)
        suggestion = undecided_threshold(run_dir, source.scores, options, plain, json)
        how, evaluated_from = {"threshold": suggestion.tau}, suggestion.from_layer
    circuit = select(source.scores, **how, **options)
    circuit = source.recorded(circuit)
    path = output or run_dir.circuit
    if path.is_dir():
        raise RelpError(f"--output {path} is a folder; expected a file name")
    check_file_writable(path)
    selection = circuit.meta["selection"]
    note_selection(selection)
    if mixed := mixed_warning(circuit.units.kinds):
        note(mixed)
    if edge_threshold is not None and circuit.units.space != "features":
        raise RelpError("--edge-threshold is for feature circuits; edges of heads and MLPs: relp score --nodes edges")
    if resamples:
        from relp_cli.evaluation.overlap import stability

        mean, _ = stability(chosen, resamples, **how, sign=sign, aggregate=aggregate, union=union, **more)
        note(f"stability: mean Jaccard overlap with {resamples} circuits from resampled pairs: {mean:.3f}")
    if verify:
        from relp_cli.runs.verifying import verify_circuit

        with progress() as bar:
            circuit, found = verify_circuit(spec, scores, circuit, confirm, session, bar)
        for line in found:
            note(line)
    if edge_threshold is not None:
        from relp_cli.runs.features import show_edges, with_edges

        prepared = prepare_again(spec, scores, session)
        with progress() as bar:
            circuit = with_edges(spec, prepared, session, circuit, edge_threshold, annotations, bar)
    from relp_cli.runs.made import note_made

    if not allow_empty:
        refuse_empty(circuit, path, how)
    if circuit.n_nodes in (0, circuit.n_possible):
        note(f"WARNING: this threshold keeps {'nothing' if circuit.n_nodes == 0 else 'everything'}")
    circuit.save(path)
    if output is None:
        note_made(path)
    if json:
        about = {"circuit": str(path), "n_nodes": circuit.n_nodes, "n_possible": circuit.n_possible, **circuit.meta}
        if listing:
            about |= {"units": list_of(scores, circuit)}
        print_json(about if edge_threshold is None else {**about, "edges": circuit.edges.columns()})
        return
    title = _title(circuit, evaluated_from)
    if listing:
        show_list(scores, replace(circuit, edges=None), path, title=title)  # edges follow
    else:
        print_table(out, (_sites_table if circuit.units.space == "features" else _layers_table)(circuit), title=title)
    if edge_threshold is not None:
        show_edges(spec, prepared, session, circuit, annotations, out)
    log.print(str(path))


def check_numbers(confirm: float | None, verify: bool, edge_threshold: float | None, annotations: Path | None) -> None:
    """Raises RelpError for numbers that are none, options without the one that they belong to, and annotations that cannot be
    read.
    """
    if confirm is not None and not verify:
        raise RelpError("--confirm belongs to --verify")
    if confirm is not None and not 0 <= confirm < math.inf:
        raise RelpError(f"--confirm: expected a number from 0 up, got {confirm}")
    if annotations is not None:
        from relp_cli.features.annotations import read_annotations

        if edge_threshold is None:
            raise RelpError("--annotations belongs to --edge-threshold")
        read_annotations(annotations)
    if edge_threshold is not None and not math.isfinite(edge_threshold):
        raise RelpError(f"--edge-threshold: expected a number, got {edge_threshold}")


def clusters_of(asked: str, other: Mapping[str, Any]) -> int | None:
    """How many clusters (None: as many as there are). other: option → whether it was given, of options for one circuit alone.

    Raises: RelpError for these, and for what is no number of clusters.
    """
    from relp_cli.runs.clustering import clusters_asked

    count = clusters_asked(asked)
    for name in (name for name, given in other.items() if given):
        raise RelpError(f"{name} is for one circuit; --clusters makes one for each cluster")
    return count


def clustered(
    spec: ScoreSpec, scores: Scores, count: int | None, how: dict[str, Any], session: Session, folder: Path, json: bool
) -> None:
    """A circuit for each cluster of pairs, written into the folder and shown."""
    from relp_cli.cli.clusters import show_clusters
    from relp_cli.runs.clustering import cluster_run

    with progress() as bar:
        made = cluster_run(spec, scores, count, how, session, folder, bar)
    print_json({"folder": str(made.folder), **made.as_dict()}) if json else show_clusters(made)


def note_selection(selection: Mapping[str, Any]) -> None:
    """What people have to know of how the last units were kept."""
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


def check_refining(
    average: list[str],
    stable_signs: float | None,
    union: bool,
    resamples: int,
    fraction: float | None,
    top_p: float | None,
    verify: bool,
) -> None:
    """Raises RelpError for what does not go with averaged ranks or a filter of signs."""
    option = "--average" if average else "--stable-signs"
    for name, given in (("--union", union), ("--stability", resamples)):
        if given:
            raise RelpError(f"{option} selects from means over pairs, {name} from single pairs; give one of them")
    for name, value in (("--fraction", fraction), ("--top-p", top_p)):
        if average and value is not None:
            raise RelpError(
                f"{name} is of the sizes of scores; --average ranks them: --top-k, or --threshold (a share of ranks)"
            )
    if average and verify:
        raise RelpError("--verify with --average needs --confirm: the threshold is one of ranks, not of effects")
    if stable_signs is not None and not 0.5 < stable_signs <= 1:
        raise RelpError(f"--stable-signs: expected a share above 0.5 and up to 1, got {stable_signs:g}")


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
