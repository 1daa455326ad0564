"""relp evaluate mib DIR"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from relp_cli.cli.common import (
    DryRunFlag,
    JsonFlag,
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
)
from relp_cli.cli.options import ScoringOptions, takes
from relp_cli.errors import RelpError

OF_RUNS = ("root", "runs", "heldout", "on", "bootstrap", "device", "device_map", "output", "dry_run", "json")


@takes(ScoringOptions)
def command(
    how: ScoringOptions,
    context: typer.Context,
    root: Annotated[
        Path, typer.Argument(metavar="DIR", help="A data set of MIB's (folder or file), or a folder of several.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Embedded name, local folder, or hub name (NAME@REVISION).")
    ] = "tiny-gpt2",
    methods: Annotated[str, typer.Option(help="Methods whose rankings are measured.")] = "atp,relp",
    nodes: Annotated[
        str, typer.Option(help="edges; or node kinds: head,mlp_out (components), mlp_neuron, …")
    ] = "edges",
    runs: Annotated[
        str | None, typer.Option(help="Measure these runs' scores in place of methods, comma-separated.")
    ] = None,
    heldout: Annotated[int, count_option(1, help="Held-out pairs (as many as exist, at most).")] = 100,
    on: Annotated[
        str | None, typer.Option(help="MIB's split to evaluate on: validation or test (default: the first there is).")
    ] = None,
    bootstrap: Annotated[int, count_option(1, help="Resamples of pairs, for intervals.")] = 1000,
    output: Annotated[Path | None, output_option(help="Folder (default: runs/mib-DIR-MODEL).")] = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """MIB's measures on local copies of its data sets: CPR, CMD and acc-AUC of rankings of edges, components or neurons.

    Rankings come from `train` (or part of a file without splits), circuits run on held-out pairs with all else at its value on
    the counterfactual prompt. CPR rewards circuits that overshoot the model, so all three are shown.

    Example: relp evaluate mib mib/ioi --model gpt2 --methods eap,eap_ig,relp
    """
    from relp_cli.studies.mib import MibOptions, evaluate_mib, mib_cost, model_of

    paths = tuple(map(Path, comma(runs, "--runs"))) if runs is not None else ()
    if paths:
        refuse_typed(context, OF_RUNS, "is for scoring; --runs names scores that exist")
    for option, typed in (("--split", how.split != "discovery"), ("--dictionary", how.dictionary is not None)):
        if typed:
            raise RelpError(f"{option} is not for MIB's data sets: their own splits, and edges or nodes, are measured")
    common = {k: v for k, v in how.of_spec.items() if k != "split"}
    options = MibOptions(
        model=model_of(paths) if paths else model, methods=comma(methods, "--methods"), nodes=comma(nodes, "--nodes"),
        params=how.params, common=common, heldout=heldout, on=on, runs=paths, bootstrap=bootstrap,
    )  # fmt: skip
    if dry_run:
        cost = mib_cost(root, options, how.place)
        print_json(cost) if json else print_fields(cost)
        return
    folder = output or Path("runs") / f"mib-{root.resolve().name}-{Path(options.model).name}"[:120]
    with progress() as bar:
        result = evaluate_mib(root, options, folder, how.place, bar)
    for line in result.notes:
        note(line)
    if json:
        tables = {"rows": result.table.to_dict("records"), "curves": result.curves.to_dict("records")}
        print_json({"folder": str(folder), **tables, "notes": list(result.notes)})
        return
    for name, rows in result.table.groupby("data", sort=False):
        _show(str(name), rows)
    for path in result.files:
        log.print(str(path))


def _show(name: str, rows: Any) -> None:
    import pandas as pd

    from relp_cli.report.tables import cell, show
    from relp_cli.tasks.counted import pairs_text

    first = rows.iloc[0]
    shown = [
        {
            "method": row["method"],
            **{
                title: f"{cell(row[key], 3)} [{cell(row[f'{key}_lo'], 3)}, {cell(row[f'{key}_hi'], 3)}]"
                for title, key in (("CPR ↑", "CPR"), ("CMD ↓", "CMD"), ("acc-AUC ↑", "acc_auc"))
            },
            "forward": row["forwards_per_pair"],
            "backward": row["backwards_per_pair"],
            "note": "; ".join(
                n for n in (f"transfer from {row['scored_on']}" if row["transfer"] else "", row["note"]) if n
            ),
        }
        for row in rows.to_dict("records")
    ]
    title = (
        f"{name}, {first.model}, {'/'.join(dict.fromkeys(rows.kind))}: "
        f"{pairs_text(first.n_pairs, first.get('n_prompts'), 'held-out pairs')}, accuracy "
        f"{first.accuracy:.2f}, m(M) = {first.F_M:.3f}, m(∅) = {first.F_empty:.3f} [95 % bootstrap over pairs]"
    )
    show(pd.DataFrame(shown), out, title)
