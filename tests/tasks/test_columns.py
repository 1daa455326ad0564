"""Columns of published files: each way to say what a column holds, against the same pairs written in our own keys."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from relp_cli.config.paths import data_root, list_configs
from relp_cli.errors import RelpError
from relp_cli.tasks.source import read_source
from relp_cli.tasks.task import load_task
from tests.tasks.helpers import Fake, word_level, write

WORDS = [
    "The",
    "dog",
    "dogs",
    "cat",
    "cats",
    "near",
    "so",
    "does",
    "do",
    "has",
    "have",
    "is",
    "are",
    "was",
    "were",
    "goes",
    "go",
]
YEARS = [f"{year:02d}" for year in range(100)]
MODEL = Fake(word_level([*WORDS, "from", "to", "A", "B", "x", "y", *YEARS]), bos=0)
IDS = MODEL.tokenizer.get_vocab()
RECORDS = [
    {
        "a": "The dog",
        "b": "The dogs",
        "meta": {"good": " is", "bad": ["are", "were"], "n": 1},
        "labels": ["x", "y"],
        "key": 1,
    },
    {
        "a": "The cats",
        "b": "The cat",
        "meta": {"good": " are", "bad": ["is", "was"], "n": 2},
        "labels": ["x", "y"],
        "key": 0,
    },
]


def task_of(folder: Path, records: list[dict], yaml: str, name: str = "f.jsonl") -> Path:
    write(folder, name, "\n".join(json.dumps(record) for record in records) + "\n")
    return write(folder, "t.yaml", f"name: t\npairs: {name}\n{yaml}")


def pairs_of(path: Path, **how) -> list[tuple]:
    """(original, patch, answers, foils) of every pair, as words."""
    names = {i: word for word, i in IDS.items()}
    text = lambda ids: " ".join(names[i] for i in ids if i > 0)  # noqa: E731 - 0 is BOS, -1 fills
    return sorted(
        (text(o), text(p), text(a), text(f))
        for batch in load_task(path).pairs(MODEL, n=None, split="all", **how)
        for o, p, a, f in zip(batch.original.tolist(), batch.patch.tolist() if batch.patch is not None else [[]] * len(batch),
                              batch.answer.tolist(), batch.foil.tolist(), strict=True)
    )  # fmt: skip


WANTED = [("The cats", "The cat", "are", "is was"), ("The dog", "The dogs", "is", "are were")]
MAPPING = "columns: {original: a, patch: b, answer: meta.good, foil: meta.bad}\n"


def test_columns_by_name_and_path(tmp_path):
    path = task_of(tmp_path, RECORDS, MAPPING)
    assert pairs_of(path) == WANTED
    assert load_task(path).metric == "prob_diff"  # of sets, where the task names none
    swapped = MAPPING.replace("meta.good", "meta.bad.0").replace("foil: meta.bad", "foil: meta.good")
    path = task_of(tmp_path, RECORDS, swapped)
    assert [pair[2:] for pair in pairs_of(path)] == [("is", "are"), ("are", "is")]
    assert load_task(path).metric == "logit_diff"


def test_an_entry_that_another_column_points_to(tmp_path):
    path = task_of(
        tmp_path, RECORDS, 'columns: {original: a, patch: b, answer: "labels[key]", foil: "labels[meta.n]"}\n'
    )
    with pytest.raises(RelpError, match=r"f\.jsonl:2: column 'labels\[meta\.n\]': expected a number below 2, got '2'"):
        load_task(path)
    path = task_of(tmp_path, RECORDS, 'columns: {original: a, patch: b, answer: "labels[key]"}\n')
    assert [pair[2:] for pair in pairs_of(path)] == [("x", ""), ("y", "")]


def test_every_kind_of_file_is_the_same(tmp_path):
    flat = [{"a": r["a"], "b": r["b"], "good": r["meta"]["good"], "bad": r["meta"]["bad"]} for r in RECORDS]
    mapping = "columns: {original: a, patch: b, answer: good, foil: bad}\n"
    assert pairs_of(task_of(tmp_path, flat, mapping)) == WANTED
    write(tmp_path, "f.json", json.dumps(flat, indent=1))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)  # lists as Python writes them
    write(tmp_path, "f.csv", out.getvalue())
    names = ["f.json", "f.csv"]
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(flat), tmp_path / "f.parquet")
    for name in [*names, "f.parquet"]:
        assert pairs_of(write(tmp_path, "t.yaml", f"name: t\npairs: {name}\n{mapping}")) == WANTED, name
    (tmp_path / "f.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(RelpError, match=r"f\.parquet: cannot be read"):
        load_task(tmp_path / "t.yaml")


def test_prompts_as_lists_a_written_bos_and_chosen_records(tmp_path):
    records = [
        {"a": ["<bos>", "The", " dog"], "b": ["<bos>", "The", " dogs"], "y": "is", "task": t, "on": t == "p"}
        for t in "pq"
    ]
    records[1] |= {"a": ["<bos>", "The", " cat"]}
    mapping = "columns: {original: a, patch: b, answer: y}\ncut: <bos>\nonly: {task: p, on: true}\n"
    path = task_of(tmp_path, records, mapping)
    assert pairs_of(path) == [("The dog", "The dogs", "is", "")]
    assert "1 of 2 records are those that `only` asks for" in load_task(path).notes
    with pytest.raises(RelpError, match="only: none of 2 records has task = z"):
        load_task(task_of(tmp_path, records, mapping.replace("task: p", "task: z")))


def test_years_above_and_up_to(tmp_path):
    records = [
        {"a": f"from 17 {y:02d} to 17", "b": "from 17 01 to 17", "label": label} for y, label in ((4, 4), (97, "97"))
    ]
    sets = "answer: {list: years, after: label}, foil: {list: years, upto: label}"
    path = task_of(tmp_path, records, f'columns: {{original: a, patch: b, {sets}}}\njoin: ""\n')
    got = {pair[0][8:10]: pair[2:] for pair in pairs_of(path)}
    assert got["04"] == (" ".join(YEARS[5:]), " ".join(YEARS[:5]))
    assert got["97"] == ("98 99", " ".join(YEARS[:98]))
    records[0]["label"] = 99
    with pytest.raises(RelpError, match=r"f\.jsonl:1: answer: column 'label': nothing comes after 99"):
        load_task(task_of(tmp_path, records, f"columns: {{original: a, patch: b, {sets}}}\n"))
    records[0]["label"] = 1704
    with pytest.raises(RelpError, match=r"f\.jsonl:1: answer: column 'label': 1704 is not in the ordered list 'years'"):
        load_task(task_of(tmp_path, records, f"columns: {{original: a, patch: b, {sets}}}\n"))


@pytest.mark.parametrize("flags", [(1, 0), (True, False), ("True", "no"), ("1.0", "0")])
def test_a_plural_flag_and_a_verb_list(tmp_path, flags):
    write(tmp_path, "verbs.csv", "sing,plur\nis,are\nhas,have\nrunneth,go\ngoes,rannen\n")
    records = [
        {"a": "The dogs", "b": "The dog", "plural": flags[0]},
        {"a": "The cat", "b": "The cats", "plural": flags[1]},
    ]
    mapping = (
        "columns: {original: a, patch: b, answer: {list: verbs.csv, by: plural, forms: {true: plur, false: sing}}}\n"
    )
    path = task_of(tmp_path, records, mapping)
    # Rows of which one form is no token of the model's are left out on both sides, and counted.
    assert pairs_of(path) == [
        ("The cat", "The cats", "is has", "are have"),
        ("The dogs", "The dog", "are have", "is has"),
    ]
    built = load_task(path).build(MODEL, n=None, split="all")
    assert any("2 of 8 listed answers are no single tokens of fake" in note for note in built.notes), built.notes
    records[0]["plural"] = 3
    with pytest.raises(RelpError, match=r"f\.jsonl:1: answer: column 'plural': expected true or false, got 3"):
        load_task(task_of(tmp_path, records, mapping))
    before = load_task(task_of(tmp_path, records[1:], mapping)).hash
    write(tmp_path, "verbs.csv", "sing,plur\nis,are\n")
    assert load_task(tmp_path / "t.yaml").hash != before


def test_sentences_that_differ_in_one_word(tmp_path):
    records = [
        {"good": "The dog near so is.", "bad": "The dog near so are."},
        {"good": "The cats do, so", "bad": "The cats does, so"},
    ]
    path = task_of(tmp_path, records, "columns: {good: good, bad: bad}\n")
    assert pairs_of(path) == [("The cats", "", "do", "does"), ("The dog near so", "", "is", "are")]
    for bad, why in (
        ("Cats near", "they differ in the first word"),
        ("The dog near so is.", "the sentences differ in no word"),
    ):
        with pytest.raises(RelpError, match=rf"f\.jsonl:1: {why}"):
            load_task(task_of(tmp_path, [{**records[0], "bad": bad}], "columns: {good: good, bad: bad}\n"))


WRONG = {
    "no such column": ("columns: {original: aa, answer: b}\n", r"f\.jsonl:1: column 'aa': no 'aa'; did you mean 'a'\?"),
    "no part": ("columns: {original: a, answer: b.c}\n", r"f\.jsonl:1: column 'b\.c': 'c' of 'The dogs', which has no parts"),
    "no prompt": ("columns: {answer: b}\n", r"t\.yaml:3: columns: the prompt needs one column: either `original`"),
    "two answers": ("columns: {original: a, answer: b, answer_id: key}\n", r"t\.yaml:3: columns: the answer needs one column"),
    "mixed": ("columns: {original: a, answer: b, foil_id: key}\n", r"t\.yaml:3: columns: `answer` and `foil_id`: both must"),
    "unknown key": ("columns: {original: a, answr: b}\n", r"t\.yaml:3: columns\.answr: unknown key; did you mean 'answer'\?"),
    "half": ("columns: {good: a}\n", r"t\.yaml:3: columns: `good` and `bad` go together"),
    "both forms": ("columns: {good: a, bad: b, answer: b}\n", r"t\.yaml:3: columns: `good` and `bad` give"),
    "ids of nobody": ("columns: {original: a, answer_id: key}\n", r"t\.yaml:3: columns: token ids need `ids_of: MODEL`"),
    "no list": ("columns: {original: a, answer: {list: yeers, after: key}}\n", r"t\.yaml:3: columns\.answer: unknown word list"),
    "no form": (
        "columns: {original: a, answer: {list: auxiliaries, by: key, forms: {1: pl, 0: xx}}}\n",
        r"t\.yaml:3: columns\.answer: 'auxiliaries' has no form 'xx'; known: pl, sg",
    ),
    "one form": (
        "columns: {original: a, answer: {list: auxiliaries, by: key, forms: {1: pl}}}\n", r"answer\.forms: expected two"),
    "only alone": ("only: {a: b}\n", r"t\.yaml:3: only: belongs to `columns`"),
    "number": ("columns: {original: key, answer: b}\n", r"f\.jsonl:1: original: expected text, got 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(tmp_path, case):
    yaml, expected = WRONG[case]
    with pytest.raises(RelpError, match=expected) as caught:
        load_task(task_of(tmp_path, RECORDS, yaml))
    assert "\n" not in str(caught.value)


def test_keys_of_files_are_refused_in_a_task_of_templates(tmp_path):
    path = write(tmp_path, "t.yaml", "name: t\nids_of: gpt2\ntemplates: [a]\n")
    with pytest.raises(RelpError, match=r"t\.yaml:2: ids_of: belongs to `pairs: FILE`"):
        load_task(path)


PUBLISHED = {
    "blimp": {"sentence_good": "x", "one_prefix_prefix": "The dog", "one_prefix_word_good": "is", "one_prefix_word_bad": "are"},
    "blimp_two_prefix": {"two_prefix_prefix_good": "The dog", "two_prefix_prefix_bad": "The dogs", "two_prefix_word": "is"},
    "blimp_sentences": {"sentence_good": "The dog is so.", "sentence_bad": "The dog are so."},
    "causalgym": {"base": ["<|endoftext|>", "The", " dog"], "src": ["<|endoftext|>", "The", " dogs"], "base_label": " is",
                  "src_label": " are", "task": "t", "base_type": "s"},
    "eap_ig": {"clean": "The dog", "corrupted": "The dogs", "correct_idx": 318, "incorrect_idx": 389},
    "eap_ig_greater_than": {"clean": "from 17 32 to 17", "corrupted": "from 17 01 to 17", "label": 32},
    "eap_ig_sva": {"clean": "The dog", "corrupted": "The dogs", "plural": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", list_configs("columns"))
def test_shipped_columns_fit_what_is_published(tmp_path, name):
    write(tmp_path, "f.jsonl", json.dumps(PUBLISHED[name]) + "\n")
    path = write(tmp_path, "t.yaml", f"include: columns/{name}.yaml\nname: t\npairs: f.jsonl\n")
    (raw,) = read_source(path).fixed
    assert raw.pair.original.startswith(("The dog", "from"))
    if name != "eap_ig":
        (pair,) = pairs_of(path)
        want = {"blimp_two_prefix": ("is", "")}.get(name, ("is", "are"))
        assert pair[2:] == want or name in ("eap_ig_sva", "eap_ig_greater_than"), pair
    assert (data_root("configs") / "columns" / f"{name}.yaml").is_file()


def test_a_file_beside_the_task_goes_before_a_shipped_one(tmp_path):
    (tmp_path / "columns").mkdir()
    write(tmp_path, "columns/blimp.yaml", MAPPING)
    assert pairs_of(task_of(tmp_path, RECORDS, "include: columns/blimp.yaml\n")) == WANTED
