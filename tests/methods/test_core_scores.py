"""Score files: what is saved comes back, and anything else is one clear failure."""

import json
import os

import pytest
import torch
from oracles.wrapped import case, pairs, run
from safetensors import safe_open
from safetensors.torch import save_file

from relp_cli.errors import RelpError, RunFailed
from relp_cli.scoring import score
from relp_cli.spaces.scores import SIGN, Scores

SHORT, LONG = ("bos", "subject", "end"), ("bos", "subject", "that", "end")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    batches = [pairs(2, 3, roles=SHORT), pairs(3, 4, roles=LONG)]
    got = score(
        case("gpt2", dtype=torch.float32).model, batches, "relp", ["mlp_out", "head"], rules=["ln", "gamma=0.5"]
    )
    path = tmp_path_factory.mktemp("scores") / "deep" / "scores.safetensors"
    got.save(path)
    return got, path


def test_round_trip(saved):
    got, path = saved
    again = Scores.load(path)
    assert list(again) == ["mlp_out", "head"]
    assert again.meta == got.meta
    assert again.meta["rules"] == {"ln": 7, "gamma=0.5": 18}
    for kind in got:
        for name in ("mean", "variance", "n", "examples", "present"):
            assert torch.equal(getattr(again[kind], name), getattr(got[kind], name)), name
        for name in ("kind", "labels", "axis", "meta"):
            assert getattr(again[kind], name) == getattr(got[kind], name), name
    assert again["head"].n.tolist() == [5, 5, 3, 5]
    assert again["head"].axis == "role"
    assert [p.name for p in path.parent.iterdir()] == ["scores.safetensors"]
    with pytest.raises(RelpError, match="unknown node kind in these scores 'heads'; did you mean 'head'"):
        again["heads"]


def test_without_examples(tmp_path):
    got = run(case("gpt2"), "atp", ["mlp_neuron"], keep_examples=False)
    got.save(tmp_path / "s")
    again = Scores.load(tmp_path / "s")["mlp_neuron"]
    assert again.examples is None
    assert again.present is None
    assert torch.equal(again.mean, got["mlp_neuron"].mean)
    assert again.n_nodes == 3 * 6 * 48


def test_the_header_says_what_the_numbers_mean(saved):
    with safe_open(str(saved[1]), "pt") as stream:
        header = json.loads(stream.metadata()["relp"])
    assert header["sign"] == SIGN
    assert header["schema"] == 1
    for key in ("method", "params", "metric", "direction", "baseline", "model", "revision", "family", "dtype", "axis"):
        assert key in header["meta"], key


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],
    lambda data: data[:5],
    lambda _: b"",
    lambda _: b"no safetensors at all, only a text",
    lambda data: data.replace(b'\\"schema\\": 1', b'\\"schema\\": 9'),
    lambda data: data.replace(b'"relp"', b'"plre"'),
], ids=["half", "start", "empty", "text", "schema", "header"])  # fmt: skip
def test_damaged_files_fail_clearly(saved, tmp_path, damage):
    path = tmp_path / "s"
    data = saved[1].read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    with pytest.raises(RunFailed, match=f"score file {path}") as error:
        Scores.load(path)
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)


def test_other_files_fail_clearly(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    for name in ("other", "missing"):
        with pytest.raises(RunFailed, match="score file"):
            Scores.load(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(saved, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RelpError, match="cannot write"):
        saved[0].save(tmp_path / "s")


def test_a_file_in_place_of_a_folder(saved, tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(RelpError, match="cannot write"):
        saved[0].save(tmp_path / "f" / "s")
