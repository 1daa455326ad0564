"""relp validate TASK.yaml|JOB.yaml, relp show TASK, relp show RUN"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from relp_cli.cli.common import (
    BosOption,
    IdsOfOption,
    JsonFlag,
    RevisionOption,
    UnusableOption,
    at_revision,
    count_option,
    default_model,
    note,
    out,
    print_fields,
    print_json,
    refuse_typed,
    seed_option,
    typed,
)
from relp_cli.cli.waiting import waiting
from relp_cli.errors import RelpError

MOST_WORDS = 20  # that are named in one line
OF_RUNS = ("task", "top", "json")  # what `show` takes for a run


def validate(
    task: Annotated[
        str, typer.Argument(help="A task YAML, a file of pairs, a job YAML, or a shipped task's or job's name.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also draw pairs for this model (only its tokenizer is loaded).")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Check a task (templates, word lists, pairing rule), a file of pairs or a batch job. Only --model and jobs load torch, and
    nothing loads a model.

    Example: relp validate my_task.yaml

    Example: relp validate my_task.yaml --model gpt2
    """
    from relp_cli.runs.folders import check_valid
    from relp_cli.tasks.source import read_source

    if _is_job(task):
        if model is not None:
            raise RelpError(f"--model is for tasks; '{task}' is a job, which names its models itself")
        about = _checked_job(task)
        print_json(about) if json else print_fields({**about, "valid": "yes"})
        return
    check_valid(task)
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
    fits: dict[str, Any] = {}
    if model is not None:
        from dataclasses import asdict

        from relp_cli.models.load import load_tokenizer
        from relp_cli.tasks.fits import Bare, fit
        from relp_cli.tasks.task import task_of

        task_of(source).foreign()
        fits = asdict(fit(task_of(source), Bare(model, load_tokenizer(model))))
    if json:
        print_json(about | ({"model": model, **fits} if fits else {}))
    else:
        for key, value in about.items():
            if value not in (None, {}, [], ""):
                out.print(f"{key}: {_said(value)}")
        if fits:
            _show_fit(str(model), fits)
    if fits and not fits["pairs"].get("discovery"):
        raise RelpError(f"--model {model}: no pairs to score: {fits['why'][0]}")
    if not json:
        out.print("valid")


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {n}" for name, n in value.items())
    return "; ".join(value) if isinstance(value, list) else str(value)


def _show_fit(model: str, fits: dict[str, Any]) -> None:
    for name, words in fits["several"].items():
        pieces = ", ".join(f"{word} ({tokens})" for word, tokens in list(words.items())[:MOST_WORDS])
        pieces += f" and {len(words) - MOST_WORDS} more (--json has all)" if len(words) > MOST_WORDS else ""
        out.print(f"not single tokens of {model} where the task needs one, left out of '{name}': {pieces}")
    if fits["pairs"]:
        from relp_cli.tasks.counted import pairs_text

        drawn = (f"{split} {pairs_text(n, fits['prompts'][split])}" for split, n in fits["pairs"].items())
        out.print(f"drawn (at most 100 a split): {', '.join(drawn)}")
    if fits["lengths"]:
        lengths = ", ".join(f"{n} pairs of {length}" for length, n in fits["lengths"].items())
        out.print(f"tokens without BOS: {lengths}")
    if fits["pairs"].get("discovery"):
        for why in fits["why"]:
            note(f"WARNING: {why}")


def _is_job(name: str) -> bool:
    """Whether a name is a shipped job's, or that of a YAML with a grid of `tasks`."""
    from relp_cli.config.load import read_yaml
    from relp_cli.config.paths import list_configs

    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return "tasks" in read_yaml(Path(name)).values
    return name in list_configs("jobs") and name not in list_configs("tasks")


def _checked_job(name: str) -> dict[str, Any]:
    from relp_cli.jobs.check import check_job
    from relp_cli.jobs.grid import cells, load_job

    job = load_job(name, [])
    check_job(job)
    axes = {
        axis: ", ".join(map(str, getattr(job, axis))) for axis in ("tasks", "models", "methods", "kinds", "directions")
    }
    return {"job": job.name, "description": job.description, **axes, "pairs": job.pairs, "cells": len(cells(job))}


def show(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="A shipped task, a task YAML, a file of pairs, or a run directory.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Whose tokenizer and behaviour to show.")] = "tiny-gpt2",
    revision: RevisionOption = None,
    pairs: Annotated[
        int,
        count_option(1, help="Pairs to measure the model's behaviour on (by default as many as exist, at most)."),
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
    from relp_cli.runs.folders import check_task
    from relp_cli.runs.rundir import is_run

    if is_run(task):
        refuse_typed(context, OF_RUNS, f"is for tasks; '{task}' is a run, which says itself what was scored")
        _show_run(Path(task), 10 if top is None else top, json)
        return
    check_task(task, runs=True)
    if top is not None:
        raise RelpError(f"--top is for runs; '{task}' is none")
    from relp_cli.evaluation.behaviour import said
    from relp_cli.report.terminal import Column, print_table
    from relp_cli.runs.checked import score_spec
    from relp_cli.runs.scoring import Session, prepare

    spec = score_spec(
        task=task, model=at_revision(model, revision), pairs=pairs, seed=seed, split=split, bos=bos, unusable=unusable,
        ids_of=ids_of,
    )  # fmt: skip
    waiting(f"loading {at_revision(model, revision)} …")
    with default_model(context, model) as say_default:
        prepared = prepare(spec, Session(say=waiting, at_most=not typed(context, "pairs")))
    say_default()
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
        print_json({**about, **seen.as_dict(), "examples": rows})
        return
    for line in prepared.notes:
        note(line)
    for batch in prepared.pairs:
        for original, patch, answer, foil in list(_rows(batch))[:examples]:
            kept = [[i for i in ids if i >= 0] for ids in (answer, foil)]
            told = [_whole(tokenizer, ids) if batch.several else _some(_quoted(words(ids))) for ids in kept]
            example = f"answer {told[0]}, foil {told[1] or 'none'}"
            title = f"{len(batch)} pair{'s' * (len(batch) > 1)} of {batch.n_pos} tokens, such as: {example}"
            old, new = words(original), words(patch) if patch else [""] * len(original)
            changed = [bool(patch) and a != b for a, b in zip(old, new, strict=True)]
            places = [str(i) for i in range(batch.n_pos)]
            columns = [Column("pos", places, numeric=True), Column("role", batch.labels)]
            print_table(
                out,
                [*columns, Column("original", _quoted(old)), Column("patch", _quoted(new), best=changed)],
                title=title,
            )
    out.print(f"{prepared.model.name} on {prepared.task.name}: {said(seen.as_dict(), prepared.metric)}")


def _show_run(path: Path, top: int, json: bool) -> None:
    from relp_cli.cli.tables import named
    from relp_cli.evaluation.behaviour import said
    from relp_cli.outputs.showing import view_run
    from relp_cli.report.characters import KEY, print_map, print_positions
    from relp_cli.report.tables import show as show_table
    from relp_cli.tasks.counted import pairs_text

    seen = view_run(path)
    if json:
        print_json(seen.as_dict(top))
        return
    spec, meta, does = seen.record["spec"], seen.scores.meta, seen.record.get("behaviour", {})
    out.print(
        f"{path}: {spec['method']} on {spec['task']}, {meta['model']} ({meta['family']}), "
        f"{pairs_text(meta['n_pairs'], meta.get('n_prompts'))} ({spec['split']}), "
        f"{meta['direction']}, {meta['metric']}; made {seen.made}"
    )
    if does:
        out.print(f"the model itself: {said(does, meta['metric'])}")
    for line in seen.record.get("notes", []):
        out.print(line)
    show_table(named(seen.top(top)), out, f"the {top} strongest of each kind", digits=4)
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
    answer, foil = batch.answer.flatten(1).tolist(), batch.foil.flatten(1).tolist()
    return zip(batch.original.tolist(), patch, answer, foil, strict=True)


def _whole(tokenizer: Any, ids: list[int]) -> str:
    """A sequence of tokens as text."""
    shown = repr(tokenizer.decode(ids)) if tokenizer is not None else " ".join(map(str, ids))
    return f"{shown} ({len(ids)} token{'s' * (len(ids) > 1)})" if ids else ""


def _some(words: list[str]) -> str:
    return " ".join(words) if len(words) <= 4 else f"{words[0]} … {words[-1]} ({len(words)} tokens)"
