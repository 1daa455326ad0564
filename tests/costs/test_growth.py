"""How costs grow: what varies, and that peak memory is what a run holds at most above what was held."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from relp_cli.costs import growth, peaks
from relp_cli.costs.bench import Fixture
from relp_cli.errors import RelpError
from relp_cli.methods.table import METHODS
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
    assert all(row["ratio"] == pytest.approx(row["s"] / row["baseline s"]) and row["MiB"] > 0 for row in rows)
    assert (tmp_path / "cost.png").stat().st_size > 5000


def test_the_table_of_peaks(relp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "LAYERS", 2)
    monkeypatch.setattr(peaks, "FEATURES", 64)
    monkeypatch.setattr(peaks, "PAIRS", 13)  # two batches of 192 tokens and less
    done = relp("bench", "--over", "memory", "--values", "heads,features", "--only", "atp", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert [(row["method"], row["units"]) for row in rows] == [
        ("atp", "heads"), ("atp_star", "heads"), ("atp", "features")
    ]  # fmt: skip
    for row in rows:
        assert row["ended"] == "yes"
        assert row["measured"] > row["held"] > 50
        assert row["ratio"] == pytest.approx(row["predicted"] / row["measured"])
        assert row["ratio"] == pytest.approx(1, abs=0.1)


def test_every_method_has_cells_where_it_is_defined() -> None:
    cells = set(peaks.cells_of(tuple(peaks.UNITS)))
    assert {name for name, _ in cells} == {name for name, row in METHODS.items() if not row.alias_of} | {"relp+secant"}
    assert ("acdc", "edges") in cells
    assert not {("acdc", "heads"), ("atp_star", "features"), ("eap_gp", "neurons")} & cells
    with pytest.raises(RelpError, match="no method of edges has 'atp_star'"):
        peaks.cells_of(("edges",), "atp_star")


def test_what_a_process_cannot_compute_is_said() -> None:
    def fails(_f: Any, _method: str, _units: str) -> None:
        raise ValueError("no")

    def ends(_f: Any, _method: str, _units: str) -> None:
        os._exit(9)

    with pytest.raises(RelpError, match="atp on heads: no"):
        peaks._apart(fails, None, "atp", "heads")
    with pytest.raises(RelpError, match="its process ended"):
        peaks._apart(ends, None, "atp", "heads")
    table = pd.DataFrame({"method": ["a", "b"], "units": ["heads"] * 2, "ratio": [1.2, 0.7]})
    assert list(peaks.outside(table)) == ["b, heads: 0.70"]


@pytest.mark.parametrize(("options", "message"), [
    (("--over", "memory", "--values", "head"), "did you mean 'heads'?"),
    (("--over", "memory", "--plot", "x.png"), "leave --plot"),
    (("--over", "layer"), "did you mean 'layers'?"), (("--over", "layers", "--values", "0"), "got '0'"),
    (("--over", "shape", "--values", "gtp2"), "did you mean 'gpt2'?"), (("--plot", "x.png"), "belong to --over"),
    (("--over", "pairs", "--plot", "x.gif"), "unknown file ending"), (("--over", "pairs", "--only", "relp"), "leave --only"),
])  # fmt: skip
def test_what_does_not_vary_is_refused(relp: Any, options: tuple[str, ...], message: str) -> None:
    done = relp("bench", *options)
    assert (done.code, message in done.err) == (2, True)
