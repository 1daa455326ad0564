"""`--engine ray` on a cluster of this machine that pretends to have two GPUs: `make test-cluster`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import relp_cli
from relp_cli.config.paths import data_root
from relp_cli.errors import RelpError
from relp_cli.jobs import ray_engine
from relp_cli.jobs.collecting import Collected, collect
from relp_cli.jobs.engine import Options
from relp_cli.jobs.engines import ENGINES
from relp_cli.jobs.grid import JobSpec, load_job
from relp_cli.jobs.ray_worker import Worker
from relp_cli.jobs.run import Outcome
from relp_cli.jobs.summary import summarise

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

JOB = """
name: small
tasks: [sva_simple, ./pairs.jsonl]
models: [tiny-gpt2]
methods: [relp, random]
kinds: [head]
pairs: 4
agreement: {}
evaluate: {sweep: "counts:1,5,1000000", heldout: 4, random_circuits: 1}
"""
PEOPLE = [line.split(",")[:2] for line in (data_root("datasets") / "people.csv").read_text().splitlines()[1:9]]
PAIRS = [
    {"original": f"The {one}", "patch": f"The {many}", "answer": " does", "foil": " do", "split": split}
    for (one, many), split in zip(PEOPLE, 4 * ("discovery", "heldout"), strict=True)
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Any:
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers that tests make cannot import tests
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 2, "object_store_memory": 10**8})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return load_job("job.yaml", [])


class Ran:
    """A job on an engine: what came of it, and what was said."""

    def __init__(
        self, job: JobSpec, folder: str, engine: str = "ray", during: Any = lambda _: None, **options: Any
    ) -> None:
        self.said: list[str] = []
        self.steps: list[tuple[int, int, str]] = []
        self.folder = Path(folder)

        def report(*step: Any) -> None:
            self.steps.append(step)
            during(self)

        self.outcome: Outcome = ENGINES[engine](job, self.folder, Options(**options), report, self.said.append)
        self.result: Collected = collect(self.outcome.paths)
        summarise(job, self.result.rows, self.folder)

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.outcome.computed, self.outcome.finished, self.outcome.failed

    def read(self, name: str = "results.csv") -> bytes:
        return (self.folder / name).read_bytes()

    def provenance(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text())["provenance"] for path in (self.folder / "cells").glob("*.json")]


class Dying(Worker):
    """A worker that is killed at one cell of one group; before the file `once` is there, if it names one."""

    once = ""

    def begin(self, wanted: Any, finished: Any) -> Any:
        self.wanted = list(wanted)
        return super().begin(wanted, finished)

    def next(self) -> Any:
        cell = self.wanted.pop(0)
        if (cell.group.task, cell.method) == ("sva_simple", "random") and not (self.once and os.path.exists(self.once)):
            if self.once:
                open(self.once, "w").close()
            time.sleep(0.5)  # the cell before has been answered
            os.kill(os.getpid(), signal.SIGKILL)
        return super().next()


def test_every_row_is_local_ones_and_each_worker_sees_one_gpu(job: JobSpec) -> None:
    """Also of a task that is a file beside the job, whose path is relative, with one worker more than there are models."""
    alone, shared = Ran(job, "alone", "local"), Ran(job, "shared")
    assert alone.counts == shared.counts == (4, 0, 0)
    for name in ("results.csv", "summary.csv", "agreement.csv"):
        assert alone.read(name) == shared.read(name)
    assert [step[:2] for step in shared.steps] == [(n, 4) for n in range(1, 5)]
    assert {p["cuda_visible_devices"] for p in shared.provenance()} == {"0", "1"}
    assert Ran(job, "shared").counts == (0, 4, 0)


def test_a_killed_worker_loses_nothing(job: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "Worker", type("Once", (Dying,), {"once": str(tmp_path / "died")}))
    ran = Ran(job, "out", gpus=0)
    assert ran.counts == (4, 0, 0)
    assert len(ran.said) == 1
    assert "another one goes on (1 of 3)" in ran.said[0]
    assert ran.read() == Ran(job, "alone", "local").read()


def test_four_deaths_fail_their_group_only(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "Worker", Dying)
    ran = Ran(job, "out", workers=1)
    assert ran.counts == (3, 0, 1)  # the group's first cell was written before its worker died
    ((cell, error),) = ran.result.errors
    assert cell == "sva_simple / tiny-gpt2 / random / head"
    assert f"4 workers died on {os.uname().nodename} at its group" in error
    assert "\n" not in error
    assert len(ran.said) == 3
    monkeypatch.undo()


class Wrong(Worker):
    """A worker with a fault of its own at one task."""

    def next(self) -> Any:
        if self._last.group.task == "sva_simple":
            raise TypeError("a fault\nof the program")
        return super().next()


def test_a_fault_of_the_program_is_a_line_of_its_group(
    job: JobSpec, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_engine, "Worker", Wrong)
    ran = Ran(job, "out", workers=1)
    assert ran.counts == (2, 0, 2)
    assert {error for _, error in ran.result.errors} == {f"TypeError: a fault on {os.uname().nodename}"}
    assert not ran.said
    assert "Unhandled error" not in capfd.readouterr().err  # of the calls behind the one that failed


def test_a_worker_needs_nothing_of_the_drivers_disk(cluster: Any, tmp_path: Path) -> None:
    """The driver sees a file system of its own over its folder: no worker sees what is in it, nor what it writes."""
    own = ["unshare", "-m", "sh", "-c"]
    if subprocess.run([*own, f"mount -t tmpfs none {tmp_path}"], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs to be allowed")
    private, public = tmp_path / "private", tmp_path / "public"
    private.mkdir()
    public.mkdir()
    source = Path(relp_cli.__file__).parent / "models/embedded/tiny-gpt2"
    shutil.copytree(source, public / "copy")
    models = "models: [../public/copy, ./hidden]"
    text = JOB.replace("models: [tiny-gpt2]", models)
    pairs = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
    run = "import sys; from relp_cli.cli.main import run; sys.argv = ['relp', *sys.argv[1:]]; run()"
    line = f"""mount -t tmpfs none {private} && cd {private} && cp -r {source} hidden && cat > job.yaml
    printf %s '{pairs}' > pairs.jsonl
    "{sys.executable}" -c "{run}" evaluate job.yaml --engine ray --address {cluster.address} -o out; echo "code $?"
    cp -r out {public}/out"""
    done = subprocess.run([*own, line], input=text, capture_output=True, text=True, check=False, timeout=300)
    assert "code 1" in done.stdout, done.stderr
    assert "4 cells computed, 0 found finished, 4 failed" in done.stderr
    assert f"model folder '{private}/hidden' does not exist (on {os.uname().nodename})" in done.stderr
    assert not list(private.iterdir())
    os.chdir(private)
    shutil.copytree(source, "hidden")
    Path("job.yaml").write_text(JOB.replace("models: [tiny-gpt2]", "models: [../public/copy]"))
    Path("pairs.jsonl").write_text(pairs)
    alone = Ran(load_job("job.yaml", []), "alone", "local")
    assert alone.read() == (public / "out/results.csv").read_bytes()


class Stopping(Worker):
    """A worker that never comes to a group's last cell, unless the file `go` was there when it began."""

    go = ""

    def begin(self, wanted: Any, finished: Any) -> Any:
        self.left, self.may_end = len(wanted), os.path.exists(self.go)
        return super().begin(wanted, finished)

    def next(self) -> Any:
        self.left -= 1
        while not (self.left or self.may_end):
            time.sleep(0.1)
        return super().next()


def test_a_machine_that_is_lost_loses_nothing(
    cluster: Any, job: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that only one machine has room for, which is lost with the first cell; another one comes."""
    go, big = tmp_path / "go", {"num_cpus": 5, "object_store_memory": 10**8}
    monkeypatch.setattr(ray_engine, "Worker", type("Stops", (Stopping,), {"go": str(go)}))
    lost = cluster.add_node(**big)

    def lose(ran: Ran) -> None:
        if len(ran.steps) == 1:
            cluster.remove_node(lost, allow_graceful=False)
            go.touch()
            cluster.add_node(**big)

    ran = Ran(job, "out", during=lose, cpus=5, gpus=0.0)
    assert ran.counts == (4, 0, 0)
    assert "another one goes on (1 of 3)" in ran.said[0]
    assert ran.read() == Ran(job, "alone", "local").read()


def test_a_cluster_without_room_or_that_is_not_there_is_refused(job: JobSpec) -> None:
    with pytest.raises(RelpError, match="no node of the Ray cluster has the 1 CPUs and 3 GPUs of one worker"):
        Ran(job, "out", gpus=3)


def test_room_is_counted_node_by_node() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}},
    ]
    asked = {(1, 0): 11, (1, 1): 5, (2, 1): 3, (4, 0.5): 2, (1, 0.5): 7, (9, 0): 0}
    assert {(c, g): ray_engine.room(nodes, c, g) for c, g in asked} == asked
