"""relp schema task|job|pairs [FILE]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import JsonFlag, log, print_json
from relp_cli.errors import RelpError


def command(
    what: Annotated[str, typer.Argument(help="task, job or pairs (a record of a .jsonl file, or a whole .json file)")],
    file: Annotated[Path | None, typer.Argument(help="What to write it to (default: stdout).")] = None,
    json: JsonFlag = False,
) -> None:
    """Print the JSON Schema of a task, a job or a file of pairs, for an editor that completes and checks what one types.

    Example: relp schema task task.schema.json
    """
    from relp_cli.outputs.schemas import schema

    made = schema(what)
    if file is None:
        print_json(made)
        return
    if file.suffix != ".json":
        raise RelpError(f"file '{file}': expected a name that ends in .json")
    if file.exists():
        raise RelpError(f"{file} exists already; choose another name or delete it")
    write(what, file)
    if json:
        print_json({"file": str(file)})
        return
    log.print(f"{file}: name it in a YAML's first line: # yaml-language-server: $schema={file.name}")


def write(what: str, file: Path) -> None:
    """The schema as a file. Raises RelpError where it cannot be written."""
    import json

    from relp_cli.files import check_file_writable, write_atomically
    from relp_cli.outputs.schemas import schema

    check_file_writable(file)
    write_atomically(file, json.dumps(schema(what), indent=1, ensure_ascii=False) + "\n")
