"""What every verb shares: consoles, progress, printing tables, parsing lists and `k=v`. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from relp_cli import MOST_SEED
from relp_cli.cli.waiting import settle, silence
from relp_cli.config.load import parse
from relp_cli.errors import RelpError, unknown, visible
from relp_cli.models.placement import check_device_map


class Terminal(Console):
    """A console on which every string is text: no markup, no emoji codes, and what does not print is escaped."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def print(self, *what: Any, **how: Any) -> None:
        settle()
        super().print(*what, **how)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(visible(text), **how)


# Tables go to stdout, everything else to stderr. A pipe has no width of its own, unless COLUMNS gives it one: tables there are
# not squeezed.
out = Terminal(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit() else 160)
log = Terminal(stderr=True, soft_wrap=not sys.stderr.isatty())  # a terminal's lines end between words, a pipe's nowhere

COMPONENTS = "resid_pre,attn_out,mlp_out"
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of tables.")]
DryRunFlag = Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")]
ShardOption = Annotated[
    str | None,
    typer.Option(
        help="Compute one share of several: 3/8, or auto (a Slurm array's or a Kubernetes Job's own counting)."
    ),
]
MOST = 10**9
DEVICES = ("cpu", "cuda", "mps", "xpu")


def _device(name: str) -> str:
    """A device's name; whether this machine has it is torch's to say. Raises RelpError for what is none."""
    if not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d{{1,3}})?", name):
        raise unknown("device", name, DEVICES, where="--device: ")
    return name


DeviceOption = Annotated[
    str | None,
    typer.Option(parser=_device, metavar="TEXT", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)"),
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        parser=lambda name: check_device_map(name, "--device-map: "),
        metavar="TEXT",
        help="In place of --device, for large models: auto, balanced, offload (docs/big-models.md).",
    ),
]
BosOption = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Prepend the BOS token or not. Default: TransformerLens's, which prepends it for most models, GPT-2 among them "
        "(whose tokenizer adds none); every output says what was done.",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="The model's branch, tag or commit on the hub (also: --model NAME@REVISION).")
]
UnusableOption = Annotated[
    str | None,
    typer.Option(help="Pairs of a file that do not fit the model: error, or drop and count (default: error)."),
]
IdsOfOption = Annotated[
    str | None, typer.Option(help="The model (or tokenizer folder) whose token ids a file of pairs holds.")
]
DtypeOption = Annotated[str, typer.Option(help="float32, float64, bfloat16, float16")]
MemoryOption = Annotated[
    str | None, typer.Option(help="Choose batches that keep the peak below it, libraries and model included: 8GB.")
]


def output_option(help: str) -> Any:
    """`--output`, `-o`; an empty name, which would be the working folder, is refused."""

    def path(text: str | Path) -> Path:
        if not str(text).strip():
            raise RelpError("--output '': expected a name")
        return Path(text)

    return typer.Option("--output", "-o", parser=path, help=help)


def at_revision(model: str, revision: str | None) -> str:
    """The model's name with its revision, as specs and records hold it."""
    return model if revision is None else f"{model}@{revision}"


def count_option(least: int, *names: str, help: str) -> Any:
    """An option that counts something: from `least` up, and small enough to be a size of anything."""
    return typer.Option(*names, min=least, max=MOST, help=help)


def seed_option(help: str) -> Any:
    """`--seed`."""
    return typer.Option(min=0, max=MOST_SEED, help=help)


def comma(text: str, option: str) -> tuple[str, ...]:
    """`a,b` → ("a", "b"). Raises RelpError, naming the option, for an empty list."""
    parts = tuple(p.strip() for p in text.split(",") if p.strip())
    if not parts:
        raise RelpError(f"{option}: expected a comma-separated list of names, got '{text}'")
    return parts


def assignments(items: list[str]) -> dict[str, Any]:
    """`--set k=v` → {k: v}; values are YAML (`steps=20`, `rules=[ln,half]`)."""
    out_: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise RelpError(f"--set expects name=value, got '{item}'")
        if key.strip() in out_:
            raise RelpError(f"--set {key.strip()}: given twice")
        out_[key.strip()] = parse(value, Path(f"--set {item}")).values
    return out_


def refuse_typed(context: typer.Context, known: Iterable[str], why: str) -> None:
    """Raises RelpError for an option that was typed and is none of `known` (parameter names): it would do nothing."""
    for parameter in context.command.params:
        name = str(parameter.name)
        if typed(context, name) and name not in known:
            option = max(parameter.opts, key=len)
            raise RelpError(f"{option} {why}")


def typed(context: typer.Context, name: str) -> bool:
    """Whether an option (by its parameter's name) was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@contextmanager
def default_model(context: typer.Context, model: str) -> Iterator[Callable[[], None]]:
    """Errors that name the model say where nobody chose it; what is given says so in a line."""
    about = "" if typed(context, "model") else f"no --model was given: {model} is the default"
    try:
        yield lambda: note(about) if about else None
    except RelpError as error:
        if not about or type(error) is not RelpError or model not in str(error):
            raise
        raise RelpError(f"{error} ({about})") from None


def note(text: str) -> None:
    """A line for people, on stderr; warnings stand out."""
    log.print(text, style="bold yellow" if text.startswith("WARNING") else "dim")


def print_fields(fields: Mapping[str, Any]) -> None:
    """`key: value`, one a line, on stdout; a list of such fields is a block of lines each; of what is counted by name:
    `key: name 12, other 3`.
    """
    for key, value in fields.items():
        if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            for one in value:
                out.print(f"{key}:")
                for name, of_one in one.items():
                    out.print(f"  {name}: {_field(of_one)}")
        else:
            out.print(f"{key}: {_field(value)}")


def _field(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout; tensors and NumPy numbers become plain ones, and what is no finite number null."""
    settle()
    ascii_only = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    sys.stdout.write(json.dumps(_plain(value), indent=1, ensure_ascii=ascii_only, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar with ETA on a terminal; None (silence) in a pipe. What is loading is said until the first step."""
    if not log.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar, tasks = Progress(*columns, console=log, transient=True), dict[str, Any]()
    try:

        def update(done: int, total: int, what: str) -> None:
            if not tasks:
                settle()
                silence(True)
                bar.start()
            if what not in tasks:
                tasks[what] = bar.add_task(visible(what), total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update
    finally:
        if tasks:
            bar.stop()
            silence(False)
