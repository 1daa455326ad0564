"""What reaches the terminal: user text is text, one line per error, and streams that are closed, narrow or interrupted."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from rich.table import Table

from relp_cli.cli.common import Terminal, note, print_json
from relp_cli.errors import visible
from relp_cli.report.tables import show

HOSTILE = "[/x] [bold]b[/] :smile: \x1b[31m \n \u2028 \u202e"
SHOWN = r"[/x] [bold]b[/] :smile: \x1b[31m \n \u2028 \u202e"


def test_every_string_is_printed_as_it_is_with_control_characters_escaped(capsys):
    console = Terminal(width=200)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    console.print(HOSTILE)
    console.print(table)
    frame = pd.DataFrame({HOSTILE: [HOSTILE, "b"], "x": [1.0, 2.0], "y": [2.0, 1.0]})
    frame.attrs |= {"notes": [HOSTILE], "best": [["x", "y"]]}
    show(frame, console, HOSTILE)
    note(HOSTILE)
    note(f"WARNING: {HOSTILE}")
    done = capsys.readouterr()
    assert done.out.count(SHOWN) == 8
    assert done.err == f"{SHOWN}\nWARNING: {SHOWN}\n"
    assert set("".join(visible(c) for c in done.out.replace("\n", ""))) == set(done.out) - {"\n"}


def test_names_of_users_are_text_in_the_verbs(relp, tmp_path):
    record = {"original": "a b", "patch": "a c", "answer": "d", "foil": "e"}
    (tmp_path / "[").mkdir()
    (tmp_path / "[/x].jsonl").write_text(json.dumps(record) + "\n")
    done = relp("validate", "[/x].jsonl")
    assert (done.code, done.err) == (0, "")
    assert "pairs: x].jsonl\n" in done.out
    assert relp("validate", "\x1b[31m[/x]").err == "error: \\x1b[31m[/x]: no such file\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("score", "ioi", "--pais", 3), "relp score: unknown option '--pais'; did you mean '--pairs'?"),
        (("--hepl",), "unknown option '--hepl'; did you mean '--help'?"),
        (("scoer", "ioi"), "No such command 'scoer'. Did you mean 'score'?"),
        (("score",), "Missing argument 'task'"),
        (("score", "ioi", "--pairs"), "Option '--pairs' requires an argument"),
        (("score", "ioi", "--pairs", "five"), "'--pairs'"),
        (("score", "ioi", "--pairs", "five"), "(got 'five')"),
        (("score", "ioi", "--seed", "1" * 5000), "exceeded maximum size (got '111"),
        (("circuit", "run", "--top-k", "-5"), "(got '-5')"),
        (("ls", "tasks", "more"), "unexpected extra argument(s) (more)"),
    ],
)
def test_a_usage_error_is_one_line(relp, arguments, expected):
    done = relp(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert expected in done.err
    assert len(done.err) < 700


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (RecursionError("maximum recursion depth exceeded"), 2, "relp ls tasks: something in it is nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "not UTF-8 (invalid start byte)"),
        (PermissionError(13, "Permission denied", "a.yaml"), 2, "a.yaml: Permission denied"),
        (OSError(36, "File name too long", "x"), 2, "x: File name too long"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "out of memory: a smaller --batch-size"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            1,
            "out of memory: a smaller --batch-size",
        ),
    ],
)
def test_errors_of_the_system_say_where_and_are_no_internal_message(relp, monkeypatch, error, code, expected):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("relp_cli.cli.ls.print_json", fails)
    done = relp("ls", "tasks", "--json")
    assert done.code == code
    assert expected in done.err.replace(" --json", "")
    assert done.err.count("\n") == 1
    assert "RELP_DEBUG" not in done.err


def _shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    relp = f"'{sys.executable}' -m relp_cli.cli.main"
    command = command.replace("relp", relp)
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=os.environ | environment, timeout=60
    )


@pytest.mark.parametrize(
    ("command", "code", "err"),
    [
        ("relp ls methods --json | head -c 1 > /dev/null; exit ${PIPESTATUS[1]}", 0, ""),
        ("relp ls methods | true; exit ${PIPESTATUS[1]}", 0, ""),
        ("relp ls tasks >&-", 0, ""),
        ("relp ls taks <&- >&- 2>&-", 2, ""),
    ],
)
def test_closed_streams_end_without_a_traceback(command, code, err):
    done = _shell(command)
    assert (done.returncode, done.stderr) == (code, err)


def test_ascii_output_and_a_notebooks_backend():
    done = _shell("relp ls methods", PYTHONIOENCODING="ascii", MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert (done.returncode, done.stderr) == (0, "")
    assert "act_patch" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_json_is_strict_in_every_encoding(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    print_json({"é": float("nan"), "U": [float("inf"), 1.5, HOSTILE, "\U0001f600"]})
    stream.seek(0)
    found = json.loads(stream.read(), parse_constant=pytest.fail)
    assert found == {"é": None, "U": [None, 1.5, HOSTILE, "\U0001f600"]}


@pytest.mark.parametrize("delay", [0.02, 0.3, 1.0])
def test_an_interrupt_while_starting_is_one_line(delay):
    """The process says that our code runs; from then on an interrupt at any time, imports included, is one line."""
    code = (
        "import sys; import relp_cli.cli.main as m; print('.', flush=True); sys.argv = ['relp', 'show', 'ioi']; m.run()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.read(1) == "."
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "error: interrupted; the same command again resumes what was finished\n"


def test_on_a_terminal_it_says_at_once_what_loads_and_takes_it_back():
    import pty

    code = "import sys; from relp_cli.cli.main import run; sys.argv = ['relp', 'score', 'ioi', '--pais']; run()"
    said = {}
    for term in ("xterm", "dumb"):
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": term, "COLUMNS": "40"}
        subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=theirs, env=environment, check=False
        )
        os.close(theirs)
        said[term] = os.read(ours, 4096).decode()
        os.close(ours)
    clear = "\r\x1b[K"
    assert said["xterm"] == f"{clear}relp score: loading torch …{clear}{said['dumb']}"
    assert said["dumb"].startswith("error: relp score: unknown option")
    lines = said["dumb"].splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 40
    assert all(line.startswith("  ") for line in lines[1:])
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert piped.stderr.startswith("error: ")


def test_help_at_80_columns_crops_nothing(relp, monkeypatch):
    import inspect

    from typer.main import get_command

    from relp_cli.cli.app import app

    monkeypatch.setenv("COLUMNS", "80")
    for name, command in get_command(app).commands.items():
        written = inspect.cleandoc(command.help) + "".join(getattr(p, "help", None) or "" for p in command.params)
        out = relp(name, "--help").out
        assert out.count("…") == written.count("…"), name
        assert max(map(len, out.splitlines())) <= 80
