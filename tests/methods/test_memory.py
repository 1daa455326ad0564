"""`memory=`: what is alive is counted, passes are as large as it allows, every process chooses the same, numbers stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from oracles.wrapped import case, pairs, run

import relp_cli as relp
from relp_cli.config.memory import bytes_of, written
from relp_cli.errors import RelpError
from relp_cli.features.load import load_dictionaries
from relp_cli.methods import memory
from relp_cli.methods.memory import Alive, plan
from relp_cli.methods.request import Request
from relp_cli.methods.room import Room
from relp_cli.methods.score import score_share
from relp_cli.methods.unfinished import Shard, Unfinished
from relp_cli.models.offload import resident
from relp_cli.tasks.pairs import PairBatch

BATCHES = [pairs(5, 4, roles=("a", "b", "c", "end")), pairs(3, 3, seed=2, roles=("a", "b", "end"))]
KB = 1000


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> int:
    """What the model of these tests takes, where libraries are said to take nothing."""
    monkeypatch.setattr(memory, "LIBRARIES", {"cpu": 0})
    monkeypatch.setattr(memory, "HELD", 2)
    return resident(case("gpt2").model.hf)


def test_sizes() -> None:
    assert [bytes_of(text) for text in ("8GB", "500MB", "1.5 GiB", "2000kB")] == [
        8 * 10**9,
        5 * 10**8,
        3 << 29,
        2 * 10**6,
    ]
    assert written(1_234_567_890) == "1.24 GB"
    assert written(999_000_001) == "1000 MB"
    for wrong in ("8", "8G", "-1GB", "0MB", "GB", 1.5, True, None):
        with pytest.raises(RelpError, match="expected a size such as 8GB"):
            bytes_of(wrong)


def test_what_is_alive_by_hand() -> None:
    """Views and what is freed count once; what a graph keeps counts until the graph is gone."""
    there = torch.ones(1000)
    with Alive() as count:
        a = there * 2  # 4,000 bytes
        view = a.view(10, 100)
        assert count.now == 4000
        b = torch.zeros(500)
        del b
        assert (count.now, count.peak) == (4000, 6000)
        del a
        assert count.now == 4000
        del view
        assert count.now == 0
        leaf = torch.ones(1000, requires_grad=True)
        kept = leaf.exp().exp()  # the first one is kept for the second's gradient
        assert count.now == 4000 + 8000
        kept.sum().backward()
        del kept
        assert count.now == 8000  # the leaf and its gradient


@pytest.mark.parametrize(("free", "tokens"), [(390, 0), (700, 4), (1000, 16), (2490, 64), (2340, 32), (10**5, 512)])
def test_a_limit_by_hand(held: int, free: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 kB at once and 100 kB a pair are alive, twice of which an allocator holds: (free − 200) / 200 pairs of 6 tokens."""
    monkeypatch.setattr(memory, "MOST", 512)

    def compute(batch: PairBatch, room: Room) -> None:
        assert room == Room.of_tokens(batch.original.numel())
        _ = torch.zeros(100 * KB // 4), torch.zeros(100 * KB // 4 * len(batch))

    def chosen() -> memory.Plan:
        return plan(held + free * KB, case("gpt2").model, [pairs(3, 6)], compute)

    if not tokens:
        with pytest.raises(
            RelpError, match=r"one pair of 6 tokens at a time takes up to \S+ MB.*give at least as much"
        ):
            chosen()
        return
    assert chosen().tokens == tokens
    assert chosen().peak == held + (200 + 200 * max(1, tokens // 6)) * KB


def test_single_scores_by_hand(held: int) -> None:
    """They are beside the passes once; written when what passes took is given back, with a copy and a quarter."""

    def compute(batch: PairBatch, _: Room) -> None:
        there = torch.zeros(25 * KB * len(batch))  # 100 kB a pair, of which an allocator holds 200
        del there

    def chosen(free: int) -> memory.Plan:
        return plan(held + free * KB, case("gpt2").model, [pairs(3, 4)], compute, singles=100 * KB)

    assert (chosen(300).tokens, chosen(300).peak) == (4, held + 300 * KB)
    assert (chosen(900).tokens, chosen(900).peak) == (16, held + 900 * KB)
    with pytest.raises(RelpError, match="and 1 MB for single scores"):
        chosen(299)


def test_what_features_take_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dictionaries, and single scores: as many as differ between the prompts, indexed and as a table."""
    model = relp.load_model("tiny-pythia", dtype="float32")
    task = relp.load_task("sva_across_pp").pairs(model, n=4)
    kept: list[tuple[int, int]] = []

    def chosen(*given: Any) -> memory.Plan:
        kept.append((given[5], given[6]))
        return memory.Plan(10**9, 64, 10**8)

    monkeypatch.setattr(memory, "plan", chosen)
    for keep in (True, False):
        scores = relp.score(model, task, "atp", ["feature"], dictionary="tiny-pythia", memory=10**9, keep_examples=keep)
        (beside, table), sums = kept[-1], memory.SUMS * scores.n_nodes
        dictionaries = sum(t.nbytes for d in load_dictionaries("tiny-pythia", model).values() for t in _tensors(d))
        indexed = beside - sums - dictionaries
        if not keep:
            assert (indexed, table) == (0, 0)
            continue
        entries = int((scores.examples != 0).sum())
        assert entries <= indexed / memory.INDEXED <= 2 * entries
        assert scores.examples.nbytes <= table <= 8 * scores.examples.nbytes


def _tensors(dictionary: Any) -> list[torch.Tensor]:
    return [value for value in vars(dictionary).values() if isinstance(value, torch.Tensor)]


FREE = {"resid_pre": 600_000, "mlp_neuron": 600_000, "edges": 1_200_000, "mlp_out": 400_000}
METHODS: list[tuple[str, list[str], dict[str, Any]]] = [
    ("atp", ["resid_pre", "attn_out", "mlp_out"], {}),
    ("relp", ["mlp_neuron"], {}),
    ("ig_inputs", ["edges"], {"steps": 3}),
    ("act_patch", ["mlp_out", "head"], {}),
]


@pytest.mark.parametrize(("method", "nodes", "options"), METHODS)
def test_numbers_are_those_of_the_default(held: int, method: str, nodes: list[str], options: dict[str, Any]) -> None:
    """Whatever was chosen; and it is chosen the same every time."""
    whole, limit = run(case("gpt2"), method, nodes, BATCHES, **options), held + FREE[nodes[0]]
    got = run(case("gpt2"), method, nodes, BATCHES, memory=limit, **options)
    torch.testing.assert_close(got.examples, whole.examples, rtol=1e-9, atol=1e-12)
    assert 1 < got.meta["tokens_per_pass"] <= 16  # of 20
    assert got.meta["memory_expected"] <= limit == got.meta["memory"]


def test_sums_of_prompts_take_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pairs share prompts there are more sums, beside those of independent pairs."""
    kept: list[int] = []

    def chosen(*given: Any) -> memory.Plan:
        kept.append(given[5])
        return memory.Plan(10**9, 64, 10**8)

    monkeypatch.setattr(memory, "plan", chosen)
    own = pairs(4, 4)
    shared = replace(own, original=own.original[[0, 0, 1, 1]])
    cells = [run(case("gpt2"), "atp", ["mlp_out"], batch, memory=10**9).n_nodes for batch in (own, shared)]
    assert kept == [memory.SUMS * cells[0], (memory.SUMS + memory.CLUSTERED) * cells[1]]


@pytest.mark.parametrize("count", [3, 7])
def test_shards_go_by_what_the_first_has_decided(
    tmp_path: Path, held: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they would not decide the same: the scores are those of one process, to the bit."""
    limit, model = held + 1_000_000, case("gpt2").model
    whole = relp.score(model, BATCHES, "act_patch", ["attn_out"], memory=limit, keep_examples=True)
    for index in range(count):
        request = Request(memory=limit, keep_examples=True, unfinished=Unfinished(tmp_path, "x", Shard(index, count)))
        waiting = score_share(model, BATCHES, "act_patch", ["attn_out"], request)
        assert index < count - 1 or not waiting
        monkeypatch.setattr(memory, "LIBRARIES", {"cpu": 400_000})
    left = Unfinished(tmp_path, "x")
    merged = relp.score(model, BATCHES, "act_patch", ["attn_out"], memory=limit, keep_examples=True, unfinished=left)
    assert torch.equal(merged.examples, whole.examples)
    assert merged.meta["tokens_per_pass"] == whole.meta["tokens_per_pass"]


def test_what_it_is_not_given_with(relp: Any, tmp_path: Path) -> None:
    for args, said in (
        (("--memory", "8"), "--memory 8: expected a size such as 8GB"),
        (("--memory", "2GB", "--batch-size", 4), "give it or --batch-size, not both"),
        (("--memory", "2GB", "--method", "act_patch", "--set", "chunk_tokens=64"), "give it or --set chunk_tokens"),
        (("--memory", "2GB", "--method", "learned"), "method 'learned' needs all pairs at once"),
        (("--memory", "2GB", "--method", "relp+auto"), "method 'relp+auto' needs all pairs at once"),
        (("--memory", "100MB"), "memory 100 MB: one pair of"),
    ):
        done = relp("score", "ioi", "--pairs", 4, *args, "-o", "r")
        assert (done.code, said in done.err) == (2, True), done.err
        assert done.err.strip().splitlines()[-1].startswith("error:")
        assert not (tmp_path / "r/run.json").exists()


def test_verbs_take_it(relp: Any, tmp_path: Path) -> None:
    """A run, its dry run, its evaluation and a job; without it nothing of theirs changes."""
    how = ("ioi", "--pairs", 6, "--nodes", "mlp_out")
    said = json.loads(relp("score", *how, "--memory", "2GB", "--dry-run", "--json").out)
    assert "tokens a pass (2 to 4 pairs), at most" in said["passes"]
    assert relp("score", *how, "-o", "plain").code == 0
    done = relp("score", *how, "--memory", "2GB", "-o", "limited", "--json")
    meta = json.loads(done.out)["scores"]
    assert meta["memory"] == 2 * 10**9
    assert "tokens a pass for a peak of 2.00 GB" in done.err
    assert not list((tmp_path / "limited").glob("unfinished*"))
    rows = []
    for more in ((), ("--memory", "2GB")):
        done = relp("evaluate", "plain", "--pairs", 5, "--sweep", "counts:2", "--random", 0, *more, "--json")
        assert done.code == 0, done.err
        rows += json.loads(done.out)["rows"]
    assert rows[1].pop("pairs_per_pass") >= 5
    for name in ("F_M", "F_C", "faithfulness"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5)
    (tmp_path / "job.yaml").write_text(
        "name: j\ntasks: [ioi]\nmodels: [tiny-gpt2]\nmethods: [atp]\nkinds: [mlp_out]\npairs: 6\nagreement: {}\nmemory: 2GB\n"
    )
    done = relp("evaluate", "job.yaml", "-o", "j")
    assert done.code == 0, done.err
    records = [json.loads(path.read_text()) for path in (tmp_path / "j/scores").glob("*/run.json")]
    assert {record["spec"]["memory"] for record in records} == {2 * 10**9}
    assert all(record["scores"]["tokens_per_pass"] for record in records)
    assert "memory" not in json.loads((tmp_path / "plain/run.json").read_text())["spec"]
    tables = []
    for more in ((), ("--memory", "2GB")):
        out = f"c{len(more)}"
        how = ("--pairs", 6, "--reference", "relp", "--methods", "atp,relp+ah", "--nodes", "mlp_neuron,mlp_out")
        assert relp("compare", "ioi", *how, *more, "-o", out).code == 0
        tables.append(pd.read_csv(tmp_path / out / "compare.csv").drop(columns="seconds"))
    pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-5)


PEAKS = """
import json, sys, torch
from transformers import GPT2Config, GPT2LMHeadModel
from relp_cli.methods import memory
from relp_cli.models.load import wrap
from relp_cli.models.offload import resident
from relp_cli.costs.rehearsal import peak
from relp_cli.scoring import score
from relp_cli.tasks.pairs import PairBatch

torch.manual_seed(0)
model = wrap(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=128, n_layer=12, n_head=4)), None, "x")
ids = torch.randint(64, (2, 24, 16))
pairs = [PairBatch(ids[0], ids[1], ids[0][:, 0], ids[1][:, 0])]
memory.LIBRARIES["cpu"] = 0
score(model, [pairs[0].rows(slice(0, 1))], "relp", ["mlp_neuron"])  # what is read of libraries when they are first used
for method, nodes, options, free in json.loads(sys.argv[1]):
    limit = resident(model.hf) + free
    with peak(model.device) as found:
        scores = score(model, pairs, method, nodes, keep_examples=False, memory=limit, **options)
    print(json.dumps([found.above, scores.meta["tokens_per_pass"]]), flush=True)
"""


def test_the_peak_of_a_process_stays_below_it() -> None:
    """Measured: what 12 layers of 128 take above what is held, in a process of its own."""
    cases = [
        ["relp", ["mlp_neuron"], {}, 40 << 20],
        ["atp", ["edges"], {}, 30 << 20],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, json.dumps(cases)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for (method, _, _, free), line in zip(cases, done.stdout.splitlines(), strict=True):
        above, tokens = json.loads(line)
        if above != above:
            pytest.skip("this system does not say what a process held at most")
        assert 0.2 * free < above * memory.MIB < free, (method, above, tokens)
