"""How costs grow: what varies, and that peak memory is what a run holds at most above what was held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from relp_cli.runs import growth
from relp_cli.runs.bench import Fixture
from relp_cli.tasks.pairs import PairBatch


def test_peak_memory_is_what_a_run_needs_at_once() -> None:
    kept = torch.ones(1 << 22)

    def run(_: Any) -> None:
        for _turn in range(3):  # one after the other: 48 MiB at a time
            torch.ones(12 << 20).add_(1)

    batch = PairBatch(*torch.zeros(2, 1, 1, dtype=torch.long), *torch.zeros(2, 1, dtype=torch.long))
    peak = growth._peak(run, Fixture(None, None, batch))  # type: ignore[arg-type]
    assert peak == pytest.approx(48, abs=3)
    assert kept.sum() == 1 << 22


def test_growth_over_shapes(relp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "ROWS", ("relp",))
    done = relp("bench", "--over", "shape", "--values", "tiny", "--rounds", 1, "--plot", "cost.png", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert [row["shape"] for row in rows] == ["tiny"]
    assert all(row["ratio"] == pytest.approx(row["s"] / row["baseline s"]) and row["MB"] > 0 for row in rows)
    assert (tmp_path / "cost.png").stat().st_size > 5000


@pytest.mark.parametrize(("options", "message"), [
    (("--over", "layer"), "did you mean 'layers'?"), (("--over", "layers", "--values", "0"), "got '0'"),
    (("--over", "shape", "--values", "gtp2"), "did you mean 'gpt2'?"), (("--plot", "x.png"), "belong to --over"),
    (("--over", "pairs", "--plot", "x.gif"), "unknown file ending"), (("--over", "pairs", "--only", "relp"), "leave --only"),
])  # fmt: skip
def test_what_does_not_vary_is_refused(relp: Any, options: tuple[str, ...], message: str) -> None:
    done = relp("bench", *options)
    assert (done.code, message in done.err) == (2, True)
