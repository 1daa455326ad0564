"""relp evaluate RUN | JOB.yaml"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relp_cli import BATCH_SIZE
from relp_cli.cli.benchmarks import refuse_misplaced
from relp_cli.cli.common import (
    DeviceMapOption,
    DeviceOption,
    DryRunFlag,
    JsonFlag,
    MemoryOption,
    ShardOption,
    comma,
    count_option,
    log,
    note,
    out,
    output_option,
    print_fields,
    print_json,
    progress,
    refuse_typed,
    seed_option,
    typed,
)
from relp_cli.cli.options import takes
from relp_cli.cli.waiting import waiting
from relp_cli.config.memory import bytes_of
from relp_cli.models.placement import placed

if TYPE_CHECKING:
    from relp_cli.studies.evaluating import Evaluation

ONLY_JOBS = {"override", "engine", "shard", "workers", "address", "cpus_per_worker", "gpus_per_worker", "slurm"}
OF_JOBS = {"target", "batch_size", "memory", "device", "device_map", "output", "dry_run", "json", *ONLY_JOBS}


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated on which pairs and how, of a run; and where the cells of a job are computed."""

    sweep: Annotated[
        str | None,
        typer.Option(help="log:1e-4:1:15 (thresholds), or counts:1,10,100. Default: circuit.json, else log:1e-4:1:15."),
    ] = None
    nodes: Annotated[str | None, typer.Option(help="A sweep's kinds (default: all that were scored, together).")] = None
    circuit: Annotated[Path | None, typer.Option(help="Evaluate this circuit file instead.")] = None
    task: Annotated[
        str | None, typer.Option(help="Evaluate on another task, or file of pairs (evaluation-TASK.csv): transfer.")
    ] = None
    ablation: Annotated[str, typer.Option(help="mean, mean_task, zero, counterfactual; nodes: resample, corpus.")] = (
        "mean"
    )
    corpus: Annotated[Path | None, typer.Option(help="A text file, for --ablation corpus.")] = None
    minimality: Annotated[
        bool, typer.Option("--minimality", help="Also drop the circuit's nodes or edges one by one (minimality.csv).")
    ] = False
    exclude_layers: Annotated[
        int | None, count_option(0, help="First layers left unablated (default: a third; 0: none).")
    ] = None
    metric: Annotated[str | None, typer.Option(help="logit_diff, prob_diff, kl or accuracy (default: the run's).")] = (
        None
    )
    pairs: Annotated[int, count_option(1, help="Held-out pairs (by default as many as exist, at most).")] = 100
    seed: Annotated[int, seed_option(help="Draws held-out pairs, random circuits and bootstrap samples.")] = 0
    random: Annotated[int, count_option(0, help="Random circuits of the same size per point.")] = 3
    errors: Annotated[
        str | None, typer.Option(help="Error terms of feature circuits: all, residual (not of attention, MLP), none.")
    ] = None
    batch_size: Annotated[
        int | None, count_option(1, help=f"Pairs per pass (default: {BATCH_SIZE}, or the job's).")
    ] = None
    memory: MemoryOption = None
    device: DeviceOption = None
    device_map: DeviceMapOption = None
    output: Annotated[
        Path | None,
        output_option(help="Job folder; for a run, the table (default: evaluation.csv in it)."),
    ] = None
    override: Annotated[
        list[str], typer.Option("--override", help="Override a key of the job: models=\\[tiny-gpt2]")
    ] = field(default_factory=list)
    engine: Annotated[str, typer.Option(help="local, ray or slurm (jobs only; docs/cluster.md).")] = "local"
    shard: ShardOption = None
    workers: Annotated[
        int | None,
        count_option(1, help="Processes here, one a GPU where there are any; of an engine: at once (jobs only)."),
    ] = None
    address: Annotated[str | None, typer.Option(help="Of --engine ray: the cluster's (HOST:6379).")] = None
    cpus_per_worker: Annotated[int | None, count_option(1, help="Of --engine ray (default: 1).")] = None
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="Of --engine ray (default: 1 where the cluster has GPUs).")
    ] = None
    slurm: Annotated[
        list[str], typer.Option("--slurm", help="Of --engine slurm: partition=gpu, time=240, gpus=1, mem=32GB …")
    ] = field(default_factory=list)
    dry_run: DryRunFlag = False
    json: JsonFlag = False

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else bytes_of(self.memory, "--memory")

    @property
    def kinds(self) -> tuple[str, ...]:
        return () if self.nodes is None else comma(self.nodes, "--nodes")

    @property
    def overrides(self) -> list[str]:
        """`--override`, and what jobs have as keys, under their names."""
        keys = {"batch_size": self.batch_size, "memory": self.memory_bytes}
        return [*self.override, *(f"{key}={value}" for key, value in keys.items() if value is not None)]

    def of_run(self) -> Evaluation:
        from relp_cli.studies.evaluating import Evaluation

        return Evaluation(
            sweep=self.sweep, kinds=self.kinds, circuit=self.circuit, task=self.task, metric=self.metric, pairs=self.pairs,
            seed=self.seed, errors=self.errors, ablation=self.ablation, corpus=self.corpus, exclude_layers=self.exclude_layers,
            batch_size=self.batch_size or BATCH_SIZE, memory=self.memory_bytes,
            alone="drop nodes of" if self.minimality else "",
        )  # fmt: skip


@takes(EvaluateOptions)
def command(
    asked: EvaluateOptions,
    context: typer.Context,
    target: Annotated[str, typer.Argument(help="A run directory, or a batch job (JOB.yaml, or a shipped job's name).")],
) -> None:
    """Faithfulness and completeness of a run's circuit on held-out pairs, over a sweep of thresholds, or a batch job.

    Benchmarks are verbs of their own: relp evaluate mib DIR, relp evaluate known_circuits (--help of each).

    Example: relp evaluate runs/ioi --sweep log:1e-4:1:15
    """
    place = placed(asked.device, asked.device_map)
    refuse_misplaced(target)
    if target.endswith((".yaml", ".yml")) or not Path(target).exists():
        _job(target, asked, context, place)
        return
    of_runs = {str(parameter.name) for parameter in context.command.params} - ONLY_JOBS
    refuse_typed(context, of_runs, f"is for jobs; '{target}' is a run")
    kinds = asked.kinds
    from relp_cli.runs.folders import check_task
    from relp_cli.runs.rundir import RunDir

    RunDir(Path(target)).read()  # what is none is said before torch is imported
    if asked.task is not None:
        check_task(asked.task)
    if asked.dry_run:
        from relp_cli.studies.evaluating import evaluation_cost

        cost = evaluation_cost(Path(target), asked.sweep, asked.circuit, asked.pairs, asked.random, kinds)
        print_json(cost) if asked.json else print_fields(cost)
        return
    _run(target, asked, place, at_most=not typed(context, "pairs"))


def _job(target: str, asked: EvaluateOptions, context: typer.Context, place: str | None) -> None:
    from relp_cli.cli.job import Where, named_job, run_job
    from relp_cli.runs.folders import RUN, check_job_name

    check_job_name(target, "a run's folder", RUN, "job.json")
    job = named_job(target, asked.overrides)
    refuse_typed(context, OF_JOBS, f"is for runs; '{target}' is a job, whose keys --override changes")
    own = {
        "address": asked.address, "cpus": asked.cpus_per_worker, "gpus": asked.gpus_per_worker, "slurm": tuple(asked.slurm)
    }  # fmt: skip
    where = Where(asked.engine, place, asked.shard, asked.workers, own)
    run_job(job, asked.output, where, asked.dry_run, asked.json)


def _run(target: str, asked: EvaluateOptions, place: str | None, at_most: bool) -> None:
    from relp_cli.cli.tables import show_evaluation
    from relp_cli.report.tables import show
    from relp_cli.runs.scoring import Session
    from relp_cli.studies.evaluating import evaluate_run, minimality_of_run, ready
    from relp_cli.tasks.counted import pairs_text

    at = ready(Path(target), asked.of_run(), Session(place, say=waiting, at_most=at_most), asked.output)
    with progress() as bar:
        path, table = evaluate_run(at, asked.random, asked.output, bar, note)
    dropped = None
    if asked.minimality:
        with progress() as bar:
            dropped, losses = minimality_of_run(at, bar)
    for line in at.notes:
        note(line)
    if asked.json:
        more = {"minimality": losses.to_dict("records")} if dropped else {}
        print_json({"table": str(path), "rows": table.to_dict("records"), **more})
        return
    first = table.iloc[0]
    title = (
        f"{target}: {pairs_text(first.n_pairs, first.n_prompts, 'held-out pairs')}, "
        f"{first.ablation} ablation from layer {first.exclude_layers} up, "
        f"F(M) = {first.F_M:.3f}, F(∅) = {first.F_empty:.3f} [95 % bootstrap]"
    )
    show_evaluation(table, title)
    log.print(str(path))
    if dropped:
        useless = int((losses.loss <= 0).sum())
        show(losses.head(20), out, f"dropped one by one: {useless} of {len(losses)} could go at no loss")
        log.print(str(dropped))
