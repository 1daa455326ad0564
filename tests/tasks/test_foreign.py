"""Token ids of another tokenizer: read as text, encoded anew, or refused; never used as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from relp_cli.errors import RelpError
from relp_cli.tasks.task import load_task
from tests.tasks.helpers import Fake, metaspace, pieces, word_level, write

WORDS = ["The", "dog", "dogs", "cat", "is", "are", "has", "17", "33", "32", "to"]
TEXTS = [("The dog", "The cat", "is", "are"), ("The cat", "The dog", "are", "is"), ("The dogs", "The dog", "has", "is")]
OWN = Fake(word_level(WORDS), bos=0, name="own")


def by_bytes(words: list[str], bare: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = pieces(words, bare)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def by_metaspace(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = metaspace(words)
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


SOURCES = {
    "words in another order": lambda: word_level(WORDS[::-1]),
    "GPT-2's scheme": lambda: by_bytes(WORDS, ["The"]),
    "Llama's scheme": lambda: by_metaspace(WORDS),
}


def ids_in(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def saved(tokenizer, folder: Path) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def batches(path: Path, model: Fake = OWN, **how) -> list[tuple]:
    found = load_task(path).pairs(model, n=None, split="all", **how)
    return sorted(
        row for b in found for row in zip(*(t.tolist() for t in (b.original, b.patch, b.answer, b.foil)), strict=True)
    )


@pytest.mark.parametrize("scheme", SOURCES)
@pytest.mark.parametrize("prompts", ["text", "ids"])
def test_ids_become_the_pairs_that_the_texts_are(tmp_path, scheme, prompts):
    source = SOURCES[scheme]()
    name = saved(source, tmp_path / "theirs")
    rows = []
    for original, patch, answer, foil in TEXTS:
        following = [ids_in(source, f"{original} {word}")[len(ids_in(source, original)) :] for word in (answer, foil)]
        assert all(len(ids) == 1 for ids in following)
        row = (
            {"o": original, "p": patch}
            if prompts == "text"
            else {"o": ids_in(source, original), "p": ids_in(source, patch)}
        )
        rows.append(row | {"y": following[0][0], "n": following[1]})
    write(tmp_path, "f.jsonl", "\n".join(map(json.dumps, rows)))
    end = "" if prompts == "text" else "_ids"
    columns = f"{{original{end}: o, patch{end}: p, answer_id: y, foil_id: n}}"
    path = write(tmp_path, "t.yaml", f"name: t\npairs: f.jsonl\nids_of: {name}\ncolumns: {columns}\n")
    ours = [dict(zip(("original", "patch", "answer", "foil"), row, strict=True)) for row in TEXTS]
    assert batches(path) == batches(write(tmp_path, "own.jsonl", "\n".join(map(json.dumps, ours))))
    notes = load_task(path).build(OWN, n=None, split="all").notes
    assert any(f"token ids of {name}, taken for own through their text" in note for note in notes)
    # Where the vocabulary is the very same, ids are ids.
    same = Fake(SOURCES[scheme](), name="same")
    row = batches(path, same)
    assert sorted(a for *_, (a,), _ in row) == sorted(r["y"] for r in rows)


def test_digits_that_go_on_with_the_last_word(tmp_path):
    source = by_bytes(["17", "to"], ["33", "32", "1733"])
    name = saved(source, tmp_path / "theirs")
    token = ids_in(source, "33")
    row = {"original": "x 17 32 to 17", "patch": "y 17 33 to 17", "answer_id": token, "foil_id": ids_in(source, "32")}
    write(tmp_path, "f.jsonl", json.dumps(row))
    path = write(tmp_path, "t.yaml", f"name: t\npairs: f.jsonl\nids_of: {name}\n")
    model = Fake(word_level([*WORDS, "x", "y"]), name="own")
    ((_, _, answer, foil),) = batches(path, model)
    vocabulary = model.tokenizer.get_vocab()
    assert (answer, foil) == ([vocabulary["33"]], [vocabulary["32"]])


def test_what_does_not_come_back_is_refused_or_counted(tmp_path):
    source = by_bytes(["dog", "is", "are"], ["The"])
    name = saved(source, tmp_path / "theirs")
    vocabulary = source.get_vocab()
    good = {"original": "The dog", "patch": "The cat", "answer_id": vocabulary["Ġis"], "foil_id": vocabulary["Ġare"]}
    wrong = {
        "no text": ({"answer_id": vocabulary["Ã"]}, r"token \d+ of .*theirs is no text by itself"),
        "not there": ({"foil_id": 99999}, r"theirs has no token 99999"),
        "two tokens of ours": ({"answer_id": vocabulary["Ġi"]}, r"not a single token of own|not in the vocabulary"),
    }  # fmt: skip
    for i, (change, expected) in enumerate(wrong.values()):
        row = {**good, "original": "The dogs", **change}
        write(tmp_path, "f.jsonl", json.dumps(good) + "\n" + json.dumps(row))
        path = write(tmp_path, f"t{i}.yaml", f"name: t\npairs: f.jsonl\nids_of: {name}\n")
        with pytest.raises(RelpError, match=expected + ".*`--unusable drop` leaves"):
            batches(path)
        built = load_task(path).build(OWN, n=None, split="all", unusable="drop")
        assert built.dropped == {"pairs": (1, 1)}
        assert any("1 of 2 pairs dropped, the first: " in note for note in built.notes)
    write(tmp_path, "f.jsonl", json.dumps(row))
    with pytest.raises(RelpError, match="none of 1 pairs fits own, the first: "):
        load_task(path).build(OWN, n=None, split="all", unusable="drop")


def test_ids_of_nobody_are_shown_as_what_they_are_taken_for(tmp_path):
    row = {"original": "The dog", "patch": "The cat", "answer_id": 6, "foil_id": 7}
    path = write(tmp_path, "f.jsonl", json.dumps(row))
    notes = load_task(path).build(OWN, n=None, split="all").notes
    assert any(
        n.startswith("WARNING: the file's token ids are taken as own's own (6 is 'is', 7 is 'are')") for n in notes
    )
    write(tmp_path, "f.jsonl", json.dumps({**row, "foil_id": len(OWN.tokenizer)}))
    with pytest.raises(
        RelpError, match=r"f\.jsonl:1: token id 13: own has 13 tokens; whose id is it\? .*--ids-of MODEL"
    ):
        batches(path)


def test_ids_of_by_option(tmp_path):
    source = word_level(WORDS[::-1])
    name, there = saved(source, tmp_path / "theirs"), source.get_vocab()
    row = {"original": "The dog", "patch": "The cat", "answer_id": there["is"], "foil_id": there["are"]}
    task = load_task(write(tmp_path, "f.jsonl", json.dumps(row)))
    (batch,) = task.with_ids_of(name).pairs(OWN, n=None, split="all")
    here = OWN.tokenizer.get_vocab()
    assert (batch.answer.tolist(), batch.foil.tolist()) == ([[here["is"]]], [[here["are"]]])
    assert task.with_ids_of(None) is task
    with pytest.raises(RelpError, match="--ids-of other: task 'f' says that its token ids are those of"):
        task.with_ids_of(name).with_ids_of("other")
    texts = {"original": "The dog", "patch": "The cat", "answer": "is", "foil": "are"}
    with pytest.raises(RelpError, match="--ids-of gpt2: task 'f' holds no token ids"):
        load_task(write(tmp_path, "f.jsonl", json.dumps(texts))).with_ids_of("gpt2")


def test_the_tokenizer_is_part_of_the_task(tmp_path):
    saved(word_level(WORDS), tmp_path / "theirs")
    row = {"original": "The dog", "patch": "The cat", "answer_id": 6, "foil_id": 7}
    write(tmp_path, "f.jsonl", json.dumps(row))
    path = write(tmp_path, "t.yaml", "name: t\npairs: f.jsonl\nids_of: theirs\n")
    before = load_task(path).hash
    saved(word_level(WORDS[::-1]), tmp_path / "theirs")
    assert load_task(path).hash != before
    with pytest.raises(RelpError, match=r"no embedded model, local folder or hub name|does not exist"):
        batches(write(tmp_path, "u.yaml", "name: t\npairs: f.jsonl\nids_of: ./nothing\n"))
