"""relp compare TASK... | RUN RUN..."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import (
    COMPONENTS,
    DeviceOption,
    DtypeOption,
    JsonFlag,
    comma,
    count_option,
    log,
    note,
    output_option,
    print_json,
    progress,
    seed_option,
)


def command(
    targets: Annotated[list[str], typer.Argument(help="Tasks, or run directories of one task, model and node kinds.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Models, comma-separated; of the hub also NAME@REVISION.")
    ] = "tiny-gpt2",
    methods: Annotated[str, typer.Option(help="Methods to compare with the reference.")] = "atp,relp",
    nodes: Annotated[str, typer.Option(help="Node kinds.")] = COMPONENTS,
    pairs: Annotated[int, count_option(1, help="How many prompt pairs.")] = 100,
    seed: Annotated[int, seed_option(help="Draws the pairs and the bootstrap samples.")] = 0,
    metric: Annotated[str | None, typer.Option(help="Default: the task's.")] = None,
    direction: Annotated[str, typer.Option(help="noising or denoising.")] = "noising",
    reference: Annotated[str, typer.Option(help="What estimates are compared with.")] = "act_patch",
    top_k: Annotated[int, count_option(1, help="k of the top-k overlap.")] = 10,
    dictionary: Annotated[
        str | None, typer.Option(help="Compare features of these sparse autoencoders: a folder, or tiny-pythia.")
    ] = None,
    only_correct: Annotated[bool, typer.Option(help="Keep the pairs that the model gets right.")] = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    output: Annotated[
        Path | None,
        output_option(help="Folder (default: runs/compare-TASKS-MODELS)."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Agreement of methods with exact patching: the paper's Table 5 and the heatmaps of its Figure 2.

    Example: relp compare ioi sva_across_pp --model tiny-gpt2 --methods atp,relp,relp+ah
    """
    from relp_cli.runs.comparing import CompareOptions, compare_runs, compare_tasks
    from relp_cli.runs.rundir import RunDir

    nodes = "feature" if dictionary is not None and nodes == COMPONENTS else nodes
    options = CompareOptions(
        models=comma(model, "--model"), methods=comma(methods, "--methods"), nodes=comma(nodes, "--nodes"),
        pairs=pairs, seed=seed, metric=metric, direction=direction, reference=reference, top_k=top_k,
        only_correct=only_correct, dtype=dtype, dictionary=dictionary,
    )  # fmt: skip
    if output is None:
        names = [*(Path(t).stem for t in targets), *(Path(m).name for m in comma(model, "--model"))]
        output = Path("runs") / "-".join(["compare", *names])[:120]
    with progress() as bar:
        if all(RunDir(Path(t)).exists() for t in targets):
            result = compare_runs([Path(t) for t in targets], options, output)
        else:
            result = compare_tasks(targets, options, output, device, bar)
    for line in result.notes:
        note(line)
    if json:
        print_json({"folder": str(output), "rows": result.table.to_dict("records")})
        return
    from relp_cli.cli.tables import show_agreement

    show_agreement(result.table)
    for path in result.files:
        log.print(str(path))
