"""relp init task|job [FILE]"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import JsonFlag, log, print_json
from relp_cli.cli.schema import write
from relp_cli.errors import RelpError, unknown

SCHEMA = "relp-{}.schema.json"  # ours: written again whenever a file is
NEXT = {"task": "relp validate {} --model tiny-gpt2", "job": "relp evaluate {} --dry-run"}


def command(
    what: Annotated[str, typer.Argument(help="task or job")],
    file: Annotated[Path | None, typer.Argument(help="What to write (default: task.yaml or job.yaml).")] = None,
    json: JsonFlag = False,
) -> None:
    """Write a commented YAML to start from, which is valid as it stands, and beside it the schema that an editor checks it by.

    Example: relp init task my_task.yaml
    """
    from relp_cli.config.paths import data_root
    from relp_cli.files import check_file_writable, read_text, write_atomically

    if what not in NEXT:
        raise unknown("sort of file", what, NEXT)
    file = Path(f"{what}.yaml") if file is None else file
    if file.suffix not in (".yaml", ".yml"):
        raise RelpError(f"file '{file}': expected a name that ends in .yaml")
    check_file_writable(file)
    if file.exists():
        raise RelpError(f"{file} exists already; choose another name or delete it")
    text = read_text(data_root("configs") / "init" / f"{what}.yaml", "template")
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", file.stem)[:60].lstrip("-") or f"my_{what}"
    text = text.replace("FILE", file.name).replace(f"name: my_{what}", f'name: "{name}"', 1)
    schema = file.parent / SCHEMA.format(what)
    write(what, schema)
    write_atomically(file, f"# yaml-language-server: $schema={schema.name}\n{text}")
    if json:
        print_json({"file": str(file), "schema": str(schema)})
        return
    log.print(f"{file}: edit it, then {NEXT[what].format(file)}")
    log.print(f"{schema}: what an editor with a YAML language server completes and checks by")
