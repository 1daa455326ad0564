"""Figure 3's jobs: the shipped one on tiny-pythia, and the real one on a random model of Pythia-70M's shape."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from relp_cli.errors import RelpError
from relp_cli.features.kinds import FEATURE_KINDS
from relp_cli.jobs.collecting import collect
from relp_cli.jobs.grid import JobSpec, cells, load_job
from relp_cli.jobs.run import run_cells
from relp_cli.jobs.summary import summarise
from relp_cli.models.catalog import EMBEDDED
from relp_cli.runs.scoring import Session

from .folders import write_all_sites

SMALL = [
    "tasks=[sva_across_pp]",
    "pairs=6",
    "evaluate.heldout=6",
    "evaluate.sweep=counts:1,20",
]


def run(job: JobSpec, folder: Path) -> tuple[pd.DataFrame, list[Path], int]:
    outcome = run_cells(job, folder, Session("cpu"))
    result = collect(outcome.paths)
    assert not result.errors
    return result.rows, summarise(job, result.rows, folder)[0], outcome.computed


@pytest.fixture(scope="module")
def pythia_shape(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model with 6 layers of width 512 (and tiny-pythia's words), and dictionaries in Marks et al.'s folders."""
    root = tmp_path_factory.mktemp("pythia")
    model = root / "pythia-70m-shape"
    shutil.copytree(EMBEDDED / "tiny-pythia", model)
    (model / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=489, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, bos_token_id=0,
        eos_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(model)
    return model, write_all_sites(root / "dictionaries" / "pythia-70m-deduped", 6, 512, 96, "10_96")


def test_figure3_on_tiny_pythia(tmp_path: Path) -> None:
    job = load_job("figure3_features_tiny", [*SMALL, "evaluate.random_circuits=1"])
    rows, files, computed = run(job, tmp_path)
    assert computed == len(cells(job)) == 10
    assert tmp_path / "figure3-tiny-pythia.png" in files
    features = rows[rows.kind == "feature"]
    assert features.n_nodes.tolist() == [1, 20] * 2
    assert features.faithfulness.notna().all()
    relp, ig = (rows[(rows.method == m) & (rows.kind == "feature")].iloc[0] for m in ("relp", "ig_activations"))
    assert (relp.forwards_per_pair, relp.backwards_per_pair) == (2, 1)
    assert (ig.forwards_per_pair, ig.backwards_per_pair) == (132, 130)  # 10 steps at each of 13 sites
    assert run_cells(job, tmp_path, Session("cpu")).computed == 0  # all found finished


def test_figure3_on_the_shape_of_the_real_thing(pythia_shape: tuple[Path, Path], tmp_path: Path) -> None:
    model, dictionaries = pythia_shape
    job = load_job(
        "figure3_features",  # no random circuits
        [
            *SMALL,
            "pairs=3",
            f"models=[{model}]",
            f"dictionary={dictionaries}",
            "params.ig_activations.steps=2",
        ],
    )
    rows, files, _ = run(job, tmp_path)
    assert set(rows.kind) == {*FEATURE_KINDS, "mlp_neuron", "attn_dim+mlp_dim+resid_dim"}
    possible = rows.groupby("kind").n_possible.first()
    positions = possible["mlp_neuron"] // (4 * 2048)  # layers 2 to 5 of 6
    assert possible["feature"] == 12 * positions * 97
    assert possible["feature_no_attn_mlp_errors"] == 12 * positions * 96 + 4 * positions
    assert possible["feature_no_errors"] == 12 * positions * 96
    assert possible["attn_dim+mlp_dim+resid_dim"] == 12 * positions * 512
    assert (rows.exclude_layers == 2).all()
    assert any(f.name.startswith("figure3-") and f.name.endswith("pythia-70m-shape.png") for f in files)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dictionary=null"], "needs `dictionary:`"),
        (["agreement={reference: act_patch}", "kinds=[feature]"], "`agreement:` is not for feature"),
        (["kinds=[mlp_out+feature_x]"], "feature_x"),
    ],
)
def test_bad_jobs_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(RelpError, match=message):
        load_job("figure3_features_tiny", overrides)
