"""Pages of the site that have no file: commands and API from the code, notebooks from their cells. MkDocs calls `on_…`."""

from __future__ import annotations

import html
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FENCE = re.compile(r"(^```.*?^```$|^    .*?$)", re.S | re.M)
CITED = re.compile(r"`?\bdocs/([\w-]+\.md)`?")
LOADED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^\s>"']+""")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    made = {"commands.md": commands(), "api.md": api()}
    for path in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        made[f"notebooks/{path.name}.md"] = notebook(json.loads(path.read_text()))
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """`docs/NAME.md`, as code and help name a page, is a link to it; links to notebooks lead to their pages."""
    up = "../" * page.file.src_uri.count("/")

    def link(cited: re.Match[str]) -> str:
        return f"[{cited[1]}]({up}{cited[1]})" if files.get_file_from_path(cited[1]) else cited[0]

    parts = FENCE.split(markdown.replace(".ipynb)", ".ipynb.md)"))
    return "".join(part if i % 2 else CITED.sub(link, part) for i, part in enumerate(parts))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    if found := LOADED.search(output):
        raise ValueError(f"{page.file.src_uri} loads from elsewhere: {found[0]}")
    return output


def commands() -> str:
    """Every verb with its options."""
    lines = ["# Commands", "", "`relp VERB --help` says the same. Made from the code.", ""]
    for name, command in tree():
        told = quoted(inspect.cleandoc(command.help or ""))
        rows = [option(p) for p in command.params]
        lines += [
            f"## relp {name}",
            "",
            re.sub(r"^Example: (.*)$", lambda m: f"    {plain(m[1])}", told, flags=re.M),
            "",
        ]
        lines += ["| option | default | what |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def tree() -> Iterator[tuple[str, Any]]:
    """Verbs and benchmarks with their click commands."""
    import typer

    from relp_cli.cli.app import app
    from relp_cli.cli.benchmarks import BENCHMARKS

    group: Any = typer.main.get_command(app)
    yield from sorted(group.commands.items())
    for name, module in BENCHMARKS.items():
        own = typer.Typer(add_completion=False)
        own.command(name=name)(importlib.import_module(module).command)
        yield f"evaluate {name}", typer.main.get_command(own)


def option(parameter: Any) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    if not names[0].startswith("-"):
        names = [parameter.name.upper()]
    default = parameter.default
    shown = "" if default in (None, False, "", [], ()) or callable(default) else f"`{default}`"
    told = quoted(getattr(parameter, "help", None) or "").replace("\n", " ")
    return f"| {', '.join(f'`{n}`' for n in names)} | {shown} | {told} |"


def quoted(text: str) -> str:
    """Text as text: Markdown reads nothing into it but code."""
    return re.sub(r"([\\*_<>\[\]|#])", r"\\\1", text)


def plain(text: str) -> str:
    """`quoted` taken back."""
    return re.sub(r"\\([\\*_<>\[\]|#])", r"\1", text)


def api() -> str:
    """Every public name with its signature and docstring, and of classes those of their public methods."""
    import relp_cli

    lines = [
        "# Python API",
        "",
        "What `import relp_cli as relp` has. Made from the docstrings; `help(relp.score)` says the same.",
        "",
    ]
    for name in relp_cli.__all__:
        thing = getattr(relp_cli, name)
        lines += [f"## relp.{name}", "", *described(name, thing)]
        if inspect.isclass(thing):
            for member, value in inspect.getmembers_static(thing):
                inner = getattr(value, "__func__", getattr(value, "fget", value))
                own = inspect.isfunction(inner) and inner.__module__.startswith("relp_cli")
                if own and inner.__doc__ and not member.startswith("_"):
                    lines += [f"### {name}.{member}", "", *described(member, inner, isinstance(value, property))]
    return "\n".join(lines)


def described(name: str, thing: Any, attribute: bool = False) -> list[str]:
    call = name if attribute else f"{name}{signature(thing)}"
    told = html.escape(inspect.cleandoc(thing.__doc__ or ""))
    return ["```python", call, "```", "", f'<pre class="docstring">{told}</pre>', ""]


def signature(thing: Any) -> str:
    """One line, or one line per parameter where that is long."""
    try:
        found = inspect.signature(thing)
    except ValueError:
        return ""
    line = str(found).replace("'", "") if len(str(found)) <= 90 else ""
    if line:
        return line
    parts = [f"    {p}".replace("'", "") for p in found.parameters.values()]
    returns = "" if found.return_annotation is found.empty else f" -> {found.return_annotation}"
    return "(\n" + ",\n".join(parts) + f",\n){returns}"


def notebook(content: dict[str, Any]) -> str:
    """A notebook as Markdown, with what its cells wrote."""
    lines: list[str] = []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                lines += [
                    f'<img alt="what the cell drew" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">',
                    "",
                ]
            elif "text/html" in data:
                lines += ['<div class="out">', re.sub(r"\n\s*\n", "\n", "".join(data["text/html"])), "</div>", ""]
            else:
                lines += ["```text", "".join(data["text/plain"]).rstrip(), "```", ""]
    return "\n".join(lines)
