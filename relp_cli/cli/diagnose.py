"""relp diagnose TASK"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relp_cli.cli.common import (
    DryRunFlag,
    JsonFlag,
    RevisionOption,
    at_revision,
    count_option,
    log,
    note,
    out,
    output_option,
    print_fields,
    print_json,
    progress,
    typed,
)
from relp_cli.cli.options import PairOptions, takes
from relp_cli.cli.waiting import waiting

if TYPE_CHECKING:
    import pandas as pd


PLACE = ("kind", "layer", "position", "head", "query")  # what names a row, at the left


@takes(PairOptions, pairs=40)
def command(
    how: PairOptions,
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="A shipped task (relp ls tasks), a task YAML, or a file of pairs.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Embedded name, local folder, or hub name.")
    ] = "tiny-gpt2",
    revision: RevisionOption = None,
    method: Annotated[
        str, typer.Option(help="What to diagnose: atp, atp_star, relp, relp+two_point, ig_inputs, relp+secant.")
    ] = "atp",
    top: Annotated[int, count_option(1, help="Suspects, and controls, to patch exactly per node kind.")] = 10,
    show: Annotated[int, count_option(0, help="Rows to print per table.")] = 12,
    thorough: Annotated[bool, typer.Option(help="Try ig_activations too (passes per layer and node kind).")] = False,
    output: Annotated[
        Path | None, output_option(help="Also write all rows of the tables into this folder, for relp report.")
    ] = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Where and why a gradient method fails on a task, checked by exact patching, and which method to use instead.

    Example: relp diagnose ioi --model tiny-gpt2
    """
    from relp_cli.runs.checked import score_spec

    spec = score_spec(task=task, model=at_revision(model, revision), **how.of_spec)
    from relp_cli.runs.folders import check_task

    check_task(task)
    from relp_cli.evaluation.diagnose import Options, check_candidate, diagnose
    from relp_cli.files import check_writable
    from relp_cli.runs.scoring import Session, prepare
    from relp_cli.studies.diagnosing import RECORD, save_diagnosis

    check_candidate(method)
    if output is not None:
        check_writable(output / RECORD)
    session = Session(how.place, say=waiting, at_most=not typed(context, "pairs"))
    if dry_run:
        from relp_cli.studies.foreseen import diagnosis_cost

        cost = diagnosis_cost(spec, method, top, thorough, session)
        print_json(cost) if json else print_fields(cost)
        return
    prepared = prepare(spec, session)
    with progress() as bar:
        found = diagnose(
            prepared.model, prepared.pairs, prepared.metric, how.direction, method,
            Options(top=top, thorough=thorough), how.seed, bar,
        )  # fmt: skip
    for line in prepared.notes:
        note(line)
    tables = _tables(found, show)
    about = {
        "task": prepared.task.name,
        "model": prepared.model.name,
        "direction": how.direction,
        "metric": prepared.metric,
    }
    written = [] if output is None else save_diagnosis(
        output, found, {**about, "pairs": prepared.behaviour.n, "prompts": prepared.behaviour.n_prompts, "notes": prepared.notes}
    )  # fmt: skip
    if json:
        rows = {name: table.to_dict("records") for name, (_, table) in tables.items()}
        print_json(about | {"recommended": found.recommended, "summary": found.summary, "floor": found.floor} | rows)
        return
    from relp_cli.report.tables import show as print_table
    from relp_cli.tasks.counted import pairs_text

    where = (
        f"{prepared.task.name}, {prepared.model.name}, {how.direction}, {prepared.metric}, "
        f"{pairs_text(prepared.behaviour.n, prepared.behaviour.n_prompts)}"
    )
    out.print(f"{method} on {where}")
    for name, (title, table) in tables.items():
        if len(table):
            shown = _shown(name, table, method)
            print_table(shown, out, title, keys=max(1, sum(column in PLACE for column in shown)))
    for line in found.summary:
        out.print(f"• {line}")
    for path in written:
        log.print(str(path))


def _tables(found: Any, show: int) -> dict[str, tuple[str, Any]]:
    """Name → title and the rows to print."""
    suspects = found.suspects[found.suspects.exact.notna()].head(show)
    place = ["kind", "layer", "position", "unit", "reason"]
    estimates = [m for m in found.methods.method if m in suspects]
    attention = found.attention[found.attention[["moved", "moved_by_query"]].max(axis=1) > 0.1].nlargest(
        show, "max_run"
    )
    cancelling = found.cancelling.nlargest(show, "offset")
    cancelling = cancelling[cancelling.offset > 0.1 * found.floor]
    columns = ["kind", "layer", "position", "direct", "indirect", "total", "offset", "share", "main", "opponent"]
    return {
        "suspects": (
            f"do not trust {found.cheap} here: the strongest of {len(found.suspects)} suspects, patched exactly; why: shares of "
            "the error",
            suspects[[*place, *estimates, "exact", "why"]],
        ),
        "causes": (
            f"causes of {found.cheap}'s errors on all patched nodes: shares of Σ|error|; nodes: where it is the largest part",
            found.causes,
        ),
        "attention": ("attention: the most saturated patterns that the patch moves (moved: share of attention)", attention),
        "cancelling": ("cancellation: components whose parts offset each other (offset: how much cancels)", cancelling[columns]),
        "gradient": ("gradient norm along the path run → source, relative to its mean: over layers", found.gradient),
        "methods": ("methods on the patched nodes: Σ|estimate − exact| / Σ|exact| [95 % bootstrap over nodes]", found.methods),
    }  # fmt: skip


def _shown(name: str, table: pd.DataFrame, cheap: str) -> pd.DataFrame:
    """The columns of a table that fit a terminal; all are in the files and in --json."""
    import pandas as pd

    from relp_cli.evaluation.diagnose import OTHER

    if name == "suspects":
        unit = [f".{n}" if n >= 0 else "" for n in table.unit]
        node = [f"{r.kind} {r.layer}{u} {r.position}" for r, u in zip(table.itertuples(), unit, strict=True)]
        why = [f"{r.reason}: {r.why}" if r.reason != OTHER else r.why or "—" for r in table.itertuples()]
        return pd.DataFrame({"node": node, cheap: table[cheap].tolist(), "exact": table.exact.tolist(), "why": why})
    if name == "causes":
        nodes = [f"{n}/{of}" for n, of in zip(table.nodes, table.of_nodes, strict=True)]
        return pd.DataFrame({"cause": table.cause, "share": table.share, "nodes": nodes})
    if name == "attention":
        return table.drop(columns=["entropy_run", "entropy_source"])
    if name == "cancelling":
        between = [f"{r.main} / {r.opponent}" for r in table.itertuples()]
        return table[["kind", "layer", "position", "total", "offset", "share"]].assign(between=between)
    if name == "gradient":
        layers = table[[c for c in table if str(c).startswith("layer ")]]
        ends = {"least": layers.min(axis=1), "mean": layers.mean(axis=1), "most": layers.max(axis=1)}
        return table[["alpha", "metric"]].assign(**ends)
    error = [f"{r.error:.3f} [{r.lo:.2f}, {r.hi:.2f}]" for r in table.itertuples()]
    return pd.DataFrame(
        {"method": table.method, "error": error, "suspects": table.error_suspects, "controls": table.error_controls,
         "sign": table["sign"], "passes": [f"{p:g}" for p in table.passes]}
    )  # fmt: skip
