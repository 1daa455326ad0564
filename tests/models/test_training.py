"""The corpus keeps held-out prompts out, training is reproducible, the shipped models do what their cards claim."""

import dataclasses
import json

import pytest
from safetensors.torch import load_file

from relp_cli.models.catalog import EMBEDDED
from relp_cli.models.training import corpus, train
from relp_cli.models.training.shapes import SHAPES
from relp_cli.tasks.generate import Vocabulary, generate
from relp_cli.tasks.spec import list_tasks, read_task
from relp_cli.tasks.task import Task

MUST_SOLVE = ("ioi", "ioi_s2", "ioi_abba", "sva_simple", "sva_within_rc", "sva_across_rc", "sva_across_pp")

DRAWN = {}


@pytest.fixture(scope="module")
def texts():
    return corpus.sentences(0)


@pytest.mark.parametrize("name", list_tasks())
def test_no_held_out_prompt_is_completed_in_the_corpus(texts, name):
    """Checked on the texts themselves: no training sentence begins with a held-out prompt and its answer."""
    task = read_task(name)
    vocabulary = Vocabulary({key: words.rows for key, words in task.lists.items()})
    pairs = [raw.pair for raw in generate(task, vocabulary, 100, 5, "heldout")]
    join = " " if task.spec.join is None else task.spec.join
    completed = tuple(pair.original + join + answer for pair in pairs for answer in pair.answer)
    assert not [text for text in texts if text.startswith(completed)]


def test_each_task_and_the_filler_are_in_the_corpus(texts):
    for start in ("Then, ", "After ", "The ", "So ", "Today ", "Now ", "This ", "These "):
        assert sum(text.startswith(start) for text in texts) > 500


def test_training_is_seeded_and_writes_a_loadable_folder(tmp_path, monkeypatch, texts):
    monkeypatch.setattr(train, "sentences", lambda _: texts[:2000])
    monkeypatch.setitem(train.SETTINGS, "tiny-qwen2", dataclasses.replace(train.Settings(), steps=3, batch=8))
    card = train.make("tiny-qwen2", tmp_path / "a")
    train.make("tiny-qwen2", tmp_path / "b")
    one, two = (load_file(tmp_path / run / "tiny-qwen2" / "model.safetensors") for run in "ab")
    assert one.keys() == two.keys()
    assert all((one[key] == two[key]).all() for key in one)
    assert json.loads((tmp_path / "a" / "tiny-qwen2" / "card.json").read_text()) == card
    assert card["heldout"]["ioi"]["accuracy"] < 0.95  # three steps solve nothing: the card measures, it does not claim


@pytest.fixture
def drawn_once(monkeypatch):
    """Pairs are drawn once for all models whose tokenizers are the same to the letter."""
    draw = Task.pairs

    def pairs(task, model, **how):
        key = (task.hash, model.tokenizer.backend_tokenizer.to_str(), model.bos, *how.items())
        if key not in DRAWN:
            DRAWN[key] = draw(task, model, **how)
        return DRAWN[key]

    monkeypatch.setattr(Task, "pairs", pairs)


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize("name", SHAPES)
def test_shipped_models_solve_what_their_card_says(name):
    folder = EMBEDDED / name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1.5e6
    card = json.loads((folder / "card.json").read_text())
    measured = train.measure(folder)
    for task, row in card["heldout"].items():
        numbers = {key: value for key, value in row.items() if key != "metric"}
        assert {key: measured[task][key] for key in numbers} == pytest.approx(
            numbers, abs=0.01
        )  # other CPUs round apart
    for task in MUST_SOLVE:
        assert measured[task]["accuracy"] >= 0.95
