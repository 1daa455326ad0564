"""relp test RUN"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relp_cli import BATCH_SIZE
from relp_cli.cli.common import (
    DeviceMapOption,
    DeviceOption,
    DryRunFlag,
    JsonFlag,
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

if TYPE_CHECKING:
    import pandas as pd


def command(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run directory that has a circuit (relp circuit RUN).")],
    circuit: Annotated[Path | None, typer.Option(help="Test this circuit file instead.")] = None,
    task: Annotated[str | None, typer.Option(help="Test on another task, or file of pairs (tests-TASK.csv).")] = None,
    ablation: Annotated[
        str, typer.Option(help="mean, mean_task, zero, counterfactual; nodes: resample, corpus.")
    ] = "mean",
    corpus: Annotated[Path | None, typer.Option(help="A text file, for --ablation corpus.")] = None,
    exclude_layers: Annotated[
        int | None, count_option(0, help="First layers left unablated (default: a third; 0: none).")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="logit_diff, prob_diff or accuracy (default: the run's).")] = None,
    alpha: Annotated[float, typer.Option(help="Chance to reject a null hypothesis that is true, per test.")] = 0.05,
    epsilon: Annotated[
        float, typer.Option(help="Equivalence: the circuit beats the model on ½ ± this of the pairs.")
    ] = 0.1,
    quantile: Annotated[float, typer.Option(help="Share of random circuits, or parts, to surpass.")] = 0.9,
    permutations: Annotated[int, count_option(1, help="Permutations of the test of independence.")] = 1000,
    references: Annotated[int, count_option(1, help="Random circuits of the same size, and random paths.")] = 100,
    units: Annotated[
        int, count_option(1, help="Units that minimality tests, drawn at random from a circuit of more.")
    ] = 100,
    pairs: Annotated[int, count_option(1, help="Held-out pairs (by default as many as exist, at most).")] = 100,
    seed: Annotated[int, seed_option(help="Draws held-out pairs, random circuits, paths and permutations.")] = 0,
    errors: Annotated[
        str | None, typer.Option(help="Error terms of feature circuits: all, residual (not of attention, MLP), none.")
    ] = None,
    batch_size: Annotated[int, count_option(1, help="Pairs per pass.")] = BATCH_SIZE,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Hypothesis tests of a run's circuit on held-out pairs: equivalence, independence, minimality, sufficiency and partial
    necessity (Shi et al. 2024). docs/testing.md says what each rejection means.

    Example: relp test runs/ioi --pairs 100 --references 100
    """
    from relp_cli.runs.folders import check_task
    from relp_cli.runs.rundir import RunDir

    RunDir(run).read()  # what is none is said before torch is imported
    if task is not None:
        check_task(task)
    from relp_cli.evaluation.verdicts import Levels

    how = Levels(alpha, epsilon, quantile, permutations, references, units)
    how.check()
    place = placed(device, device_map)
    if dry_run:
        from relp_cli.studies.testing import testing_cost

        cost = testing_cost(run, circuit, pairs, how)
        print_json(cost) if json else print_fields(cost)
        return
    from relp_cli.runs.scoring import Session
    from relp_cli.studies.evaluating import Evaluation, ready
    from relp_cli.studies.testing import run_tests
    from relp_cli.tasks.counted import pairs_text

    asked = Evaluation(
        circuit=circuit, task=task, metric=metric, pairs=pairs, seed=seed, errors=errors, ablation=ablation, corpus=corpus,
        exclude_layers=exclude_layers, batch_size=batch_size, alone="test",
    )  # fmt: skip
    at = ready(run, asked, Session(place, say=waiting, at_most=not typed(context, "pairs")))
    with progress() as bar:
        files, tests, tested = run_tests(at, how, bar, note)
    for line in at.notes:
        note(line)
    if json:
        rows = {"tests": tests.to_dict("records"), "units": tested.to_dict("records")}
        print_json({"tables": [str(file) for file in files], **rows})
        return
    first = tests.iloc[0]
    _show(
        tests,
        tested,
        f"{run}: {first.n_nodes} of {first.n_possible} units, "
        f"{pairs_text(first.n_pairs, first.n_prompts, 'held-out pairs')}, {first.metric}, "
        f"{first.ablation} ablation from layer {first.exclude_layers} up, α = {first.alpha:g} per test",
    )
    for file in files:
        log.print(str(file))


def _show(tests: pd.DataFrame, units: pd.DataFrame, title: str) -> None:
    """Figures of every test in a table, then what came of it and what was tested in a sentence each, then idle units."""
    import pandas as pd

    from relp_cli.report.tables import cell, show

    said = {True: "rejected", False: "not rejected", None: "not tested"}
    rows: list[Any] = list(tests.itertuples())
    made = [
        {
            "test": row.test,
            "statistic": f"{row.statistic:.4g} {row.of_statistic}" if row.rejected is not None else cell(None),
            "n": f"{row.n} {row.of_n}",
            f"effect [{1 - row.alpha:.0%}]": _effect(row) if row.rejected is not None else cell(None),
            "p": row.p,
            "correction": row.correction,
            "H0": said[row.rejected],
        }
        for row in rows
    ]
    show(pd.DataFrame(made), out, title)
    for row in rows:
        out.print(f"• {row.test}: {row.verdict}" + (f" [{row.note}]" if row.note else ""))
        out.print(f"    H0: {row.null}")
    if len(units) and units.rejected.any():
        show(
            units[units.rejected].head(20),
            out,
            "units that more than the allowed share of random parts match, at most 20",
        )


def _effect(row: Any) -> str:
    from relp_cli.report.tables import cell

    return cell(row.effect, 2) + (
        f" [{row.effect_lo:.2f}, {row.effect_hi:.2f}]" if row.effect_lo == row.effect_lo else ""
    )
