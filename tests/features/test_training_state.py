"""`train-dictionary` cut short, run again, run with other settings, and given what cannot be."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from relp_cli.errors import RelpError
from relp_cli.features import trainset
from relp_cli.features.load import load_dictionaries
from relp_cli.features.saelens import load_saelens, save_saelens
from relp_cli.features.train import TrainSpec, train_dictionary
from relp_cli.features.trainset import train_dictionaries
from relp_cli.models.load import load_model
from relp_cli.models.model import Model
from relp_cli.spaces.sites import Site

SITES = (Site("mlp", 1), Site("resid", 1))
SPEC = TrainSpec(features=12, k=2, steps=2, batch=16)


@cache
def model() -> Model:
    return load_model("tiny-pythia", device="cpu")


def text(count: int) -> list[str]:
    ids = torch.randint(5, 100, (count, 6), generator=torch.Generator().manual_seed(0))
    return [model().tokenizer.decode(row) for row in ids]


def train(folder: Path, spec: TrainSpec = SPEC, lines: int = 20) -> list[str]:
    """The sites that were trained."""
    trained: list[str] = []

    def progress(_done: int, _total: int, _what: str) -> None:
        trained.append("site")

    train_dictionaries(model(), text(lines), SITES, spec, folder, progress)
    return trained


def test_a_run_that_was_cut_short_goes_on_and_a_finished_one_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def killed(folder: Path, *rest: object) -> None:
        save_saelens(folder, *rest)  # type: ignore[arg-type]
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt  # between the files and the rename

    with monkeypatch.context() as patch:
        patch.setattr(trainset, "save_saelens", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "a")
    assert list(load_dictionaries(tmp_path / "a", model())) == [SITES[0]]
    assert len(train(tmp_path / "a")) == 1
    assert train(tmp_path / "a") == []
    assert len(train(tmp_path / "b")) == 2
    one, other = (load_dictionaries(tmp_path / name, model()) for name in "ab")
    assert one.digest == other.digest
    assert (tmp_path / "a/card.json").read_bytes() == (tmp_path / "b/card.json").read_bytes()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"card.json", *(s.name for s in SITES)}


def test_a_folder_of_other_settings_is_left_alone(tmp_path: Path) -> None:
    train(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for spec, lines, message in (
        (SPEC.model_copy(update={"k": 3}), 20, "holds dictionaries with k 2, not 3"),
        (SPEC, 21, "trained on another text"),
    ):
        with pytest.raises(RelpError, match=message):
            train(tmp_path, spec, lines)
    (tmp_path / "card.json").unlink()
    with pytest.raises(RelpError, match="mlp_out_layer1 is there already, and was not trained with these settings"):
        train(tmp_path, SPEC.model_copy(update={"k": 3}))
    for card in ("[]", '{"revision": [], "spec": {}, "sites": []}', "[" * 100_000, "\xff"):
        (tmp_path / "card.json").write_text(card, encoding="latin-1")
        with pytest.raises(RelpError, match=r"card\.json"):
            train(tmp_path)
        (tmp_path / "card.json").unlink()
    assert before.items() >= {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}.items()


def test_large_activations_are_saved_as_they_are(tmp_path: Path) -> None:
    """Half precision ends at 65,504."""
    x = 3e5 + 1e5 * torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    found = train_dictionary(x, SPEC)
    save_saelens(tmp_path / "sae", found, "blocks.1.hook_mlp_out", "any", {})
    again, _ = load_saelens(tmp_path / "sae")
    assert torch.equal(again.b_dec, found.b_dec)
    assert found.b_dec.abs().max() > 65_504


def test_what_cannot_be_is_said_before_a_model_is_loaded(relp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_args: object, **_options: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("relp_cli.models.load.load_model", load)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/card.json").write_text("[]")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 30)
    for arguments, message in (
        (("--steps", 0), "'--steps': Input should be greater than or equal to 1 (got '0')"),
        (("--steps", -3), "--steps"),
        (("--lr", "inf"), "--lr: Input should be a finite number, got inf"),
        (("--lr", "nan"), "--lr: Input should be"),
        (("--l1", "inf"), "--l1: Input should be a finite number"),
        (("--features", 0), "--features"),
        (("--features", 10**12), "--features"),
        (("--k", 0), "--k"),
        (("--k", 9, "--features", 8), "k = 9 is more than 8 features"),
        (("--batch", 10**12), "--batch"),
        (("--seed", -1), "--seed"),
        (("--seed", 2**64), "--seed"),
        (("--lines", -5), "'--lines': Input should be greater than or equal to 1 (got '-5')"),
        (("--lines", 5), "at least 20 lines of text: --lines, got 5"),
        (("--sites", "residual"), "unknown site 'residual'"),
        (("--text", "nowhere.txt"), "text nowhere.txt cannot be read: No such file or directory"),
        (("--text", "empty.txt"), "text empty.txt has no text"),
        (("-o", "old"), "old/card.json: expected a JSON object, got list"),
        (("--text", "latin.txt"), "text latin.txt cannot be read"),
    ):
        done = relp("train-dictionary", "-o", "mine", *arguments)
        assert (done.code, done.out) == (2, ""), (arguments, done.err)
        assert message in done.err
        assert done.err.count("\n") == 1
    assert not (tmp_path / "mine").exists()


def test_lines_of_one_token_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(RelpError, match=r"at least 20 lines of text of two tokens or more, got 0"):
        train_dictionaries(model(), ["king"] * 30, SITES, SPEC, tmp_path / "new")
    assert not (tmp_path / "new").exists()
