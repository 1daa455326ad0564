"""What a shell is given to complete, as it asks for it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from relp_cli.cli.app import VERBS
from relp_cli.cli.completion import COMPLETED
from relp_cli.methods.table import METHODS
from relp_cli.tasks.metrics import METRICS


@pytest.fixture
def offered(relp, monkeypatch):
    def ask(line):
        monkeypatch.setenv("_RELP_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", f"relp {line}")
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" "))))
        done = relp()
        assert (done.code, done.err) == (0, "")
        return done.out.split()

    return ask


def test_names_of_tables_and_folders(offered):
    Path("mine/one").mkdir(parents=True)
    Path("mine/one/run.json").touch()
    assert offered("score io") == ["ioi", "ioi_abba", "ioi_s2"]
    assert offered("score ioi --method ") == list(METHODS)
    assert offered("score ioi --metric ") == list(METRICS)
    assert offered("compare ioi --methods atp,rel") == [f"atp,{name}" for name in METHODS if name.startswith("rel")]
    assert offered("compare ioi --nodes head,hea") == []  # once in a list
    assert offered("score ioi -m tiny-g") == ["tiny-gemma2", "tiny-gemma3", "tiny-gpt2"]
    assert offered("circuit m") == ["mine/one"]
    assert offered("show mi") == ["mine/one"]
    Path("mine/compare.csv").touch()
    assert offered("report m") == ["mine", "mine/one"]
    assert offered("validate table5_") == ["table5_tiny"]
    assert offered("evaluate mib x --methods at") == ["atp", "atp_star"]
    assert offered("evaluate m") == ["mine/one", "mib"]
    assert offered("ls me") == ["methods"]
    assert offered("sch") == ["schema"]


def test_the_table_names_parameters_that_there_are():
    names = {verb: set(inspect.signature(command).parameters) for verb, command in VERBS.items()}
    for key in COMPLETED:
        verb, _, parameter = key.rpartition(" ")
        assert any(parameter in names[v] for v in ([verb] if verb else names)), key


def test_the_script_is_printed_and_no_torch_is_loaded(relp, tmp_path):
    assert "_RELP_COMPLETE=complete_bash" in relp("--show-completion", "bash").out
    code = (
        "import os, sys\nos.environ |= {'_RELP_COMPLETE': 'complete_bash', 'COMP_WORDS': 'relp score ioi --nodes h', "
        "'COMP_CWORD': '4'}\n"
        "from relp_cli.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["head"]), done.stderr[-500:]
