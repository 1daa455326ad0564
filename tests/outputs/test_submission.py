"""`relp export --format mib`: the files say what the scores are, in MIB's layout, and what MIB would not take is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relp_cli.edges.exchange import import_circuit, import_writers
from relp_cli.errors import RelpError
from relp_cli.outputs import submission
from relp_cli.outputs.submission import MODELS, checked_folder, checked_submission
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.scores import Scores

KEYS = {"cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph"}


@pytest.fixture
def scored(relp: Callable[..., Any], tmp_path: Path) -> Callable[..., Scores]:
    def run(nodes: str, name: str, *more: str) -> Scores:
        done = relp("score", "ioi", "--method", "atp", "--nodes", nodes, "--pairs", "4", "-o", name, *more)
        assert done.code == 0, done.err
        return Scores.load(tmp_path / name / "scores.safetensors")

    return run


def test_edges(scored: Callable[..., Scores], relp: Callable[..., Any], tmp_path: Path) -> None:
    scores = scored("edges", "run")
    done = relp("export", "run", "sub", "--format", "mib", "--as", "ioi_tiny", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    graph = scores.units.structure
    assert told["folders"][0] | {"MB": 0} == {"folder": "ioi_tiny", "level": "edge", "scored": graph.n_edges, "MB": 0}
    assert any("at least 2 tasks" in line for line in told["notes"])
    assert any("has no model tiny (it has gpt2, qwen2.5, gemma2, llama3)" in line for line in told["notes"])
    content = torch.load(told["file"], weights_only=True)
    assert set(content) == KEYS
    assert not content["edges_in_graph"].any()  # MIB chooses by score
    torch.testing.assert_close(content["edges_scores"], -scores["edges"].mean.float())  # support is positive there
    torch.testing.assert_close(import_circuit(told["file"])[1].mean, scores["edges"].mean, rtol=1e-6, atol=1e-9)
    assert [path.name for path in (tmp_path / "sub" / "ioi_tiny").iterdir()] == ["importances.pt"]
    again = relp("export", "run", "sub", "--format", "mib", "--as", "mcqa_gpt3")
    assert again.code == 0
    assert "2 folders, valid" in again.out


def test_scores_of_edges_per_position_are_summed(scored: Callable[..., Scores], relp: Callable[..., Any]) -> None:
    summed = scored("edges", "sum")
    scored("edges", "keep", "--set", "positions=keep")
    done = relp("export", "keep", "sub", "--format", "mib", "--as", "ioi_tiny", "--json")
    found = torch.load(json.loads(done.out)["file"], weights_only=True)["edges_scores"]
    torch.testing.assert_close(found, -summed["edges"].mean.float(), rtol=1e-4, atol=1e-5)


def test_components_and_neurons(scored: Callable[..., Scores], relp: Callable[..., Any]) -> None:
    nodes, dims = scored("head,mlp_out", "nodes"), scored("mlp_dim", "dims")
    for run in ("nodes", "dims"):
        assert relp("export", run, f"sub-{run}", "--format", "mib", "--as", "ioi_tiny").code == 0
    graph, found = import_writers(Path("sub-nodes/ioi_tiny/importances.pt"))
    assert found is not None
    assert found[0].isnan()  # the input is not scored, and stays
    for name, kind, at in (("a1.h2", "head", (1, slice(None), 2)), ("m3", "mlp_out", (3,))):
        assert found[graph.writer(name)] == pytest.approx(-nodes[kind].mean[at].sum().item(), rel=1e-5)
    assert int(found.isnan().sum()) == 1
    graph, found = import_writers(Path("sub-dims/ioi_tiny/importances.pt"))
    assert found is not None
    torch.testing.assert_close(found[graph.writer("m2")], -dims["mlp_dim"].mean[2].sum(0).float(), rtol=1e-4, atol=1e-6)
    assert (~found.isnan()).any(1).sum() == graph.n_layers
    assert checked_folder(Path("sub-dims/ioi_tiny"))["level"] == "neuron"
    content = torch.load("sub-dims/ioi_tiny/importances.pt", weights_only=True)
    assert set(content) == KEYS | {"neurons_scores", "neurons_in_graph"}


def test_graphs_of_the_leaderboard() -> None:
    sizes = {name: Graph(row.n_layers, row.n_heads).n_edges for name, row in MODELS.items()}
    assert sizes == {"gpt2": 32491, "qwen2.5": 179749, "gemma2": 74218, "llama3": 1592881}


BAD_NAMES = [
    ((), "MIB's leaderboard has no model 'tiny-gpt2'; name the folder that it is for: --as ioi_gpt2"),
    (("--as", "ioi"), "expected task_model, for example ioi_gpt2"),
    (("--as", "../ioi_x"), "expected task_model"),
    (("--as", "ioy_gpt2"), "unknown task 'ioy'; did you mean 'ioi'"),
    (("--as", "ioi_gpt2"), "gpt2 has 12 layers of 12 heads, these scores are of 4 layers of 4"),
]


def test_names_from_the_run_and_names_that_are_none(
    scored: Any, relp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored("edges", "run")
    for arguments, says in BAD_NAMES:
        done = relp("export", "run", "sub", "--format", "mib", *arguments)
        assert done.code == 2
        assert says in done.err
    assert not (tmp_path / "sub").exists()
    monkeypatch.setitem(MODELS, "tiny", submission.Submitted("tiny-gpt2", 4, 4))
    done = relp("export", "run", "sub", "--format", "mib", "--json")
    assert json.loads(done.out)["folders"][0]["folder"] == "ioi_tiny"


def test_what_mib_would_not_take(scored: Any, relp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored("mlp_neuron", "neurons")
    done = relp("export", "neurons", "sub", "--format", "mib", "--as", "ioi_tiny")
    assert (
        "MIB's files hold no scores of mlp_neuron; expected a run of --nodes edges or head,mlp_out or mlp_dim"
        in done.err
    )
    assert "did you mean 'mib'" in relp("export", "neurons", "sub", "--format", "mip").err
    assert "goes with --format mib" in relp("export", "neurons", "a.pt", "--as", "ioi_tiny").err
    scored("edges", "run")
    with monkeypatch.context() as small:
        small.setattr(submission, "MOST_BYTES", 100)
        done = relp("export", "run", "sub", "--format", "mib", "--as", "ioi_tiny")
        assert done.code == 2
        assert "MB, MIB takes" in done.err
        assert not list((tmp_path / "sub").iterdir())
    assert relp("export", "run", "sub", "--format", "mib", "--as", "ioi_tiny").code == 0
    folder = tmp_path / "sub" / "ioi_tiny"
    content = torch.load(folder / "importances.pt", weights_only=True)
    for change, says in (
        ({"nodes_scores": torch.zeros(3)}, r"nodes_scores of shape \[3\], expected \[21\]"),
        ({"nodes_scores": torch.full((21,), torch.nan)}, "nodes_scores has no score"),
        ({"nodes_scores": torch.full((21,), torch.inf)}, "nodes_scores has an infinite score"),
        ({"nodes_scores": torch.ones(21)}, "all scores are 1; they rank nothing"),
        ({"edges_scores": torch.zeros_like(content["edges_scores"])}, "all scores are 0"),
    ):
        torch.save(content | change, folder / "importances.pt")
        with pytest.raises(RelpError, match=says):
            checked_submission(tmp_path / "sub")
    (folder / "more.json").write_text("{}")
    with pytest.raises(RelpError, match=r"2 files that end in \.pt or \.json; expected one file of scores"):
        checked_submission(tmp_path / "sub")
    done = relp("export", "run", "sub", "--format", "mib", "--as", "ioi_tiny")
    assert "holds more.json already" in done.err
