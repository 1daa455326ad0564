"""relp evaluate known_circuits"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relp_cli import BATCH_SIZE
from relp_cli.cli.common import (
    DryRunFlag,
    DtypeOption,
    JsonFlag,
    assignments,
    comma,
    count_option,
    log,
    note,
    out,
    output_option,
    print_json,
    progress,
    seed_option,
)

if TYPE_CHECKING:
    import pandas as pd

METHODS = "atp,relp,relp+secant,ig_inputs,act_patch"


def command(
    methods: Annotated[str, typer.Option(help="Methods, comma-separated; relp ls methods.")] = METHODS,
    nodes: Annotated[str, typer.Option(help="nodes (heads and MLPs), edges, or both.")] = "nodes,edges",
    cases: Annotated[
        str | None,
        typer.Option(help="Cases, comma-separated: names (relp ls cases), or folders. Default: all that ship."),
    ] = None,
    direction: Annotated[str, typer.Option(help="noising (run the original) or denoising.")] = "noising",
    over_pairs: Annotated[
        str, typer.Option(help="signed: rank by |mean score|, as circuits are selected; absolute: by mean |score|.")
    ] = "signed",
    settings: Annotated[list[str], typer.Option("--set", help="A parameter of methods: --set steps=20")] = [],  # noqa: B006
    bootstrap: Annotated[int, count_option(1, help="Resamples of pairs and cases, for the intervals.")] = 1000,
    seed: Annotated[int, seed_option(help="Draws the resamples.")] = 0,
    dtype: DtypeOption = "float64",
    batch_size: Annotated[int, count_option(1, help="Pairs per pass.")] = BATCH_SIZE,
    output: Annotated[Path, output_option(help="The table of all cases.")] = Path("known_circuits.csv"),
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Which method finds circuits that are known: AUROC, and precision and recall at the circuit's size, over shipped models
    whose circuit is known by construction (docs/known-circuits.md).

    Example: relp evaluate known_circuits --methods atp,relp,relp+secant,act_patch --nodes edges
    """
    from relp_cli.files import check_file_writable
    from relp_cli.known.case import case_names, read_case

    chosen = [read_case(name) for name in (comma(cases, "--cases") if cases is not None else case_names())]
    check_file_writable(output)
    from relp_cli.evaluation.known_circuits import Question, check_cases, judge
    from relp_cli.report.tables import write_table

    question = Question(
        methods=comma(methods, "--methods"), spaces=comma(nodes, "--nodes"), direction=direction, over_pairs=over_pairs,
        params=assignments(settings), dtype=dtype, batch_size=batch_size, bootstrap=bootstrap, seed=seed,
    )  # fmt: skip
    check_cases(chosen)
    asked = question.asked()
    for line in _left_out(question.methods, question.spaces, asked, chosen):
        note(line)
    if dry_run:
        _show_cost(chosen, asked, json)
        return
    with progress() as bar:
        table = judge(chosen, question, bar)
    write_table(table, output)
    if json:
        print_json({"table": str(output), "rows": table.to_dict("records")})
        return
    _show(table, over_pairs)
    log.print(str(output))


def _left_out(
    methods: tuple[str, ...], spaces: tuple[str, ...], asked: list[tuple[str, str]], cases: list[Any]
) -> list[str]:
    """What is not scored, and why."""
    lines = [
        f"{method} does not score {space}: left out there"
        for space in spaces
        for method in methods
        if (space, method) not in asked
    ]
    blank = [case.name for case in cases if case.edges is None]
    if "edges" in spaces and blank:
        lines.append(
            f"the edges of {len(blank)} of {len(cases)} cases are not known ({', '.join(blank)}): left out there"
        )
    return lines


def _show_cost(cases: list[Any], asked: list[tuple[str, str]], json: bool) -> None:
    from relp_cli.files import lines_of
    from relp_cli.methods.table import row_of

    rows = [
        {"case": case.name, "kind": case.kind, "pairs": len(lines_of(case.pairs, "pairs")), "nodes in circuit": len(case.nodes),
         "edges in circuit": None if case.edges is None else len(case.edges), "about": case.about}
        for case in cases
    ]  # fmt: skip
    costs = [{"of": space, "method": m, "per batch of pairs": row_of(m).cost} for space, m in asked]
    if json:
        print_json({"cases": rows, "methods": costs})
        return
    import pandas as pd

    from relp_cli.report.tables import show

    for name, some in (("cases", rows), ("methods", costs)):
        show(pd.DataFrame(some), out, name)


def _show(table: pd.DataFrame, over_pairs: str) -> None:
    """Per space: the means over cases with their intervals, and AUROC case by case."""
    import pandas as pd

    from relp_cli.evaluation.known_circuits import ALL, MEASURES
    from relp_cli.report.tables import cell, show

    for space, part in table.groupby("space", sort=False):
        rows = [
            {"method": r["method"]}
            | {m: f"{cell(r[m])} [{cell(r[m + '_lo'])}, {cell(r[m + '_hi'])}]" for m in MEASURES}
            | {
                "forward": round(r["forwards_per_pair"], 1),
                "backward": round(r["backwards_per_pair"], 1),
                "seconds": r["seconds"],
            }
            for r in part[part.case == ALL].to_dict("records")
        ]
        single = part[part.case != ALL]
        n, first = single.case.nunique(), part.iloc[0]
        how = "|mean score|" if over_pairs == "signed" else "mean |score|"
        title = f"{space}: mean of {n} cases, {first.direction}, ranked by {how} [95 % bootstrap over cases and pairs]"
        show(pd.DataFrame(rows), out, title, 2)
        notes = [f"{r['case']}: {r['note']}" for r in single.drop_duplicates("case").to_dict("records") if r["note"]]
        by_case = single.pivot(index=["case", "n_circuit", "n_units"], columns="method", values="auroc")
        by_case = by_case[[r["method"] for r in rows]].reset_index()
        by_case.insert(1, "circuit", [f"{a} of {b}" for a, b in zip(by_case.n_circuit, by_case.n_units, strict=True)])
        by_case = by_case.drop(columns=["n_circuit", "n_units"])
        by_case.attrs["notes"] = notes
        show(by_case, out, f"{space}: AUROC by case")
