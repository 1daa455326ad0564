"""relp robustness RUN"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from relp_cli import BATCH_SIZE
from relp_cli.cli.common import (
    DeviceMapOption,
    DeviceOption,
    DryRunFlag,
    JsonFlag,
    comma,
    count_option,
    log,
    note,
    out,
    print_fields,
    print_json,
    progress,
    seed_option,
    typed,
)
from relp_cli.cli.waiting import waiting
from relp_cli.models.placement import placed


def command(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run directory that `relp score` wrote.")],
    methods: Annotated[str | None, typer.Option(help="Methods (default: the run's own, and atp).")] = None,
    ablations: Annotated[str, typer.Option(help="Ablations, as `relp evaluate --ablation`.")] = "mean,zero",
    sweep: Annotated[
        str, typer.Option(help="Sizes of circuits, as `relp evaluate --sweep`: thresholds, counts or fractions.")
    ] = "fractions:.02,.05,.1",
    resamples: Annotated[int, count_option(1, help="Bootstrap resamples of the pairs.")] = 5,
    share: Annotated[float, typer.Option(help="The consensus keeps what this share of the circuits keeps.")] = 0.5,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of a transfer matrix: a circuit of each, evaluated on each.")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of the units that circuits of the transfer matrix keep.")] = 0.25,
    exclude_layers: Annotated[
        int | None, count_option(0, help="First layers left unablated (default: a third; 0: none).")
    ] = None,
    pairs: Annotated[int, count_option(1, help="Held-out pairs (by default as many as exist, at most).")] = 100,
    seed: Annotated[int, seed_option(help="Draws held-out pairs and resamples.")] = 0,
    batch_size: Annotated[int, count_option(1, help="Pairs per pass.")] = BATCH_SIZE,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """How much a circuit's faithfulness depends on pairs, templates, ablation, threshold and method; a circuit that they
    agree on; and how circuits transfer between tasks. docs/testing.md says what the table means.

    Example: relp robustness runs/ioi --methods relp,atp --tasks ioi,ioi_abba,sva_simple
    """
    from relp_cli.methods.table import same_method
    from relp_cli.runs.folders import check_task
    from relp_cli.runs.rundir import RunDir

    RunDir(run).read()  # what is none is said before torch is imported
    for task in comma(tasks, "--tasks") if tasks is not None else ():
        check_task(task)
    from relp_cli.runs.scoring import Session, open_run
    from relp_cli.studies.robustness import Grid, grid_cost, robustness_of_run

    place = placed(device, device_map)
    own = open_run(run)[1].method
    grid = Grid(
        comma(methods, "--methods") if methods is not None else (own, *(() if same_method(own, "atp") else ("atp",))),
        comma(ablations, "--ablations"), sweep, resamples, share, comma(tasks, "--tasks") if tasks is not None else (), keep,
        pairs, seed, exclude_layers, batch_size,
    )  # fmt: skip
    if dry_run:
        cost = grid_cost(run, grid)
        print_json(cost) if json else print_fields(cost)
        return
    with progress() as bar:
        got = robustness_of_run(run, grid, Session(place, say=waiting, at_most=not typed(context, "pairs")), bar)
    for line in got.notes:
        note(line)
    if json:
        tables: dict[str, Any] = {"settings": got.settings, "variance": got.variance, "transfer": got.transfer}
        rows = {name: None if table is None else table.to_dict("records") for name, table in tables.items()}
        print_json({"files": [str(file) for file in got.files], "consensus": got.circuit.n_nodes, **rows})
        return
    from relp_cli.report.tables import show

    f = got.settings.faithfulness
    show(
        got.variance, out,
        f"{run}: faithfulness {f.mean():.3f} on average over {len(f)} settings, from {f.min():.3f} to {f.max():.3f}; "
        "share of its variance by factor",
    )  # fmt: skip
    circuits = len(f) // len(grid.ablations)
    out.print(
        f"{got.circuit.n_nodes} of {got.circuit.n_possible} units are in at least {share:.0%} of {circuits} circuits"
    )
    if got.transfer is not None:
        about = f"faithfulness of the circuit of a row's task, without positions, on a column's, {grid.ablations[0]} ablation"
        show(got.transfer, out, about)
    for file in got.files:
        log.print(str(file))
