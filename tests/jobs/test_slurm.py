"""`--engine slurm`: submitit's local executor runs the tasks here; what Slurm does to tasks is played."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relp_cli.errors import RelpError
from relp_cli.jobs import slurm_engine
from relp_cli.jobs.engine import Options
from relp_cli.jobs.grid import JobSpec, load_job

submitit = pytest.importorskip("submitit")

JOB = """
name: small
tasks: [sva_simple]
models: [tiny-gpt2]
methods: [random]
kinds: [head]
seeds: [0, 1]
pairs: 4
evaluate: {sweep: "counts:1,5", heldout: 4, random_circuits: 1}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)
    monkeypatch.setattr(slurm_engine, "LOOK", 0.1)
    return load_job("job.yaml", [])


def test_an_array_computes_what_one_process_does(relp: Any, job: JobSpec) -> None:
    assert job.name == "small"
    how = ("--engine", "slurm", "--slurm", "cluster=local", "--slurm", "partition=gpu", "--workers", 1)
    done = relp("evaluate", "job.yaml", *how, "-o", "out")
    assert done.code == 0, done.err
    assert "2 cells computed, 0 found finished, 0 failed" in done.err
    assert done.err.count("submitted: ") == 1
    assert relp("evaluate", "job.yaml", "-o", "alone").code == 0
    for name in ("results.csv", "summary.csv"):
        assert Path("out", name).read_bytes() == Path("alone", name).read_bytes()
    again = relp("evaluate", "job.yaml", *how, "-o", "out")
    assert "0 cells computed, 2 found finished, 0 failed" in again.err
    assert "submitted" not in again.err


class Played:
    """An executor whose first `dying` arrays die without a word; the tasks of later ones run here."""

    def __init__(self, dying: int) -> None:
        self.dying, self.arrays, self.state = dying, 0, "NODE_FAIL"

    def map_array(self, work: Any, numbers: Any) -> list[Any]:
        self.arrays += 1
        if self.arrays > self.dying:
            work(0)
        return [self for _ in numbers]

    job_id, paths = "7_0", type("Paths", (), {"stderr": "none.err"})

    def done(self) -> bool:
        return True

    def exception(self) -> Exception:
        return RuntimeError()


@pytest.mark.parametrize(("dying", "counts"), [(1, (2, 0, 0)), (9, (0, 0, 2))])
def test_what_dead_tasks_left_is_submitted_again(job: JobSpec, monkeypatch: Any, dying: int, counts: Any) -> None:
    """Three times; then its cells fail."""
    played, said = Played(dying), list[str]()
    monkeypatch.setattr(slurm_engine, "_executor", lambda *_: played)
    outcome = slurm_engine.run_on_slurm(job, Path("out"), Options(), None, said.append)
    assert (outcome.computed, outcome.finished, outcome.failed) == counts
    assert played.arrays == min(dying, slurm_engine.RETRIES) + 1
    assert "task 7_0 ended with NODE_FAIL: nothing in its log" in said[1]
    assert "2 cells were left behind; submitted again (1 of 3)" in said[3]


def test_an_interrupt_says_what_goes_on(job: JobSpec, monkeypatch: Any) -> None:
    played, said = Played(1), list[str]()
    monkeypatch.setattr(slurm_engine, "_executor", lambda *_: played)

    def interrupt(_: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Played, "done", interrupt)
    with pytest.raises(KeyboardInterrupt):
        slurm_engine.run_on_slurm(job, Path("out"), Options(workers=2), None, said.append)
    assert "WARNING: 7_[0-1] goes on without this process: `scancel 7` ends it, `relp collect out`" in said[-1]


@pytest.mark.parametrize(("given", "expected"), [
    ("partion=gpu", "unknown --slurm key 'partion'; did you mean 'partition'?"), ("gpus", "expected key=value"),
    ("gpus=many", 'Parameter "gpus_per_node" expected type'), ("nodes=2", "--slurm nodes: a task is one"),
    ("time=1:30", "--slurm time=1:30: expected minutes, or HOURS:MM:SS"), ("time=0", "expected minutes"),
    ("cluster=aws", "expected slurm, or local"), ("mem=32GB", "srun is not on this machine"),
])  # fmt: skip
def test_what_slurm_cannot_be_asked_is_refused(job: JobSpec, monkeypatch: Any, given: str, expected: str) -> None:
    monkeypatch.setenv("PATH", "")
    local = () if given.startswith(("cluster", "mem")) else ("cluster=local",)
    with pytest.raises(RelpError) as refused:
        slurm_engine.run_on_slurm(job, Path("out"), Options(slurm=(given, *local)), None, print)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_times() -> None:
    asked = {"90": 90, "1:30:00": 90, "1-12:00:01": 2161, "0:00:30": 1}
    assert {text: slurm_engine._minutes(text) for text in asked} == asked
