"""Claims of several processes at one folder: exclusive, taken over from the dead, on file systems of all kinds."""

from __future__ import annotations

import errno
import json
import os
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from relp_cli.files import create_once
from relp_cli.jobs.claims import POLL, Claims, _ours, release
from relp_cli.jobs.grid import cells, groups_of, load_job
from relp_cli.jobs.run import _claim_name, run_cells, write
from relp_cli.runs.scoring import Session

JOB = """
name: small
tasks: [sva_simple]
models: [tiny-gpt2]
methods: [random]
kinds: [head, mlp_out, mlp_neuron]
pairs: 4
evaluate: {sweep: "counts:1,5", heldout: 4, random_circuits: 1}
"""


def test_claims_are_exclusive_expire_and_are_taken_over(tmp_path, monkeypatch):
    first, second = Claims(tmp_path), Claims(tmp_path)
    with first.claim("group") as ours, second.claim("group") as too:
        assert (ours, too) == (True, False)
    with second.claim("group") as ours:
        assert ours
    (tmp_path / "group.0").write_text("")  # a process died before it said who it was
    (tmp_path / "other.0").write_text(json.dumps({"machine": "elsewhere", "pid": 1}))
    for name in ("group", "other"):
        with second.claim(name) as ours:
            assert not ours  # it may live
    monkeypatch.setattr("relp_cli.jobs.claims.EXPIRES", 0.05)
    time.sleep(0.06)
    for name in ("group", "other"):
        with second.claim(name) as ours, first.claim(name) as too:
            assert (ours, too) == (True, False)
            assert sorted(p.name for p in tmp_path.glob(f"{name}*")) == [f"{name}.0", f"{name}.1"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("beat", ["written", "touched"])
def test_a_claim_lives_while_its_owner_does_whatever_the_clocks_say(tmp_path, monkeypatch, beat):
    """No hard links, times of a file server that are years off, and a full disk."""
    monkeypatch.setattr("relp_cli.jobs.claims.EXPIRES", 0.3)
    monkeypatch.setattr("relp_cli.jobs.claims.BEAT", 0.02)
    monkeypatch.setattr("relp_cli.jobs.claims._machine", lambda: "one of several without common process ids")
    monkeypatch.delattr(os, "link")
    first, second, write = Claims(tmp_path), Claims(tmp_path), os.write

    def full(handle, content):
        if content == b"\n":
            raise OSError(errno.ENOSPC, "no space")
        return write(handle, content)

    with first.claim("group") as ours:
        assert ours
        os.utime(tmp_path / "group.0", (4e9, 4e9))
        if beat == "touched":
            monkeypatch.setattr(os, "write", full)
        for _ in range(12):
            time.sleep(0.05)
            with second.claim("group") as too:
                assert not too
        assert not first.lost("group")
        size = (tmp_path / "group.0").stat().st_size
    assert (size > 90) == (beat == "written")
    assert not list(tmp_path.iterdir())


def test_who_was_stopped_while_another_took_over_leaves_it_the_rest(tmp_path, monkeypatch):
    """A process that is stopped in a group for longer than a claim lasts goes on: it writes nothing over the other's cells."""
    (tmp_path / "job.yaml").write_text(JOB)
    grid = load_job(str(tmp_path / "job.yaml"), [])
    elsewhere = Claims(tmp_path / "out/claims")
    written = list[str]()

    def stop(known, computed):
        if not written:  # after the first cell
            monkeypatch.setattr("relp_cli.jobs.claims.EXPIRES", -1)
            (name,) = {path.name.rpartition(".")[0] for path in elsewhere.folder.iterdir()}
            taken = elsewhere._take(name)
            monkeypatch.setattr("relp_cli.jobs.claims.EXPIRES", 60)
            monkeypatch.setattr("relp_cli.jobs.run.POLL", 0.01)

            def give_back(_):
                assert [path.name for path in elsewhere.folder.iterdir()] == [taken.name]  # not taken away either
                written.append("the other is done")
                taken.unlink()
                monkeypatch.setattr("relp_cli.jobs.run.time.sleep", time.sleep)

            monkeypatch.setattr("relp_cli.jobs.run.time", SimpleNamespace(sleep=give_back))
        written.append(computed.cell.label)
        return write(known, computed)

    monkeypatch.setattr("relp_cli.jobs.run.write", stop)
    outcome = run_cells(grid, tmp_path / "out", Session("cpu"))
    assert written[1] == "the other is done"
    assert len(written) == 1 + len(cells(grid)) == 1 + outcome.computed + outcome.finished


def test_a_process_that_ends_within_its_blocks_gives_back_its_own(tmp_path):
    """Ended while a library is imported, or one does not come back to Python; a child has its parent's memory, not its claims."""
    parent, child = Claims(tmp_path / "parent"), Claims(tmp_path / "child")
    with parent.claim("a"), child.claim("b"):
        _ours[parent.folder, "a"] = (_ours[parent.folder, "a"][0], os.getpid() + 1)
        release()
        assert [path.name for path in tmp_path.glob("*/*")] == ["a.0"]
        assert (parent.lost("a"), child.lost("b")) == (False, True)
    assert not list(tmp_path.glob("*/*"))


def test_a_listing_that_is_old_makes_no_process_ask_without_rest(tmp_path, monkeypatch):
    """File servers' clients list a folder from memory: a claim of another machine is not there yet, but cannot be made either."""
    (tmp_path / "job.yaml").write_text(JOB)
    grid = load_job(str(tmp_path / "job.yaml"), ["kinds=[head]"])
    elsewhere, asked, rests = Claims(tmp_path / "out/claims"), list[str](), list[float]()
    taken = elsewhere._take(_claim_name(grid, groups_of(grid)[0]))
    monkeypatch.setattr(Claims, "_held", lambda *_: [])
    monkeypatch.setattr("relp_cli.jobs.run.counts", lambda _: Counter())
    monkeypatch.setattr("relp_cli.jobs.claims.create_once", lambda *what: asked.append("") or create_once(*what))

    def rest(seconds):
        rests.append(seconds)
        if len(rests) == 3:
            taken.unlink()

    monkeypatch.setattr("relp_cli.jobs.run.time", SimpleNamespace(sleep=rest))
    with monkeypatch.context() as patch:
        patch.setattr(Claims, "lost", lambda *_: False)
        outcome = run_cells(grid, tmp_path / "out", Session("cpu"))
    assert (outcome.computed, len(asked), rests) == (1, 4, [POLL] * 3)
