"""relp validate TASK.yaml, relp show TASK, relp show RUN"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import (
    BosOption,
    IdsOfOption,
    JsonFlag,
    RevisionOption,
    UnusableOption,
    at_revision,
    count_option,
    note,
    out,
    print_json,
    refuse_typed,
    seed_option,
)
from relp_cli.errors import RelpError

OF_RUNS = ("task", "top", "json")  # what `show` takes for a run


def validate(
    task: Annotated[str, typer.Argument(help="A task YAML, a file of pairs, or a shipped task's name.")],
    json: JsonFlag = False,
) -> None:
    """Check a task (templates, word lists, pairing rule) or a file of pairs, without loading any model.

    Example: relp validate my_task.yaml
    """
    from relp_cli.tasks.source import read_source

    source = read_source(task)
    text, spec = source.text, source.text.spec
    about = {
        "task": spec.name,
        "description": spec.description,
        "metric": spec.metric,
        "templates": len(spec.templates) if spec.templates else 0,
        "lists": {name: len(words.rows) for name, words in text.lists.items()},
        "pairs": spec.pairs,
        "splits": dict(Counter(str(raw.split) for raw in source.fixed)),
        "notes": list(source.notes),
        "hash": text.hash,
    }
    if json:
        print_json(about)
        return
    for key, value in about.items():
        if value not in (None, {}, [], ""):
            out.print(f"{key}: {value}")
    out.print("valid")


def show(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="A shipped task, a task YAML, a file of pairs, or a run directory.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Whose tokenizer and behaviour to show.")] = "tiny-gpt2",
    revision: RevisionOption = None,
    pairs: Annotated[
        int, count_option(1, help="Pairs to measure the model's behaviour on (as many as exist, at most).")
    ] = 100,
    examples: Annotated[int, count_option(0, help="Pairs to print per token length.")] = 1,
    seed: Annotated[int, seed_option(help="Draws the pairs.")] = 0,
    split: Annotated[str, typer.Option(help="discovery, heldout or all.")] = "discovery",
    bos: BosOption = None,
    unusable: UnusableOption = None,
    ids_of: IdsOfOption = None,
    top: Annotated[int | None, count_option(1, help="Of a run: nodes to print per kind (default: 10).")] = None,
    json: JsonFlag = False,
) -> None:
    """Print aligned tokenised pairs with position roles, and the model's own accuracy on them. Of a run: what was scored, the
    strongest nodes, a map of layers and positions, its circuit and evaluation.

    Example: relp show ioi --model tiny-gpt2

    Example: relp show runs/ioi
    """
    from relp_cli.runs.rundir import is_run

    if is_run(task):
        refuse_typed(context, OF_RUNS, f"is for tasks; '{task}' is a run, which says itself what was scored")
        _show_run(Path(task), 10 if top is None else top, json)
        return
    if top is not None:
        raise RelpError(f"--top is for runs; '{task}' is none")
    from relp_cli.report.terminal import Column, print_table
    from relp_cli.runs.checked import score_spec
    from relp_cli.runs.scoring import Session, prepare

    spec = score_spec(
        task=task, model=at_revision(model, revision), pairs=pairs, seed=seed, split=split, bos=bos, unusable=unusable,
        ids_of=ids_of,
    )  # fmt: skip
    prepared = prepare(spec, Session(), at_most=True)
    tokenizer = prepared.model.tokenizer

    def words(ids: list[int]) -> list[str]:
        return [repr(tokenizer.decode([i]))[1:-1] if tokenizer is not None else str(i) for i in ids if i >= 0]

    seen = prepared.behaviour
    if json:
        rows = [
            {"roles": b.labels, "original": words(o), "patch": words(p), "answer": words(a), "foil": words(f)}
            for b in prepared.pairs
            for o, p, a, f in list(_rows(b))[:examples]
        ]
        about = {"task": prepared.task.name, "model": prepared.model.name, "bos": prepared.bos, "notes": prepared.notes}
        print_json({**about, **seen.as_dict(), "pairs": rows})
        return
    for line in prepared.notes:
        note(line)
    for batch in prepared.pairs:
        for original, patch, answer, foil in list(_rows(batch))[:examples]:
            example = f"answer {_some(words(answer))}, foil {_some(words(foil))}"
            title = f"{len(batch)} pairs of {batch.n_pos} tokens, such as: {example}"
            old, new = words(original), words(patch) if patch else [""] * len(original)
            changed = [bool(patch) and a != b for a, b in zip(old, new, strict=True)]
            places = [str(i) for i in range(batch.n_pos)]
            columns = [Column("pos", places, numeric=True), Column("role", batch.labels)]
            print_table(
                out,
                [*columns, Column("original", _quoted(old)), Column("patch", _quoted(new), best=changed)],
                title=title,
            )
    patch_value = "" if seen.metric_patch is None else f", on patches {seen.metric_patch:+.3f}"
    out.print(
        f"{prepared.model.name} on {prepared.task.name}: accuracy {seen.accuracy:.3f} over {seen.n} pairs; mean "
        f"{prepared.metric} on originals {seen.metric_original:+.3f}{patch_value}",
    )


def _show_run(path: Path, top: int, json: bool) -> None:
    from relp_cli.report.characters import KEY, print_map, print_positions
    from relp_cli.report.tables import show as show_table
    from relp_cli.runs.showing import view_run

    seen = view_run(path)
    if json:
        print_json(seen.as_dict(top))
        return
    spec, meta, does = seen.record["spec"], seen.scores.meta, seen.record.get("behaviour", {})
    out.print(
        f"{path}: {spec['method']} on {spec['task']}, {meta['model']} ({meta['family']}), {meta['n_pairs']} pairs "
        f"({spec['split']}), {meta['direction']}, {meta['metric']}; made {seen.made}"
    )
    if does:
        out.print(f"the model itself: accuracy {does['accuracy']:.2f}, {meta['metric']} {does['metric_original']:+.3f}")
    for line in seen.record.get("notes", []):
        out.print(line)
    show_table(seen.top(top), out, f"the {top} strongest of each kind", digits=4)
    for of_kind in seen.maps:
        print_map(out, of_kind, seen.scores.labels)
    out.print(KEY)
    print_positions(out, seen.scores.labels)
    for line in seen.state:
        out.print(line)


def _quoted(tokens: list[str]) -> list[str]:
    """Tokens as they are read in a table: a space that begins one is seen."""
    return [f"'{token}'" if token else "" for token in tokens]


def _rows(batch):  # type: ignore[no-untyped-def]
    patch = batch.patch.tolist() if batch.patch is not None else [None] * len(batch)
    return zip(batch.original.tolist(), patch, batch.answer.tolist(), batch.foil.tolist(), strict=True)


def _some(words: list[str]) -> str:
    return " ".join(words) if len(words) <= 4 else f"{words[0]} … {words[-1]} ({len(words)} tokens)"
