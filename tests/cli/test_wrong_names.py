"""A name that stands for nothing, or for another thing than the verb takes: one line that says what is there, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TASK = "name: t\nslots: {W: %s}\ntemplates: ['A {W}']\npatch: {W: other}\nanswer: '{W}'\n"
NO_WORDS = "no shipped word list 'opposites'; a file beside the task is named with its ending: write 'opposites.csv'"
OF_JOB = "(`relp collect runs/job` or `relp report runs/job` takes it)"
OF_RUN = "(`relp show runs/alpha` or `relp report runs/alpha` takes it)"

CASES = [
    ("show own.yaml", NO_WORDS),
    ("validate own.yaml", NO_WORDS),
    ("score own.yaml", NO_WORDS),
    ("diagnose own.yaml", NO_WORDS),
    ("compare own.yaml", NO_WORDS),
    ("validate shadow.yaml", "'names' is a shipped word list, and names.txt is beside the task: write 'names.txt'"),
    ("show ioy", "'ioy' is neither a task, a file of pairs nor a run's folder; did you mean 'ioi'?"),
    ("show runs/alhpa", "nor a run's folder; did you mean 'runs/alpha'?"),
    ("show runs/job", f"a job's folder; expected a task, a task YAML or a file of pairs {OF_JOB}"),
    ("score runs/alpha", f"is a run's folder; expected a task, a task YAML or a file of pairs {OF_RUN}"),
    ("score runs/ioi", "'runs/ioi' is neither a task nor a file or folder of pairs"),
    ("evaluate runs/alhpa", "'runs/alhpa' is neither a run's folder nor a job; did you mean 'runs/alpha'?"),
    ("evaluate table5_tinny", "neither a run's folder nor a job; did you mean 'table5_tiny'?"),
    ("evaluate alpha", "neither a run's folder nor a job; did you mean 'runs/alpha'?"),
    ("evaluate runs/job", f"it has no run.json); it is a job's folder {OF_JOB}"),
    ("evaluate runs/compared", "it is a comparison's folder (`relp report runs/compared` takes it)"),
    ("evaluate plain", "'plain' is not a run directory (it has no run.json)"),
    ("circuit runs/job --top-k 3", "it is a job's folder"),
    ("test runs/alhpa", "run 'runs/alhpa' does not exist; did you mean 'runs/alpha'? `relp ls runs` lists runs"),
    ("robustness runs/alhpa", "did you mean 'runs/alpha'?"),
    ("export runs/alhpa x.csv", "did you mean 'runs/alpha'?"),
    ("report runs/jop", "nor a comparison, job or diagnosis of that name; did you mean 'runs/job'?"),
    ("collect runs/jop", "'runs/jop' is neither a job's folder nor a job; did you mean 'runs/job'?"),
    ("collect table5_tinny", "neither a job's folder nor a job; did you mean 'table5_tiny'?"),
    ("compare runs/alpha runs/betta", "'runs/alpha' is a run and 'runs/betta' is none; did you mean 'runs/beta'?"),
    ("compare ioi runs/alpha", "'runs/alpha' is a run and 'ioi' is none; expected runs, or tasks"),
    ("compare runs/alhpa", "neither a task, a file of pairs nor a run's folder; did you mean 'runs/alpha'?"),
    ("validate runs/job", f"a job's folder; expected a task, a file of pairs or a job {OF_JOB}"),
    ("validate table5_tinny", "unknown task or job 'table5_tinny'; did you mean 'table5_tiny'?"),
]  # fmt: skip

ALL_IN_ONE = """
import contextlib, io, json, shlex, sys
from relp_cli.cli import main
said = []
for line in json.loads(sys.argv[1]):
    sys.argv = ["relp", *shlex.split(line)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main.run()
        except SystemExit as stop:
            said.append([stop.code, out.getvalue(), err.getvalue(), "torch" in sys.modules])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Command line → exit code, stdout, stderr, whether torch was imported by then; all in one new process."""
    root = tmp_path_factory.mktemp("names")
    for file in (
        "runs/alpha/run.json",
        "runs/beta/run.json",
        "runs/job/job.json",
        "runs/job/results.csv",
        "runs/compared/compare.csv",
        "plain/x",
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("{}")
    for name, words in (("own", "opposites"), ("opposites", "x.csv"), ("shadow", "names")):
        (root / f"{name}.yaml").write_text(TASK % words)  # a task of the list's name is no list
    (root / "opposites.csv").write_text("a,b\nhot,cold\n")
    (root / "names.txt").write_text("Mary\nJohn\n")
    lines, before = [line for line, _ in CASES], sorted(root.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", ALL_IN_ONE, json.dumps(lines)], cwd=root, capture_output=True, text=True, check=True
    )
    assert sorted(root.rglob("*")) == before, "left something behind"
    return dict(zip(lines, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("line", "expected"), CASES, ids=[line for line, _ in CASES])
def test_what_is_there_is_said_in_one_line_before_torch_is_imported(said, line, expected):
    code, out, err, torch = said[line]
    assert (code, out, err.count("\n"), torch) == (2, "", 1, False), err
    assert err.startswith("error: ")
    assert expected in err


def test_a_list_beside_the_task_is_read_with_its_ending_and_a_shipped_one_by_its_name(tmp_path):
    from relp_cli.tasks.words import find_list

    (tmp_path / "names.yaml").write_text("name: a task\n")  # may be another task
    assert find_list("names", tmp_path).parent.name == "datasets"
    (tmp_path / "own.csv").write_text("a,b\n")
    assert find_list("own.csv", tmp_path) == Path(tmp_path / "own.csv")
