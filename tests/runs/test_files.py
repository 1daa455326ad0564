"""Files: many processes at one new folder, what a killed process leaves, places that cannot be written, strict JSON."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relp_cli.errors import RelpError, RunFailed
from relp_cli.files import OLD, check_writable, create_once, read_json, write_atomically

# Starts at a given moment, so that all processes meet in the new folder.
RACE = """
import sys, time
from pathlib import Path
from relp_cli.files import check_writable, write_atomically
at, folder, name = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
for round in range(30):
    while time.time() < at + round * 0.02: pass
    check_writable(folder / str(round) / "run")
    write_atomically(folder / str(round) / "run" / name, name * 1000)
"""
HOLD = """
import sys, time
from pathlib import Path
from relp_cli.files import _locked_temporary
with _locked_temporary(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_processes_that_start_together_in_a_new_folder_all_succeed(tmp_path: Path) -> None:
    at = str(time.time() + 0.7)
    running = [
        subprocess.Popen([sys.executable, "-c", RACE, at, str(tmp_path / "new"), f"file{i}"], stderr=subprocess.PIPE)
        for i in range(4)
    ]
    assert [p.communicate()[1].decode() for p in running] == [""] * 4
    for i in range(4):
        for n in range(30):
            assert (tmp_path / "new" / str(n) / "run" / f"file{i}").read_text() == f"file{i}" * 1000
    assert len(list((tmp_path / "new").rglob("*"))) == 30 * (2 + 4)


def test_checking_touches_no_file(tmp_path: Path) -> None:
    (tmp_path / ".writable").write_text("the user's own")
    check_writable(tmp_path)
    check_writable(tmp_path / "a/b/c")
    assert [p.name for p in tmp_path.iterdir()] == [".writable"]
    assert (tmp_path / ".writable").read_text() == "the user's own"


def test_what_a_killed_process_left_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    held = [subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)]
    for process in held:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
    killed, living = held
    killed.kill()
    killed.communicate()
    (tmp_path / ".relp-mine").write_text("")
    assert len(list(tmp_path.glob(".relp-*.tmp"))) == 2
    write_atomically(tmp_path / "file", "content")
    assert len(list(tmp_path.glob(".relp-*.tmp"))) == 1
    living.kill()
    living.communicate()
    write_atomically(tmp_path / "file", "content")
    assert {p.name for p in tmp_path.iterdir()} == {"file", ".relp-mine"}


def test_what_another_machine_writes_stays_though_its_lock_is_not_seen(tmp_path: Path) -> None:
    """On Lustre with localflock, NFS with local_lock: the file looks as a killed process's does."""
    (other := tmp_path / ".relp-another-x.tmp").write_text("half")
    write_atomically(tmp_path / "file", "content")
    assert other.read_text() == "half"
    long_ago = other.stat().st_mtime - OLD - 60
    os.utime(other, (long_ago, long_ago))
    write_atomically(tmp_path / "file", "content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_made_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "link")  # there are file systems without
    assert create_once(tmp_path / "a/file", "first")
    assert not create_once(tmp_path / "a/file", "second")
    assert (tmp_path / "a/file").read_text() == "first"

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunFailed, match="No space left"):
        create_once(tmp_path / "b", "first")
    assert not (tmp_path / "b").exists()
    with pytest.raises(RelpError, match="cannot write"):
        create_once(tmp_path / "a/file/claims/x", "")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("file/run", "is not a folder"),
        ("nope/../run", "'..' stands after a folder that does not exist"),
        ("n" * 256, "name too long"),
        (f"new/{'é' * 128}", "longer than 255 bytes"),
        ("locked/run", "is not writable"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_and_nothing_is_made(tmp_path, monkeypatch, where, expected):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    before = sorted(tmp_path.rglob("*"))
    for act in (check_writable, lambda path: write_atomically(path, "")):
        with pytest.raises(RelpError, match=r"(?i)cannot write .*" + expected.replace(".", r"\.")) as caught:
            act(tmp_path / where)
        assert caught.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_size_limit_fails_in_one_line(tmp_path: Path) -> None:
    code = "from relp_cli.files import *; write_atomically(Path('file'), b'x' * 100000)"
    done = subprocess.run(
        [sys.executable, "-c", f"try:\n    {code}\nexcept RelpError as e: print(e.exit_code, e)"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)),
    )  # fmt: skip
    assert done.stdout == "1 writing file failed: File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_deleted_in_the_middle_fails_in_one_line(tmp_path, monkeypatch):
    def gone(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "replace", gone)
    with pytest.raises(RunFailed, match=r"writing .*file failed: its folder was deleted meanwhile"):
        write_atomically(tmp_path / "file", "")


@pytest.mark.parametrize(
    ("text", "expected", "code"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "thing .*: duplicate key 'c'", 2),
        ("[" * 100_000, "thing .*: nested too deeply", 2),
        (f"[{'7' * 5000}]", r"thing .*: a number of 5000 digits \(777777777777…\)", 2),
        ('{"a": ', "thing .* is not valid JSON", 2),
        ("\udce9", "thing .* cannot be read: .*utf-8", 2),
        (None, "thing .* cannot be read: No such file", 2),
    ],
)
def test_strict_json(tmp_path, text, expected, code):
    if text is not None:
        (tmp_path / "file.json").write_text(text, errors="surrogateescape")
    with pytest.raises(RelpError, match=expected) as caught:
        read_json(tmp_path / "file.json", "thing")
    assert caught.value.exit_code == code
