"""The import contract: who may import whom. Data flows one way."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import relp_cli

PACKAGE = Path(relp_cli.__file__).parent
MODULES = {
    ".".join(["relp_cli", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(name):
    """Modules of the package that one imports, anywhere in it; type-checking imports are of no consequence at run time."""
    tree = ast.parse(MODULES[name].read_text())
    only_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    skipped = {id(inner) for block in only_types for inner in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("relp_cli"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & set(MODULES)) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found - {"relp_cli"}


def package(name):
    return name.split(".")[1]


FLOORS = (  # a module imports its own package's modules and those of floors below, never of its own floor's others or above
    ("errors",),
    ("registry", "files", "config", "precision", "statistics", "clustering"),
    ("tasks",),
    ("models",),
    ("nodes", "lrp"),
    ("spaces",),
    ("methods", "known"),
    ("edges", "features"),
    ("scoring", "selection"),
    ("evaluation",),
    ("report",),
    ("runs",),
    ("costs",),
    ("studies",),
    ("jobs",),
    ("outputs",),
    ("cli",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


@pytest.mark.parametrize("name", [m for m in MODULES if m != "relp_cli"])
def test_imports_go_down(name):
    assert package(name) in FLOOR, f"a new package: give {package(name)} a floor"
    for other in imports(name):
        same = package(other) == package(name)
        assert same or FLOOR[package(other)] < FLOOR[package(name)], f"{name} imports {other}"


def test_there_is_no_circle():
    """Also not inside a package, nor through imports inside functions."""
    order = TopologicalSorter({name: imports(name) & set(MODULES) for name in MODULES}).static_order()
    assert set(order) == set(MODULES)


def test_the_reader_of_imports_sees_them():
    assert "relp_cli.errors" in imports("relp_cli.registry")
    assert "relp_cli.models.moe" in imports("relp_cli.lrp.sites")


QUICK = {
    "help": "--help", "help of a verb": "score --help", "tasks": "ls tasks", "methods": "ls methods", "nodes": "ls nodes",
    "models": "ls models", "runs": "ls runs", "cases": "ls cases", "a task": "validate ioi",
    "schemas": "schema job",
}  # fmt: skip


def test_what_needs_no_model_imports_no_torch(tmp_path):
    """One process, one command after the other: none of them brings torch or transformers in."""
    code = (
        "import sys\nfrom relp_cli.cli.main import run\n"
        f"for name, line in {QUICK!r}.items():\n"
        "    sys.argv = ['relp', *line.split()]\n"
        "    try:\n        run()\n"
        "    except SystemExit as stop:\n        assert not stop.code, (name, stop.code)\n"
        "    heavy = {'torch', 'transformers', 'transformer_lens'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
