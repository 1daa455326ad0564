"""relp evaluate RUN | JOB.yaml"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from relp_cli.cli.common import (
    DeviceOption,
    DryRunFlag,
    JsonFlag,
    count_option,
    log,
    note,
    out,
    output_option,
    print_fields,
    print_json,
    progress,
    seed_option,
)
from relp_cli.errors import RelpError


def command(
    target: Annotated[str, typer.Argument(help="A run directory, or a batch job (JOB.yaml, or a shipped job's name).")],
    sweep: Annotated[
        str | None,
        typer.Option(help="log:1e-4:1:15 (thresholds), or counts:1,10,100. Default: circuit.json, else log:1e-4:1:15."),
    ] = None,
    circuit: Annotated[Path | None, typer.Option(help="Evaluate this circuit file instead.")] = None,
    ablation: Annotated[
        str, typer.Option(help="mean, mean_task, zero, counterfactual; nodes: resample, corpus.")
    ] = "mean",
    corpus: Annotated[Path | None, typer.Option(help="A text file, for --ablation corpus.")] = None,
    minimality: Annotated[
        bool, typer.Option("--minimality", help="Also drop the circuit's nodes or edges one by one (minimality.csv).")
    ] = False,
    exclude_layers: Annotated[
        int | None, count_option(0, help="First layers left unablated (default: a third; 0: none).")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="logit_diff, prob_diff, kl or accuracy (default: the run's).")
    ] = None,
    pairs: Annotated[int, count_option(1, help="Held-out pairs (as many as exist, at most).")] = 100,
    seed: Annotated[int, seed_option(help="Draws held-out pairs, random circuits and bootstrap samples.")] = 0,
    random: Annotated[int, count_option(0, help="Random circuits of the same size per point.")] = 3,
    errors: Annotated[
        str | None, typer.Option(help="Error terms of feature circuits: all, residual (not of attention, MLP), none.")
    ] = None,
    device: DeviceOption = None,
    output: Annotated[
        Path | None,
        output_option(help="Job folder; for a run, the table (default: evaluation.csv in it)."),
    ] = None,
    override: Annotated[
        list[str], typer.Option("--override", help="Override a key of the job: models=\\[tiny-gpt2]")
    ] = [],  # noqa: B006
    engine: Annotated[str, typer.Option(help="local or ray (jobs only).")] = "local",
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Faithfulness and completeness of a run's circuit on held-out pairs, over a sweep of thresholds, or a batch job.

    Example: relp evaluate runs/ioi --sweep log:1e-4:1:15
    """
    if target.endswith((".yaml", ".yml")) or not Path(target).exists():
        from relp_cli.cli.job import run_job

        run_job(target, override, output, engine, device, dry_run, json)
        return
    if override or engine != "local":
        raise RelpError(f"{'--override' if override else '--engine'} is for jobs; '{target}' is a run")
    if dry_run:
        from relp_cli.runs.evaluating import evaluation_cost

        cost = evaluation_cost(Path(target), sweep, circuit, pairs, random)
        print_json(cost) if json else print_fields(cost)
        return
    from relp_cli.cli.tables import show_evaluation
    from relp_cli.report.tables import show
    from relp_cli.runs.evaluating import evaluate_run, minimality_of_run
    from relp_cli.runs.scoring import Session

    how: dict[str, Any] = {
        "circuit": circuit, "ablation": ablation, "exclude_layers": exclude_layers, "metric": metric, "pairs": pairs,
        "seed": seed, "session": Session(device), "corpus": corpus, "errors": errors,
    }  # fmt: skip
    with progress() as bar:
        path, table, notes = evaluate_run(
            Path(target), sweep=sweep, random_circuits=random, output=output, progress=bar, **how
        )
    dropped = None
    if minimality:
        with progress() as bar:
            dropped, losses = minimality_of_run(Path(target), progress=bar, **how)
    for line in notes:
        note(line)
    if json:
        more = {"minimality": losses.to_dict("records")} if dropped else {}
        print_json({"table": str(path), "rows": table.to_dict("records"), **more})
        return
    first = table.iloc[0]
    title = (
        f"{target}: {first.n_pairs} held-out pairs, {first.ablation} ablation from layer {first.exclude_layers} up, "
        f"F(M) = {first.F_M:.3f}, F(∅) = {first.F_empty:.3f} [95 % bootstrap]"
    )
    show_evaluation(table, title)
    log.print(str(path))
    if dropped:
        useless = int((losses.loss <= 0).sum())
        show(losses.head(20), out, f"dropped one by one: {useless} of {len(losses)} could go at no loss")
        log.print(str(dropped))
