"""What a pair file, a word list or a task YAML may not be: one line with file, line and key, and never a hang."""

import json
import time

import pytest

from relp_cli.errors import RelpError
from relp_cli.tasks.source import read_source
from relp_cli.tasks.task import load_task
from tests.tasks.helpers import SWAP, SWAP_WORDS, Fake, swap_task, word_level, write

WORDS = ["Ann", "Bob", "Cid", "was", "sad", "so", "she", "he"]
MODEL = Fake(word_level(WORDS), bos=0)
TEXT = {"original": "Ann was sad so", "patch": "Bob was sad so", "answer": "she", "foil": "he"}
LINE = json.dumps(TEXT)
DEEP = "[" * 100_000 + "]" * 100_000
STEPS = zip("abcdefghi", "bcdefghij", strict=True)
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in STEPS)


def refused(path, expected: str) -> str:
    started = time.process_time()
    with pytest.raises(RelpError, match=expected) as caught:
        load_task(path).pairs(MODEL, n=1, split="all")
    assert time.process_time() - started < 3
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


PAIR_FILES = {
    "a.jsonl": {
        "duplicate key": (f'{LINE}\n{LINE[:-1]}, "answer": "he"}}', r"a\.jsonl:2: duplicate key 'answer'"),
        "nested duplicate": (LINE[:-1] + ', "roles": {"S": [0, 3], "S": [4, 7]}}', r"a\.jsonl:1: duplicate key 'S'"),
        "digits": (LINE + "\n" + LINE[:-1] + ', "x": ' + "9" * 5000 + "}", r"a\.jsonl:2: a number of too many digits"),
        "depth": (LINE + "\n" + LINE[:-1] + f', "x": {DEEP}}}', r"a\.jsonl:2: nested too deeply"),
        "list": (f"{LINE}\n[{LINE}]", r"a\.jsonl:2: expected a JSON object"),
        "long value": (json.dumps({**TEXT, "answer": [[1] * 5000]}), r"a\.jsonl:1: answer: expected text or a list"),
        "role bos": (json.dumps({**TEXT, "roles": {"bos": [0, 3]}}), r"a\.jsonl:1: roles: two positions .* called 'bos'"),
        "role end": (json.dumps({**TEXT, "roles": {"end": [0, 3]}}), r"a\.jsonl:1: roles: two positions .* called 'end'"),
        "role start": (json.dumps({**TEXT, "roles": {"start": [4, 7]}}), r"a\.jsonl:1: roles: .* called 'start'"),
        "role of a role": (
            json.dumps({**TEXT, "roles": {"S": [0, 7], "S.1": [8, 11]}}), r"a\.jsonl:1: roles: .* called 'S\.1'"),
        "label bos": (json.dumps({**TEXT, "roles": ["bos", "a", "b", "c"]}), r"a\.jsonl:1: roles: 'bos' is the BOS"),
        "no token": (
            json.dumps({**TEXT, "roles": {"S": [0, 3], "T": [1, 2]}}), r"a\.jsonl:1: roles: 'T' \[1, 2\] has no token"),
        "other split": (
            json.dumps({**TEXT, "split": "discovery"}) + "\n" + json.dumps({**TEXT, "split": "heldout"}),
            r"a\.jsonl:2: split: the pair of .*a\.jsonl:1 again, with another split",
        ),
        "other roles": (LINE + "\n" + json.dumps({**TEXT, "roles": {"S": [0, 3]}}), r"a\.jsonl:2: roles: the pair of"),
    },
    "a.json": {
        "duplicate key": ("[\n" + LINE + ",\n" + LINE[:-1] + ', "foil": "x"}]', r"a\.json:3: duplicate key 'foil'"),
        "outer duplicate": (
            '{"prompts": [],\n"prompts": [' + LINE + "]}", r"a\.json:2: duplicate key 'prompts'"),
        "inner duplicate": (
            '{"word_idxs": {"a": 1, "a": 2},\n"prompts": [' + LINE + "]}", r"a\.json:1: duplicate key 'a'"),
        "digits": ("[\n" + LINE + ",\n{\"x\": " + "9" * 5000 + "}]", r"a\.json:3: a number of too many digits"),
        "depth": (DEEP, r"a\.json:1: nested too deeply"),
        "object": ('{"prompts": {"a": 1}}', r"a\.json:1: expected JSON-lines, a list of records"),
        "nothing": ("3", r"a\.json:1: expected JSON-lines"),
        "empty": ("", r"a\.json:1: not valid JSON"),
        "list of lists": (f"[\n[{LINE}]]", r"a\.json:2: expected a JSON object"),
    },
    "a.csv": {
        "column": ("clean,clean,corrupted,correct_idx,incorrect_idx\na,a,b,1,2\n", r"a\.csv:1: column 'clean' occurs twice"),
        "cells": ("clean,corrupted,correct_idx,incorrect_idx\na,b,1\n", r"a\.csv:2: expected 4 cells"),
        "huge cell": ("clean,corrupted\n" + "a" * 200_000 + ",b\n", r"a\.csv:\d: not valid CSV: field larger"),
        "deep": (
            "clean,corrupted,correct_idx,incorrect_idx\na,b,1," + "(" * 5000 + ")" * 5000 + "\n",
            r"a\.csv:2: incorrect_idx: expected a token id",
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in PAIR_FILES.items() for case in cases])
def test_pair_files(tmp_path, name, case):
    text, expected = PAIR_FILES[name][case]
    refused(write(tmp_path, name, text), expected)


TASKS = {
    "aliases": (BOMB + SWAP, r"swap\.yaml:\d: \w.*: its aliases .* expand to more values than the file has characters"),
    "depth": ("name: " + "[" * 600, r"swap\.yaml:1: nested too deeply"),
    "digits": ("name: " + "9" * 5000, r"swap\.yaml:1: name: a number of too many digits"),
    "control character": ("name: a\x00b", r"swap\.yaml:1: not valid YAML: special characters are not allowed"),
    "name .. out": (SWAP.replace("name: swap", "name: ../swap"), r"swap\.yaml:1: name: expected a name of letters"),
    "absolute name": (SWAP.replace("name: swap", "name: /tmp/x"), r"swap\.yaml:1: name: expected a name of letters"),
    "dots": (SWAP.replace("name: swap", "name: a..b"), r"swap\.yaml:1: name: expected a name of letters"),
    "markup": (SWAP.replace("name: swap", 'name: "[/x]"'), r"swap\.yaml:1: name: expected a name of letters"),
    "long name": (SWAP.replace("name: swap", f"name: {'x' * 101}"), r"swap\.yaml:1: name: .* at most 100 bytes"),
    "no name": (SWAP.replace("name: swap", "name: ''"), r"swap\.yaml:1: name: expected a name of letters"),
    "list outside": (SWAP.replace("A: people.txt", "A: ../../etc/passwd.txt"), r"swap\.yaml:3: slots\.A: '.*' leaves the task's"),
    "list absolute": (SWAP.replace("A: people.txt", "A: /etc/hosts.txt"), r"swap\.yaml:3: slots\.A: '.*' leaves the task's"),
    "list ending": (SWAP.replace("A: people.txt", "A: people.conf"), r"swap\.yaml:3: slots\.A: 'people.conf': expected .*\.csv"),
    "pairs ending": ("name: t\npairs: ../../etc/passwd\n", r"swap\.yaml:2: pairs: expected a file that ends in"),
}  # fmt: skip


@pytest.mark.parametrize("case", TASKS)
def test_task_files(tmp_path, case):
    text, expected = TASKS[case]
    refused(swap_task(tmp_path, text), expected)


def test_a_list_of_another_folder_is_not_shown(tmp_path):
    (tmp_path / "mine").mkdir()
    write(tmp_path, "secret.txt", "hunter2\nhunter2\n")
    text = SWAP.replace("A: people.txt", "A: ../secret.txt")
    assert "hunter2" not in refused(swap_task(tmp_path / "mine", text), "leaves the task's folder")


def test_includes_cannot_explode(tmp_path):
    for i in range(20):
        write(tmp_path, f"i{i}.yaml", f"include: [i{i + 1}.yaml, i{i + 1}.yaml]\n")
    write(tmp_path, "i20.yaml", SWAP)
    refused(swap_task(tmp_path, "include: i0.yaml\n"), "more than 100 files are included")


WORD_LISTS = {
    "aliases": ("places.yaml", BOMB, r"places\.yaml:\d: \w+.*aliases"),
    "digits": ("places.yaml", "- " + "9" * 5000, r"places\.yaml:1: 0: a number of too many digits"),
    "truth value": ("places.yaml", "- {a: no, b: c}\n", r"expected a word or a mapping of forms, got .*quote it"),
    "forms": ("places.csv", "a,a\nx,y\n", r"places\.csv:1: two forms of one name"),
}


@pytest.mark.parametrize("case", WORD_LISTS)
def test_word_lists(tmp_path, case):
    name, content, expected = WORD_LISTS[case]
    path = swap_task(tmp_path, SWAP.replace("places.txt", name))
    write(tmp_path, name, content)
    assert "swap.yaml:5: slots.PLACE: " in refused(path, expected)


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0b", "\x1c"])
def test_only_a_line_feed_ends_a_line(tmp_path, separator):
    record = {**TEXT, "original": f"Ann was{separator}sad so", "patch": f"Bob was{separator}sad so"}
    text = json.dumps(record, ensure_ascii=False) + "\r\n" + json.dumps({**TEXT, "original": "Cid was sad so"}) + "\r\n"
    path = write(
        tmp_path, "a.jsonl", text if separator != "\x0b" and separator != "\x1c" else text.replace(separator, " ")
    )
    assert len(read_source(path).fixed) == 2


def test_copies_of_a_pair_count_once(tmp_path):
    other = {**TEXT, "original": "Cid was sad so"}
    swapped = {**TEXT, "answer": ["she"]}
    rows = [TEXT, other, TEXT, swapped, {**TEXT, "foil": "so"}]
    task = load_task(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))))
    built = task.build(MODEL, n=None, split="all")
    assert sum(map(len, built.batches)) == 3
    assert "2 of 5 records are copies of another one: each pair counts once" in built.notes
    with pytest.raises(RelpError, match="has 3 pairs in split 'all' for this model, 4 were asked"):
        task.pairs(MODEL, n=4, split="all")


def test_texts_that_are_the_same_tokens_are_said(tmp_path):
    rows = [TEXT, {**TEXT, "original": "Ann  was sad so"}]
    built = load_task(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))).build(MODEL, n=2, split="all")
    assert any("1 of 2 pairs are the tokens of another pair" in note for note in built.notes)


def test_drawn_pairs_are_distinct(tmp_path):
    built = load_task(swap_task(tmp_path)).build(Fake(word_level(SWAP_WORDS)), n=60)
    rows = [tuple(row) for batch in built.batches for row in batch.original.tolist()]
    assert len(rows) == 60
    assert len({(pair.original, pair.patch) for pair in built.text_pairs}) == 60


def test_everything_that_a_task_reads_is_in_its_hash(tmp_path):
    path = swap_task(tmp_path, "include: base.yaml\nname: swap\n")
    hashes = []
    for name, text in (
        ("base.yaml", SWAP),
        ("base.yaml", SWAP + "# a comment\n"),
        ("people.txt", "Ann\nBob\nCid\n"),
        ("people.txt", "Ann\nCid\nBob\n"),
        ("places.txt", "park\nshop\n"),
        ("swap.yaml", "include: base.yaml\nname: swap\nmetric: prob_diff\n"),
    ):
        write(tmp_path, name, text)
        hashes.append(load_task(path).hash)
    assert len(set(hashes)) == len(hashes)
    listed = write(tmp_path, "rows.jsonl", LINE)
    by_yaml = write(tmp_path, "rows.yaml", "name: rows\npairs: rows.jsonl\n")
    before = load_task(listed).hash, load_task(by_yaml).hash
    write(tmp_path, "rows.jsonl", json.dumps({**TEXT, "foil": "so"}))
    assert load_task(listed).hash != before[0]
    assert load_task(by_yaml).hash != before[1]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my rows (1).jsonl", "my_rows_1_"),
        ("...jsonl", "pairs_"),
        ("a..b.jsonl", "a_b"),
        ("é" * 120 + ".jsonl", "é" * 50),
    ],
)
def test_a_pair_files_name_becomes_a_task_name(tmp_path, file, name):
    assert load_task(write(tmp_path, file, LINE)).name == name


def test_validate_reads_pair_files_and_those_of_a_task(tmp_path, relp):
    write(tmp_path, "a.jsonl", f"{LINE}\n{LINE}")
    write(tmp_path, "t.yaml", "name: t\npairs: bad.jsonl\n")
    write(tmp_path, "bad.jsonl", f'{LINE}\n{LINE[:-1]}, "foil": "x"}}')
    done = relp("validate", "a.jsonl")
    assert done.code == 0
    assert "1 of 2 records are copies" in done.out
    done = relp("validate", "t.yaml")
    assert (done.code, done.err) == (2, "error: bad.jsonl:2: duplicate key 'foil'\n")
