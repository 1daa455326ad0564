"""relp compare TASK... | RUN RUN..."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import (
    COMPONENTS,
    DryRunFlag,
    JsonFlag,
    comma,
    count_option,
    default_model,
    log,
    note,
    output_option,
    print_fields,
    print_json,
    progress,
    refuse_typed,
    typed,
)
from relp_cli.cli.options import BoundedOptions, takes
from relp_cli.cli.waiting import waiting

# What is asked of runs that exist.
OF_RUNS = ("targets", "reference", "top_k", "seed", "device", "device_map", "output", "json")


@takes(BoundedOptions)
def command(
    how: BoundedOptions,
    context: typer.Context,
    targets: Annotated[list[str], typer.Argument(help="Tasks, or run directories of one task, model and node kinds.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Models, comma-separated; of the hub also NAME@REVISION.")
    ] = "tiny-gpt2",
    methods: Annotated[str, typer.Option(help="Methods to compare with the reference.")] = "atp,relp",
    nodes: Annotated[str, typer.Option(help="Node kinds, or edges.")] = COMPONENTS,
    reference: Annotated[str, typer.Option(help="What estimates are compared with.")] = "act_patch",
    top_k: Annotated[int, count_option(1, help="k of the top-k overlap.")] = 10,
    output: Annotated[
        Path | None,
        output_option(help="Folder (default: runs/compare-TASKS-MODELS)."),
    ] = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Agreement of methods with exact patching: the paper's Table 5 and the heatmaps of its Figure 2.

    Example: relp compare ioi sva_across_pp --model tiny-gpt2 --methods atp,relp,relp+ah
    """
    from relp_cli.runs.folders import check_compared

    runs = check_compared(targets)
    from relp_cli.runs.scoring import Session
    from relp_cli.studies.comparing import CompareOptions, compare_runs, compare_tasks

    if nodes == COMPONENTS:
        nodes = "feature" if how.dictionary is not None else _served(comma(methods, "--methods"))
    options = CompareOptions(
        models=comma(model, "--model"), methods=comma(methods, "--methods"), nodes=comma(nodes, "--nodes"),
        reference=reference, top_k=top_k, params=how.params, common=how.of_spec,
    )  # fmt: skip
    if runs:
        refuse_typed(context, OF_RUNS, "is for comparing methods on tasks; runs were scored already")
    if output is None:
        names = [*(Path(t).stem for t in targets), *(Path(m).name for m in options.models if not runs)]
        output = Path("runs") / "-".join(["compare", *names])[:120]
    session = Session(how.place, say=waiting, at_most=not typed(context, "pairs"))
    if dry_run:
        from relp_cli.studies.foreseen import comparison_cost

        cost = {"folder": str(output), **comparison_cost(targets, options, session)}
        print_json(cost) if json else print_fields(cost)
        return
    with default_model(context, model) as say_default, progress() as bar:
        if runs:
            result = compare_runs([Path(t) for t in targets], options, output, how.place)
        else:
            result = compare_tasks(targets, options, output, session, bar)
            say_default()
    for line in result.notes:
        note(line)
    if json:
        print_json({"folder": str(output), "rows": result.table.to_dict("records")})
        return
    from relp_cli.cli.tables import show_agreement

    show_agreement(result.table)
    for path in result.files:
        log.print(str(path))


def _served(methods: tuple[str, ...]) -> str:
    """What is compared by default: edges, where all methods score nothing else (`eap,eap_ig`)."""
    from relp_cli.methods.table import default_nodes

    served = {default_nodes(method, comma(COMPONENTS, "--nodes")) for method in methods}
    return ",".join(served.pop()) if len(served) == 1 else COMPONENTS
