"""What every verb shares: consoles, progress, printing tables, parsing lists and `k=v`. Imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from relp_cli.errors import RelpError

# Tables go to stdout, everything else to stderr. A pipe has no width of its own: tables there are not squeezed.
out = Console(width=None if sys.stdout.isatty() else 160)
log = Console(stderr=True, soft_wrap=True)

COMPONENTS = "resid_pre,attn_out,mlp_out"
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of tables.")]
DryRunFlag = Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")]
BosOption = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Prepend the BOS token or not. Default: TransformerLens's, which prepends it for most models, GPT-2 among them "
        "(whose tokenizer adds none); every output says what was done.",
    ),
]
DtypeOption = Annotated[str, typer.Option(help="float32, float64, bfloat16, float16")]


def dictionary_path(name: str | None) -> str | None:
    """`--dictionary`: folders as absolute paths, so that a run can be evaluated from another folder than it was scored in."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def comma(text: str) -> tuple[str, ...]:
    """`a,b` → ("a", "b"). Raises RelpError for an empty list."""
    parts = tuple(p.strip() for p in text.split(",") if p.strip())
    if not parts:
        raise RelpError("expected a comma-separated list of names, got nothing")
    return parts


def assignments(items: list[str]) -> dict[str, Any]:
    """`--set k=v` → {k: v}; values are YAML (`steps=20`, `rules=[ln,half]`)."""
    out_: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise RelpError(f"--set expects name=value, got '{item}'")
        try:
            out_[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RelpError(f"--set {key}: '{value}' is not a YAML value") from error
    return out_


def note(text: str) -> None:
    """A line for people, on stderr; warnings stand out."""
    log.print(f"[bold yellow]{text}[/]" if text.startswith("WARNING") else f"[dim]{text}[/]", highlight=False)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout; tensors and NumPy numbers become plain ones."""
    sys.stdout.write(json.dumps(value, indent=1, default=_plain, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    return str(value)


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar with ETA on a terminal; None (silence) in a pipe."""
    if not log.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=log, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update
