"""An interrupted scoring goes on where it stopped, and ends in the same numbers and costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.wrapped import case, pairs, run

from relp_cli.errors import RelpError
from relp_cli.jobs.shards import shard_of
from relp_cli.methods import patching
from relp_cli.methods import unfinished as module
from relp_cli.methods.request import Request
from relp_cli.methods.score import score_share
from relp_cli.methods.unfinished import Shard, Unfinished
from relp_cli.spaces.scores import Scores

KINDS = ["resid_pre", "mlp_neuron"]
BATCHES = [pairs(3, 4, roles=("a", "b", "c", "end")), pairs(2, 5, seed=2, roles=("a", "b", "b2", "c", "end"))]
COSTS = (
    "forwards_per_pair",
    "backwards_per_pair",
    "patched_share_computed",
    "patched_share_no_effect",
    "rules",
    "mean_metric",
)


class Stop(Exception):
    """What kills a run."""


@pytest.fixture(autouse=True)
def _written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)
    monkeypatch.setattr(module, "REST", 0.0)


def scored(method: str, store: Unfinished, steps: int | None = None, **options: Any) -> tuple[Any, list[int]]:
    """The scores, or None where they were stopped at a step of progress; and the sizes of the passes that were made."""
    told, passes = [], []
    model = case("gpt2").model

    def progress(done: int, _total: int, what: str) -> None:
        told.append((done, what))
        if len(told) == steps:
            raise Stop

    def logits(tokens: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        passes.append(len(tokens))
        return type(model).logits(model, tokens, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(model), "logits", logits)
        try:
            return run(case("gpt2"), method, KINDS, BATCHES, unfinished=store, progress=progress, **options), passes
        except Stop:
            return None, passes


@pytest.mark.parametrize(("method", "options", "stop"), [
    ("act_patch", {"chunk_tokens": 64}, 11), ("act_patch", {"chunk_tokens": 64}, 60), ("relp", {}, 2), ("atp_star", {}, 2),
    ("act_patch", {"chunk_tokens": 64, "direction": "denoising"}, 60),
])  # fmt: skip
def test_the_rest_is_done_and_the_whole_is_the_same(
    tmp_path: Path, method: str, options: dict[str, Any], stop: int
) -> None:
    whole, every = scored(method, Unfinished(tmp_path / "other", "x"), **options)
    stopped, _ = scored(method, Unfinished(tmp_path / "kept", "x"), stop, **options)
    assert stopped is None
    assert list((tmp_path / "kept").glob("*.safetensors"))
    again, rest = scored(method, Unfinished(tmp_path / "kept", "x"), **options)
    assert sum(rest) < sum(every)
    for kind in KINDS:
        assert torch.equal(again[kind].examples, whole[kind].examples)
        assert torch.equal(again[kind].mean, whole[kind].mean)
    assert {k: again.meta.get(k) for k in COSTS} == {k: whole.meta.get(k) for k in COSTS}


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize(("method", "options"), [("act_patch", {"chunk_tokens": 64}), ("relp+secant", {})])
def test_shards_are_the_whole_to_the_bit(
    tmp_path: Path, method: str, options: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order of shards; every patched run is made once."""
    runs: list[int] = []
    effects = patching._effects

    def counted(on: Any, groups: Any, *more: Any) -> Any:
        runs.append(sum(len(group.example) for group in groups))
        return effects(on, groups, *more)

    monkeypatch.setattr(patching, "_effects", counted)
    whole, _ = scored(method, Unfinished(tmp_path / "whole", "x"), **options)
    every, model = runs[:], case("gpt2").model
    runs.clear()
    for index in reversed(range(count)):
        request = Request(unfinished=Unfinished(tmp_path / "shards", "x", Shard(index, count)))
        waiting = score_share(model, BATCHES, method, KINDS, request, **options)
        assert bool(waiting) == (index > 0)
    assert sorted(runs) == sorted(every)
    runs.clear()
    merged, _ = scored(method, Unfinished(tmp_path / "shards", "x"), **options)
    assert not runs
    for kind in KINDS:
        assert torch.equal(merged[kind].examples, whole[kind].examples)
        assert torch.equal(merged[kind].mean, whole[kind].mean)
    assert {k: merged.meta.get(k) for k in COSTS} == {k: whole.meta.get(k) for k in COSTS}


def test_pieces_with_other_sizes_of_passes_are_not_mixed(tmp_path: Path) -> None:
    for index, size in enumerate((64, 32)):
        request = Request(unfinished=Unfinished(tmp_path, "x", Shard(index, 2)))
        waiting = score_share(case("gpt2").model, BATCHES, "act_patch", KINDS, request, chunk_tokens=size)
        assert waiting == [0, 1]
    again, whole = (scored("act_patch", Unfinished(tmp_path / name, "x"), chunk_tokens=64)[0] for name in ("", "other"))
    assert torch.equal(again["mlp_neuron"].examples, whole["mlp_neuron"].examples)


def test_batches_of_other_sizes_are_of_other_pairs_and_not_read(tmp_path: Path) -> None:
    """As where one process has a GPU, whose batches are larger."""
    request = Request(unfinished=Unfinished(tmp_path, "x", Shard(0, 1)), batch_size=1)
    assert score_share(case("gpt2").model, BATCHES, "relp", KINDS, request) == []
    other = Request(unfinished=Unfinished(tmp_path, "x", Shard(1, 2)))
    assert score_share(case("gpt2").model, BATCHES, "relp", KINDS, other) == [0]
    again, whole = (scored("relp", Unfinished(tmp_path / name, "x"))[0] for name in ("", "other"))
    assert torch.equal(again["mlp_neuron"].examples, whole["mlp_neuron"].examples)


def test_what_waits_to_be_written_does_not_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 1e6)
    monkeypatch.setattr(module, "WAITING", 100)
    store, tensor = Unfinished(tmp_path, "x"), torch.ones(10)  # 40 bytes: two may wait

    def written() -> list[str]:
        return sorted(path.stem for path in tmp_path.glob("*.safetensors"))

    for name in "ab":
        store.put(name, {"t": tensor}, {})
    assert written() == []
    store.put("c", {"t": tensor}, {})
    assert written() == ["a", "b", "c"]
    store._rested = float("inf")  # as if that had taken long
    for name in "defg":
        store.put(name, {"t": tensor}, {})
    store.put("big", {"t": torch.ones(1000)}, {})  # the newest is kept whatever its size
    assert written() == ["a", "b", "c"]
    store.write()
    assert written() == ["a", "b", "big", "c"]


def test_what_another_request_or_half_a_file_left_is_not_read(tmp_path: Path) -> None:
    whole, every = scored("act_patch", Unfinished(tmp_path, "x"))
    for damage in (None, b"half"):
        for path in tmp_path.glob("*.safetensors"):
            path.write_bytes(damage or path.read_bytes())
        again, passes = scored("act_patch", Unfinished(tmp_path, "y" if damage is None else "x"))
        assert passes == every
        assert torch.equal(again["mlp_neuron"].examples, whole["mlp_neuron"].examples)


def test_a_run_leaves_nothing_when_it_is_done(relp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("score", "sva_simple", "--method", "act_patch", "--pairs", 3, "--batch-size", 1, "-o", "run")
    written: list[str] = []
    put = Unfinished.put
    monkeypatch.setattr(Unfinished, "put", lambda self, name, *rest: (written.append(name), put(self, name, *rest))[1])
    assert relp(*command).code == 0
    assert len(set(written)) == 3
    assert not (tmp_path / "run/unfinished").exists()


def test_the_shard_that_ends_last_writes_the_run(relp: Any, tmp_path: Path) -> None:
    command = ("score", "sva_simple", "--method", "act_patch", "--pairs", 5, "--batch-size", 3, "--json")
    assert relp(*command, "-o", "whole").code == 0
    for index in (2, 3, 1):
        shard = relp(*command, "--shard", f"{index}/3", "-o", "run")
        assert shard.code == 0
        assert (tmp_path / "run/run.json").exists() == (index == 1)
        assert ("waiting" in json.loads(shard.out)) == (index != 1)
    one, other = (Scores.load(tmp_path / name / "scores.safetensors") for name in ("whole", "run"))
    assert torch.equal(one.examples, other.examples)
    assert {k: v for k, v in one.meta.items() if k != "seconds"} == {
        k: v for k, v in other.meta.items() if k != "seconds"
    }
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "pairs.json", "run.json", "scores.safetensors",
    ]  # fmt: skip
    assert json.loads(relp(*command, "--shard", "1/3", "-o", "run").out)["cached"]


@pytest.mark.parametrize(("text", "environment", "expected"), [
    ("3/8", {}, (2, 8)), ("1/1", {}, (0, 1)),
    ("auto", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "3",
              "SLURM_ARRAY_TASK_STEP": "2"}, (2, 3)),
    ("auto", {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "4"}, (0, 4)),
    ("0/2", {}, "expected I/N"), ("3/2", {}, "expected I/N"), ("-1/2", {}, "expected I/N"), ("half", {}, "expected I/N"),
    ("auto", {}, "SLURM_ARRAY_TASK_ID"), ("auto", {"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETIONS is not set"),
    ("auto", {"JOB_COMPLETION_INDEX": "4", "JOB_COMPLETIONS": "4"}, "task 5 of 4"),
    ("auto", {"JOB_COMPLETION_INDEX": "one", "JOB_COMPLETIONS": "4"}, "'one', expected a number"),
])  # fmt: skip
def test_which_share_a_process_has(text: str, environment: dict[str, str], expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(RelpError, match=expected):
            shard_of(text, environment)
    else:
        assert shard_of(text, environment) == Shard(*expected)


def test_a_method_of_all_pairs_has_no_shards(relp: Any) -> None:
    for method in ("screened", "relp+auto"):
        refused = relp("score", "ioi", "--method", method, "--shard", "1/2", "-o", "run")
        assert refused.code == 2
        assert "cannot be computed in shards" in refused.err


def test_what_is_agreed_is_waited_for_while_it_is_written_and_decided_again_where_its_writer_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decision is a file that is made in one go, and empty for a moment: what is read then is not another decision."""
    store, path = Unfinished(tmp_path, "digest"), tmp_path / "room-digest.json"
    looks = list[float]()

    def write(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            path.write_text('{"rows": 7}')

    monkeypatch.setattr(module.time, "sleep", write)
    path.write_text("")
    assert store.agreed("room", lambda: {"rows": 8}) == {"rows": 7}
    assert len(looks) == 3
    path.write_text("")
    assert store.agreed("room", lambda: {"rows": 8}) == {"rows": 8} == json.loads(path.read_text())
    assert len(looks) == 3 + module.LOOKS
