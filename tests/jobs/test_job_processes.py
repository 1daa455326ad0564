"""Several processes at one job: shards, workers, random kills, and collecting. Whatever computes them, the same bytes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import relp_cli
from relp_cli.jobs import workers
from relp_cli.jobs.claims import MOST_DEATHS
from relp_cli.jobs.grid import Cell, cell_hash, cells, groups_of, groups_of_shard, load_job, read_cell
from relp_cli.jobs.run import Begun, run_cells
from relp_cli.runs.scoring import Session

JOB = """
name: small
tasks: [sva_simple]
models: [./a, ./b]
methods: [relp, random]
kinds: [head]
seeds: [0, 1, 2]
pairs: 4
evaluate: {sweep: "counts:1,5,1000000", heldout: 4, random_circuits: 1}
"""
EMBEDDED = Path(relp_cli.__file__).parent / "models/embedded"
ALONE: list[Path] = []
# One start of torch for all: a process forks into four, kills one of them and terminates another, at random times.
FOUR = """
import os, random, sys, time
from contextlib import suppress
from pathlib import Path
import relp_cli.jobs.engines, relp_cli.jobs.summary
from relp_cli.cli.main import run
from relp_cli.models.load import load_model
load_model("./a")
chance, cells, seen = random.Random(int(sys.argv.pop(1))), Path("shared/cells"), {}
def child():
    pid = os.fork()
    if not pid:
        sys.argv[0] = "relp"
        run()
    return pid
def claims():
    for path in Path("shared/claims").iterdir():
        with suppress(FileNotFoundError):
            yield path.read_text()
living = [child() for _ in range(4)]
kills = list(zip(sorted(chance.sample(range(1, 10), 2)), (9, 15)))  # after how many cells
end = time.monotonic() + 120
codes = []
while living:
    assert time.monotonic() < end
    for path in cells.glob("*.json"):
        seen.setdefault(path, path.stat().st_mtime_ns)
    if kills and len(seen) >= kills[0][0]:
        os.kill(victim := chance.choice(living), number := kills.pop(0)[1])
        codes.append(os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]))
        living.remove(victim)
        if number == 15 and any(f": {victim}}}" in text for text in claims()):
            codes.append("a claim is left")
    for pid in list(living):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            living.remove(pid)
            codes.append(os.waitstatus_to_exitcode(status))
    time.sleep(0.002)
again = [path.name for path, time in seen.items() if path.stat().st_mtime_ns != time]
print(codes, kills, again, len(seen))
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    for name, model in (("a", "tiny-gpt2"), ("b", "tiny-pythia")):
        (tmp_path / name).symlink_to(EMBEDDED / model)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"


@pytest.fixture
def alone(relp, job, tmp_path_factory) -> Path:
    """The folder of the job that one process computed, once for all tests."""
    if not ALONE:
        done = relp("evaluate", job, "-o", "alone")
        assert done.code == 0, done.err
        ALONE.append(shutil.copytree("alone", tmp_path_factory.mktemp("alone") / "alone"))
    return ALONE[0]


def same_bytes(folder: Path, as_in: Path) -> bool:
    """Tables and figures; timings.csv holds seconds."""
    names = {path.name for path in as_in.glob("*.*")} - {"timings.csv", "job.json"}
    assert {"results.csv", "summary.csv", "curves-a-head.png"} <= names
    return all((folder / name).read_bytes() == (as_in / name).read_bytes() for name in names)


def test_four_processes_of_which_one_is_killed_and_one_terminated(alone, tmp_path):
    line = [sys.executable, "-c", FOUR, "7", "evaluate", "job.yaml", "-o", "shared"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.splitlines()[-1:] == ["[-9, 143, 0, 0] [] [] 12"], done.stdout + done.stderr
    assert done.stderr.count("error: ended by SIGTERM; the same command again resumes what was finished") == 1
    assert same_bytes(tmp_path / "shared", alone)
    assert not list((tmp_path / "shared/claims").iterdir())


def test_shards_leave_tables_once_all_cells_are_there(relp, job, alone, tmp_path):
    first = relp("evaluate", job, "-o", "out", "--shard", "2/3", "--json")
    assert first.code == 0, first.err
    assert "shard 2/3 (--shard 2/3): 4 of 12 cells" in first.err
    assert "8 of 12 cells are missing, sva_simple / ./a / relp / head first" in first.err
    assert len(json.loads(first.out)["missing"]) == 8
    assert not (tmp_path / "out/results.csv").exists()
    early = relp("collect", "out")
    assert early.code == 1
    assert "4 cells finished, 0 failed, 8 missing" in early.err
    assert "sva_simple / ./b / random / head / seed 2" in relp("collect", "out", "--json").out
    (tmp_path / "out/results.csv").unlink()
    environment = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "3"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert (
            "shard 1/3 (SLURM_ARRAY_TASK_ID=4): 4 of 12 cells"
            in relp("evaluate", job, "-o", "out", "--shard", "auto").err
        )
    last = relp("evaluate", job, "-o", "out", "--shard", "3/3")
    assert last.code == 0, last.err
    assert "shard 3/3: 4 cells computed, 0 found finished, 0 failed" in last.err
    assert same_bytes(tmp_path / "out", alone)


def test_shards_are_a_partition_of_neighbours(job):
    grid = load_job(str(job), ["seeds=[0, 1, 2, 3]"])
    for count in (1, 2, 3, 5, 8, 11):
        shares = [groups_of_shard(grid, index, count) for index in range(count)]
        assert [group for share in shares for group in share] == groups_of(grid)
        assert {len(share) for share in shares} <= {8 // count, -(-8 // count)}
    assert [group.model for group in groups_of(grid)] == ["./a"] * 4 + ["./b"] * 4


def test_collecting_needs_neither_models_nor_torch(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.*"):
        if path.name != "job.json":
            path.unlink()
    (tmp_path / "a").unlink()
    (tmp_path / "b").unlink()
    code = (
        "import sys; from relp_cli.cli.main import run\n"
        "try:\n    run()\nfinally:\n    print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    line = [sys.executable, "-c", code, "collect", "out"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")
    assert "12 cells finished, 0 failed, 0 missing" in done.stderr
    assert "./a: not loaded" in done.stderr
    assert same_bytes(tmp_path / "out", alone)


def test_workers_see_one_gpu_each(relp, job, tmp_path, monkeypatch):
    """Processes that only say what they see, in place of workers."""
    say = "import os; open(f'seen-{os.getpid()}', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    monkeypatch.setattr(workers, "LINE", [sys.executable, "-S", "-c", say])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    done = relp("evaluate", job, "-o", "out", "--workers", "3")
    assert "3 workers: GPU 3, GPU 5, GPU 6" in done.err
    assert sorted(path.read_text() for path in tmp_path.glob("seen-*")) == ["3", "5", "6"]
    assert (done.code, "12 failed" in done.err) == (1, True)


def test_a_worker_completes_what_is_missing_to_the_same_bytes(relp, job, alone, tmp_path, monkeypatch):
    shutil.copytree(alone, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/scores")
    lost = [path for path in (tmp_path / "out/cells").iterdir() if "/ ./b / relp" in path.read_text()]
    for path in [*lost, *(tmp_path / "out").glob("*.csv")]:
        path.unlink()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = relp("evaluate", job, "-o", "out", "--workers", "1")
    assert done.code == 0, done.err
    assert "3 cells computed, 9 found finished, 0 failed" in done.err
    assert [read_cell(path)["provenance"]["cuda_visible_devices"] for path in lost] == ["0"] * 3
    assert same_bytes(tmp_path / "out", alone)


def test_what_a_worker_has_for_itself():
    def has(*how):
        return [(place.name, *place.environment.values()) for place in workers.places(*how)]

    assert has(3, ["0", "GPU-b"], 8, {}) == [("GPU 0", "2", "0"), ("GPU GPU-b", "2", "GPU-b"), ("GPU 0", "2", "0")]
    assert has(2, [], 8, {}) == [("4 threads", "4")] * 2
    assert has(4, [], 2, {}) == [("1 thread", "1")] * 4
    assert has(2, [], 8, {"OMP_NUM_THREADS": "3"}) == [("3 threads", "3")] * 2


def test_a_worker_that_is_ended_is_ended_once(monkeypatch):
    """SIGTERM goes to a job's parent and workers alike: what the parent then says must not interrupt what gives claims back."""
    handlers = {}
    monkeypatch.setattr("signal.signal", handlers.__setitem__)
    with pytest.raises(KeyboardInterrupt):
        workers._release(signal.SIGTERM, None)
    assert handlers == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}


def test_workers_that_die_are_said_and_replaced_but_not_for_ever(relp, job, monkeypatch):
    """Processes that die at their start, in place of workers: no cell is ever written."""
    monkeypatch.setattr(workers, "POLL", 0.01)
    monkeypatch.setattr(workers, "LINE", [sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"])
    done = relp("evaluate", job, "-o", "out", "--workers", "2")
    assert done.code == 1
    assert done.err.count("WARNING: worker") == 2 * MOST_DEATHS + 1
    assert "was killed (SIGKILL); another one takes its place" in done.err
    assert "12 failed" in done.err
    assert "sva_simple / ./a / relp / head" in done.err
    monkeypatch.setattr(workers, "LINE", [sys.executable, "-S", "-c", f"import os; os._exit({workers.REFUSED})"])
    refused = relp("evaluate", job, "-o", "out", "--workers", "2")
    assert (refused.code, refused.err.count("WARNING: worker")) == (1, 2)


def test_a_group_at_which_processes_die_fails_alone(job, tmp_path):
    grid = load_job(str(job), ["methods=[random]", "models=[./a]", "seeds=[0, 1]"])
    first = groups_of(grid)[0]
    (tmp_path / "out/claims").mkdir(parents=True)
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    from relp_cli.jobs.claims import _machine

    name = cell_hash(grid, Cell(first, "random", "head"))
    for number in range(MOST_DEATHS):
        owner = {"machine": _machine(), "pid": gone.pid}
        (tmp_path / f"out/claims/{name}.{number}").write_text(json.dumps(owner))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        outcome = run_cells(grid, tmp_path / "out", Session("cpu"), begun=Begun({}, {}))
        assert (outcome.computed, outcome.failed) == (1, 1)
        assert f"{MOST_DEATHS} processes died" in read_cell(outcome.paths[cells(grid)[0]])["error"]
        assert run_cells(grid, tmp_path / "out", Session("cpu")).computed == 1  # the next command tries it again


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (("--shard", "4/3"), "--shard 4/3: expected I/N with I from 1 to N"),
        (("--workers", "2", "--device", "cuda:1"), "--device cuda:1 names one for all"),
        (("--engine", "ray", "--shard", "1/2"), "--shard is for --engine local"),
        (("--engine", "ray", "--device", "cuda:1"), "a worker sees its own GPUs only"),
        (("--engine", "slurm", "--address", "x"), "--address is for --engine ray, not slurm"),
    ],
)
def test_bad_shares_are_refused_before_anything_is_written(relp, job, how, expected):
    done = relp("evaluate", job, *how)
    assert done.code == 2
    assert expected in done.err
    assert not Path("runs").exists()


def test_what_cannot_be_collected_is_one_line(relp, job, tmp_path):
    (tmp_path / "other").mkdir()
    for line, expected in (
        (("collect", "other"), "is not a job's folder (it has no job.json)"),
        (("collect", job), "job 'small' was not run in runs/small"),
        (("collect", "runs/small"), "'runs/small' is neither a job's folder nor a job"),
        (("collect", "other", "-o", "x"), "--output is for a JOB.yaml"),
    ):
        done = relp(*line)
        assert done.code == 2
        assert expected in done.err
    (tmp_path / "other/job.json").write_text('{"job": {"name": "x"}}')
    assert "was not written by this version of relp" in relp("collect", "other").err
    run = tmp_path / "other/run"
    run.mkdir()
    assert "--shard is for jobs" in relp("evaluate", run, "--shard", "1/2").err
