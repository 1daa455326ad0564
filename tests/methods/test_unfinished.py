"""An interrupted scoring goes on where it stopped, and ends in the same numbers and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.wrapped import case, pairs, run

from relp_cli.methods import unfinished as module
from relp_cli.methods.unfinished import Unfinished

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
