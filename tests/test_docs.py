"""The documentation is true where a machine can tell: commands parse, names are explained, notebooks and examples run."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer

from relp_cli.cli.app import app
from relp_cli.evaluation.ablation_table import ABLATIONS
from relp_cli.lrp.rules import RULE_SETS, RULES
from relp_cli.methods.table import METHODS
from relp_cli.models.families import FAMILIES
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.registry import Registry
from relp_cli.spaces.table import SPACES
from relp_cli.tasks.files import FORMS
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.spec import list_tasks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
BLOCK = re.compile(r"^```\w*\n(.*?)^```|((?:^    .*\n)+)", re.S | re.M)
ENDS = {";", "&", "&&", "|", "||", ">", "done"}


def words(line: str) -> list[str]:
    """A shell line's words, operators apart, up to a comment."""
    lexer = shlex.shlex(line.replace("'", '"'), posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    return list(lexer)


def shown_commands(text: str) -> Iterator[list[str]]:
    """Whole commands: lines of blocks that begin with `relp` or `$ relp`, or have it behind a shell's word."""
    for fenced, indented in BLOCK.findall(text):
        lines = (fenced or indented).replace("\\\n", " ").splitlines()
        session = any(line.startswith("$ ") for line in lines)
        for line in lines:
            line = line.strip()
            if (session and not line.startswith("$ ")) or "relp " not in line:
                continue
            found = words(line.removeprefix("$ "))
            starts = [i for i, word in enumerate(found) if word == "relp"]
            if starts and all("=" in w or w in {"do", ";"} or (i < starts[0] and found[0] == "for")
                              for i, w in enumerate(found[: starts[0]])):  # fmt: skip
                end = next((i for i, w in enumerate(found) if i > starts[0] and w in ENDS), len(found))
                yield found[starts[0] + 1 : end]


def named_commands(text: str) -> Iterator[list[str]]:
    """Commands named in a sentence, which may leave out what a verb needs."""
    prose = BLOCK.sub("", text)
    for span in re.findall(r"`relp ([a-z][^`]*)`", prose.replace("\n", " ")):
        yield re.sub(r"[\\|].*", "", span).split()


def options_of(verb: list[str]) -> set[str]:
    """The options that a verb knows, or a benchmark of `relp evaluate`."""
    if verb[0] == "evaluate" and len(verb) > 1 and verb[1] in ("mib", "known_circuits"):
        context = COMMANDS["evaluate"].make_context("evaluate", [verb[1], *(["."] if verb[1] == "mib" else [])])
        return {o for p in context.command.params for o in (*p.opts, *p.secondary_opts)}
    command = COMMANDS[verb[0]]
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h", "--version"}


COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
KINDS = {"nodes", *NODE_KINDS, *(kind for _, row in SPACES.items() for kind in row.kinds)}
NAMES = {"--method": METHODS, "--methods": METHODS, "--nodes": KINDS, "--ablation": ABLATIONS}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_parse(page: Path) -> None:
    text = page.read_text()
    shown = list(shown_commands(text))
    for args in shown:
        assert args[0] in COMMANDS, f"relp {' '.join(args)}"
        COMMANDS[args[0]].make_context(args[0], args[1:])  # raises what the command line would say
        if args[0] in ("score", "compare", "diagnose") and re.fullmatch(r"[a-z0-9_]+", args[1]):
            assert args[1] in list_tasks(), f"relp {' '.join(args)}"
        for option, names in NAMES.items():
            given = args[args.index(option) + 1] if option in args[:-1] else ""
            for name in given.split(",") if re.fullmatch(r"[a-z_+,0-9]+", given) else []:
                base, _, rule = name.partition("+")
                assert base in names, f"relp {' '.join(args)}: {base}"
                assert not rule or rule == "auto" or rule in RULES or rule in RULE_SETS, rule
    for args in [*shown, *named_commands(text)]:
        assert args[0] in COMMANDS, f"relp {' '.join(args)}"
        for word in args:
            option = word.partition("=")[0].rstrip(",.")
            if re.fullmatch(r"--?[a-z][a-z-]*", option):
                assert option in options_of(args), f"relp {' '.join(args)}: {option}"


def test_every_option_named_alone_exists() -> None:
    known = {o for verb in COMMANDS for o in options_of([verb])}
    known |= options_of(["evaluate", "mib"]) | options_of(["evaluate", "known_circuits"])
    for page in PAGES:
        for span in re.findall(r"`(--[a-z][a-z-]*)", BLOCK.sub("", page.read_text())):
            assert span in known, f"{page.name}: {span}"


def test_every_name_is_explained() -> None:
    """Methods, rules and the rest stand in code type on some page; so do the verbs in the README or a page."""
    text = "\n".join(page.read_text() for page in PAGES)
    coded = set(re.findall(r"[\w+=.-]+", " ".join(re.findall(r"`([^`\n]+)`", text))))
    tables: list[Registry[Any]] = [METHODS, RULES, RULE_SETS, NODE_KINDS, METRICS, ABLATIONS]
    for table in tables:
        assert not set(table) - coded, f"{table.what}s that docs/ does not name: {sorted(set(table) - coded)}"
    assert not set(list_tasks()) - coded
    assert not set(COMMANDS) - coded
    methods = (ROOT / "docs/methods.md").read_text()
    assert not {name for name in METHODS if f"`{name}`" not in methods}


def test_links_of_the_readme_and_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            made = page.parent / target
            generated = target in ("commands.md", "api.md") or target.endswith(".ipynb.md")
            assert made.exists() or generated or target.startswith("http"), f"{page.name}: {target}"


def outputs(cell: dict[str, Any]) -> str:
    """What a stored cell printed or showed, as text."""
    return "".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in cell["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run_and_say_what_is_stored(path: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Cells in order, in one namespace. What they print and show is what is stored, numbers apart."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    pd.set_option("display.max_columns", 20)  # as in a notebook; here the default is that of no terminal
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            body = ast.parse("".join(cell["source"])).body
            last = body.pop() if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), path.name, "exec"), names)
            value = None if last is None else eval(compile(ast.Expression(last.value), path.name, "eval"), names)
            said = capsys.readouterr().out + ("" if value is None else repr(value))
            assert without_numbers(said) == without_numbers(outputs(cell))
    pd.reset_option("display.max_columns")


def without_numbers(text: str) -> str:
    return re.sub(r"-?\d+(\.\d+)?", "#", " ".join(text.split()))


def test_the_task_of_the_page_is_one(tmp_path: Path, relp: Any) -> None:
    page = (ROOT / "docs/tasks.md").read_text()
    (tmp_path / "task.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.S)[0])
    (tmp_path / "pairs.jsonl").write_text(re.findall(r"```json\n(.*?)```", page, re.S)[0])
    for name in ("task.yaml", "pairs.jsonl"):
        done = relp("validate", name)
        assert done.code == 0, done.err


def test_rows_are_added_as_the_page_says(tmp_path: Path, monkeypatch: Any) -> None:
    rows, use = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
    for table in (METHODS, NODE_KINDS, RULES, FAMILIES, METRICS, FORMS, ABLATIONS):
        monkeypatch.setattr(table, "_rows", dict(table._rows))
    (tmp_path / "my_relp.py").write_text(rows)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {}
    exec(use, names)
    model, pairs = names["model"], names["pairs"]
    twice = names["relp"].score(model, pairs, "part_way", ["resid_pre"], at=0.25)["resid_pre"].mean * 2
    assert names["nodes"]["stream"].mean.allclose(twice, rtol=1e-5)
    assert names["table"].ablation.item() == "mean_original"
