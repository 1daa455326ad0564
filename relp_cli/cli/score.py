"""relp score TASK"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import (
    COMPONENTS,
    DryRunFlag,
    JsonFlag,
    RevisionOption,
    ShardOption,
    at_revision,
    comma,
    count_option,
    default_model,
    log,
    note,
    out,
    output_option,
    print_fields,
    print_json,
    progress,
    typed,
)  # fmt: skip
from relp_cli.cli.options import BoundedOptions, takes
from relp_cli.cli.waiting import waiting


@takes(BoundedOptions)
def command(
    how: BoundedOptions,
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="A shipped task (relp ls tasks), a task YAML, or a file of pairs.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Embedded name, local folder, or hub name.")
    ] = "tiny-gpt2",
    revision: RevisionOption = None,
    method: Annotated[str, typer.Option(help="relp ls methods; `relp+ah` adds a rule.")] = "relp",
    nodes: Annotated[str, typer.Option(help="Node kinds, comma-separated (relp ls nodes).")] = COMPONENTS,
    budget: Annotated[
        float | None, typer.Option(help="Of method screened: the share of nodes that is patched exactly (default: .2).")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="Of methods that learn: the run whose ranking they start from.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="What features mean: JSON lines with site, feature, annotation.")
    ] = None,
    per_example: Annotated[
        bool | None, typer.Option(help="Store scores per example (default: where they fit).")
    ] = None,
    top: Annotated[int, count_option(1, help="Nodes to print per kind.")] = 10,
    output: Annotated[Path | None, output_option(help="Run directory (default: runs/…).")] = None,
    shard: ShardOption = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Score nodes of a model on a task and write a run directory.

    Example: relp score ioi --model tiny-gpt2 --method relp --nodes mlp_out,head -o runs/ioi
    """
    from relp_cli.methods.table import default_nodes
    from relp_cli.runs.checked import score_spec

    if how.dictionary is not None:
        nodes = "feature" if nodes == COMPONENTS else nodes
    elif nodes == COMPONENTS:
        nodes = ",".join(default_nodes(method, comma(nodes, "--nodes")))
    own = {name: value for name, value in (("budget", budget), ("start", start)) if value is not None}
    spec = score_spec(
        task=task, model=at_revision(model, revision), method=method, nodes=comma(nodes, "--nodes"),
        keep_examples=per_example, params=how.params | own, **how.of_spec,
    )  # fmt: skip
    from relp_cli.runs.folders import check_task

    check_task(task)  # what is wrong without torch is said before it is imported
    from relp_cli.costs.passes import describe_cost
    from relp_cli.evaluation.behaviour import said
    from relp_cli.jobs.shards import score_shard, shard_of
    from relp_cli.runs.scoring import Prepared, Session, check_request, score_run, scoring_notes

    session = Session(how.place, say=waiting, at_most=not typed(context, "pairs"))
    share = None if shard is None else shard_of(shard)
    check_request(spec, output)
    if annotations is not None:
        from relp_cli.features.annotations import read_annotations

        read_annotations(annotations)
    waiting(f"loading {at_revision(model, revision)} …")
    if dry_run:
        from relp_cli.studies.foreseen import foresee

        cost = foresee(spec, session).fields
        print_json(cost) if json else print_fields(cost)
        return

    def ready(prepared: Prepared) -> None:
        say_default()
        for line in prepared.notes:
            note(line)
        if not json:
            note(
                f"{prepared.model.name} on {prepared.task.name}: {said(prepared.behaviour.as_dict(), prepared.metric)}"
            )
        if spec.method == "act_patch":
            note(f"act_patch: {describe_cost(prepared.model, prepared.pairs, spec)['forwards']}")

    with default_model(context, model) as say_default, progress() as bar:
        if share is None:
            run, scores, cached = score_run(spec, session, output, bar, ready)
        else:
            run, whole, cached, waiting_for = score_shard(spec, session, share, output, bar, ready)
            if whole is None:
                state = f"{share} is done; {waiting_for} batches wait for other shards; the last one writes the run"
                print_json({"run": str(run.path), "shard": str(share), "waiting": waiting_for}) if json else note(state)
                return
            scores = whole
    for line in scoring_notes(scores):
        note(line)
    if json:
        print_json({"run": str(run.path), "cached": cached, **run.read()})
        return
    from relp_cli.cli.tables import show_scores

    if "feature" in scores:
        from relp_cli.studies.features import show_features

        show_features(spec, session, scores, annotations, out, top)
    else:
        show_scores(scores, top)
    log.print(f"{'already done: ' if cached else ''}{run.path}")
