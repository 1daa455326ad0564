"""Pair files: each format, the splits of a fixed file, and each mistake as one line with file and line number."""

import json
import sys

import pytest

from relp_cli.errors import RelpError
from relp_cli.tasks.source import read_source
from relp_cli.tasks.task import load_task
from tests.tasks.helpers import Fake, pieces, word_level, write

WORDS = [
    "Ann",
    "Bob",
    "Cid",
    "She",
    "was",
    "very",
    "sad",
    "so",
    "she",
    "he",
    "it",
    "they",
    "The",
    "dog",
    "dogs",
    "runs",
    "run",
]
WORDS += ["17", "01", "32", "33", "from", "to"]
MODEL = Fake(word_level(WORDS), bos=0)
IDS = MODEL.tokenizer.get_vocab()


def lines(*records: dict) -> str:
    return "\n".join(json.dumps(record) for record in records) + "\n"


def only_batch(path, **options):
    (batch,) = load_task(path).pairs(MODEL, n=None, split="all", **options)
    return batch


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


TEXT = {"original": "Ann was sad so", "patch": "Bob was sad so", "answer": "she", "foil": "he"}


def test_our_keys_as_text(tmp_path):
    batch = only_batch(write(tmp_path, "a.jsonl", lines(TEXT)))
    assert batch.original.tolist() == [[0, *ids("Ann was sad so")]]
    assert batch.patch.tolist() == [[0, *ids("Bob was sad so")]]
    assert (batch.answer.tolist(), batch.foil.tolist()) == ([[IDS["she"]]], [[IDS["he"]]])
    assert batch.roles == ("bos", "diff", "diff+1", "diff+2", "end")


def test_our_keys_with_answer_ids_and_lists(tmp_path):
    record = {"original": "Ann was", "patch": "Bob was", "answer_id": [5, 6], "foil_id": 7}
    task = load_task(write(tmp_path, "a.jsonl", lines(record)))
    (batch,) = task.pairs(MODEL, n=1, split="all")
    assert (batch.answer.tolist(), batch.foil.tolist()) == ([[5, 6]], [[7]])
    assert task.metric == "prob_diff"


def test_token_ids_need_no_tokenizer(tmp_path):
    record = {"original_ids": [4, 5, 6], "patch_ids": [4, 9, 6], "answer_id": 1, "foil_id": 2, "roles": ["a", "b", "c"]}
    task = load_task(write(tmp_path, "a.jsonl", lines(record, {**record, "original_ids": [7, 7, 7]})))
    (batch,) = task.pairs(Fake(None, bos=3), n=2, split="all")
    assert sorted(batch.original.tolist()) == [[3, 4, 5, 6], [3, 7, 7, 7]]
    assert batch.roles == ("bos", "a", "b", "c")
    assert task.metric == "logit_diff"


def test_feature_circuits(tmp_path):
    record = {"clean_prefix": "The dog", "patch_prefix": "The dogs", "clean_answer": " runs", "patch_answer": " run"}
    batch = only_batch(
        write(
            tmp_path,
            "sva.json",
            lines({**record, "case": "singular"}, {**record, "clean_answer": " run", "patch_answer": " runs"}),
        )
    )
    assert sorted(batch.answer.tolist()) == sorted([[IDS["runs"]], [IDS["run"]]])
    assert batch.original.tolist()[0] == [0, *ids("The dog")]


def test_parquet_is_read_as_the_same_records_in_json(tmp_path, monkeypatch):
    pyarrow, parquet = (pytest.importorskip(f"pyarrow{part}") for part in ("", ".parquet"))
    records = [
        {"original": f"The dog {w}", "patch": f"The dogs {w}", "answer": ["runs"], "foil": ["run"]}
        for w in ("was", "so")
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    got, want = only_batch(tmp_path / "a.parquet"), only_batch(write(tmp_path, "a.jsonl", lines(*records)))
    for field in ("original", "patch", "answer", "foil"):
        assert getattr(got, field).tolist() == getattr(want, field).tolist()
    parquet.write_table(pyarrow.Table.from_pylist([*records, {**records[0], "patch": None}]), tmp_path / "b.parquet")
    with pytest.raises(RelpError, match=r"b\.parquet:3: patch: expected text, got None"):
        load_task(tmp_path / "b.parquet")
    with pytest.raises(RelpError, match=r"c\.parquet: cannot be read"):
        load_task(write(tmp_path, "c.parquet", "no parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RelpError, match=r"needs pyarrow, which is not installed: pip install 'relp-cli\[parquet\]'"):
        load_task(tmp_path / "a.parquet")


def test_eap_ig_csv(tmp_path):
    text = ',clean,corrupted,correct_idx,incorrect_idx\n0,The dog,The dogs,5,6\n1,The dogs,The dog,"[7, 8]",9\n'
    batch = only_batch(write(tmp_path, "a.csv", text))
    assert sorted(zip(batch.answer.tolist(), batch.foil.tolist(), strict=True)) == [([5, -1], [6]), ([7, 8], [9])]


def test_auto_circuit_json(tmp_path):
    prompt = {"clean": "The dog", "corrupt": "The dogs", "answers": [" runs", " she"], "wrong_answers": [" run"]}
    batch = only_batch(write(tmp_path, "a.json", json.dumps({"word_idxs": {}, "prompts": [prompt]}, indent=1)))
    assert batch.answer.tolist() == [ids("runs she")]
    assert batch.foil.tolist() == [ids("run")]


def test_single_prompts_with_and_without_a_foil(tmp_path):
    text = lines({"prompt": "Ann was", "answer": "sad"}, {"prompt": "Bob was", "answer": "sad", "foil": "very"})
    batch = only_batch(write(tmp_path, "a.jsonl", text), bos=False)
    assert batch.patch is None
    foils = dict(zip([tuple(row) for row in batch.original.tolist()], batch.foil.tolist(), strict=True))
    assert foils == {tuple(ids("Ann was")): [-1], tuple(ids("Bob was")): ids("very")}
    assert batch.roles == ("start", "end")


def test_roles_as_spans_and_as_labels(tmp_path):
    spans = only_batch(write(tmp_path, "a.jsonl", lines({**TEXT, "roles": {"S": [0, 3], "adj": [8, 11]}})))
    assert spans.roles == ("bos", "S", "S+1", "adj", "end")
    labels = only_batch(write(tmp_path, "b.jsonl", lines({**TEXT, "roles": ["x", "x", "y", "y"]})))
    assert labels.roles == ("bos", "x", "x", "y", "y")


def test_spans_of_several_tokens_are_numbered(tmp_path):
    record = {**TEXT, "original": "So Zed was sad so", "patch": "So Zod was sad so", "roles": {"S": [3, 6]}}
    fake = Fake(pieces(["So", "was", "sad", "so", "she", "he"]))
    (batch,) = load_task(write(tmp_path, "a.jsonl", lines(record))).pairs(fake, n=1, split="all")
    # "So" at the very start has no space before it and falls to bytes: S, o, space, Z, e, d.
    assert batch.roles == ("start", "start+1", "start+2", "S", "S.1", "S.2", "S+1", "S+2", "end")


def test_answers_get_a_space_only_where_words_would_touch(tmp_path):
    fake = Fake(pieces(["Ann", "was", "sad"]))
    for answer in ("sad", " sad"):
        record = {**TEXT, "original": "x Ann was", "patch": "y Ann was", "answer": answer, "foil": "was"}
        (batch,) = load_task(write(tmp_path, "a.jsonl", lines(record))).pairs(fake, n=1, split="all")
        assert fake.tokenizer.convert_ids_to_tokens(batch.answer[0].tolist()) == ["Ġsad"]
    record = {"original": "from 1732 to 17", "patch": "from 1701 to 17", "answer": ["33"], "foil": ["32", "01"]}
    batch = only_batch(write(tmp_path, "b.jsonl", lines(record)))
    assert (batch.answer.tolist(), batch.foil.tolist()) == ([ids("33")], [ids("32 01")])


def test_files_through_a_yaml(tmp_path):
    write(tmp_path, "rows.jsonl", lines(TEXT))
    path = write(tmp_path, "t.yaml", "name: mine\nmetric: prob_diff\npairs: rows.jsonl\n")
    task = load_task(path)
    assert (task.name, task.metric) == ("mine", "prob_diff")
    assert sum(map(len, task.pairs(MODEL, n=None, split="all"))) == 1
    before = task.hash
    write(tmp_path, "rows.jsonl", lines({**TEXT, "answer": "it"}))
    assert load_task(path).hash != before


def test_unusable_pairs_are_refused_or_dropped_and_counted(tmp_path):
    write(tmp_path, "rows.jsonl", lines(TEXT, {**TEXT, "original": "Ann was very sad so"}, {**TEXT, "answer": "zebra"}))
    strict = write(tmp_path, "strict.yaml", "name: t\npairs: rows.jsonl\n")
    with pytest.raises(RelpError, match=r"rows\.jsonl:[23]: "):
        load_task(strict).pairs(MODEL, n=None, split="all")
    lenient = write(tmp_path, "lenient.yaml", "name: t\npairs: rows.jsonl\nunusable: drop\n")
    built = load_task(lenient).build(MODEL, n=None, split="all")
    assert built.dropped == {"pairs": (2, 1)}
    assert "2 of 3 pairs dropped" in built.notes[-1]
    assert sum(map(len, built.batches)) == 1


NAMES = ["Ann", "Bob", "Cid", "She"]
ADJECTIVES = ["sad", "very", "so", "it", "they", "dog", "dogs"]


def many() -> str:
    """28 prompts in 42 pairs that share prompts within, but not across, adjectives."""
    return lines(
        *(
            {"original": f"{one} was {adj}", "patch": f"{two} was {adj}", "answer": "runs", "foil": "run"}
            for adj in ADJECTIVES
            for one, two in zip(NAMES, [*NAMES[1:], "Ann"], strict=True)
        )
    )


def test_the_splits_of_a_file_share_no_prompt(tmp_path):
    task = load_task(write(tmp_path, "a.jsonl", many()))
    prompts = {}
    for split in ("discovery", "heldout"):
        pairs = task.build(MODEL, n=None, split=split).text_pairs
        prompts[split] = {text for pair in pairs for text in (pair.original, pair.patch)}
        assert prompts[split]
    assert not prompts["discovery"] & prompts["heldout"]
    assert len(prompts["discovery"] | prompts["heldout"]) == 28
    assert "share no prompt" in task.notes[0]


def test_a_file_with_one_common_patch_prompt_is_split_by_originals_and_says_so(tmp_path):
    records = [
        {"original": f"{one} was {adj}", "patch": "they was it", "answer": "runs", "foil": "run"}
        for adj in ADJECTIVES
        for one in NAMES
    ]
    task = load_task(write(tmp_path, "a.jsonl", lines(*records)))
    originals = [
        {pair.original for pair in task.build(MODEL, n=None, split=split).text_pairs}
        for split in ("discovery", "heldout")
    ]
    assert all(originals)
    assert not originals[0] & originals[1]
    assert "patch prompts repeat" in task.notes[0]


@pytest.mark.parametrize("n", [3, 4, 7, 20, 61])
def test_a_file_of_any_size_is_split_in_proportion(tmp_path, n):
    """Every third pair shares its patch prompt with the next: these stay together."""
    records = [{**TEXT, "original": f"a {i}", "patch": f"b {i - (i % 3 == 1)}"} for i in range(n)]
    (note, *_), fixed = (source := read_source(write(tmp_path, "a.jsonl", lines(*records)))).notes, source.fixed
    held = [raw for raw in fixed if raw.split == "heldout"]
    assert note == f"splits share no prompt: {n - len(held)} pairs for discovery, {len(held)} held out"
    assert {raw.pair.patch for raw in held}.isdisjoint(raw.pair.patch for raw in fixed if raw not in held)
    # A quarter, but for a pair of pairs that stays whole; at least one pair of several groups.
    assert len(held) in (round(n / 4), max(round(n / 4) - 1, 1))


def test_a_files_own_split_is_honoured(tmp_path):
    rows = [{**TEXT, "split": "heldout"}, {**TEXT, "original": "Cid was sad so", "split": "discovery"}]
    task = load_task(write(tmp_path, "a.jsonl", lines(*rows)))
    for split, first in (("heldout", "Ann"), ("discovery", "Cid")):
        (pair,) = task.build(MODEL, n=1, split=split).text_pairs
        assert pair.original.startswith(first)


def test_seeds_reproduce_and_differ(tmp_path):
    task = load_task(write(tmp_path, "a.jsonl", many()))
    draws = [task.build(MODEL, n=5, seed=seed, split="all").text_pairs for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_more_pairs_than_the_file_has(tmp_path):
    task = load_task(write(tmp_path, "a.jsonl", many()))
    with pytest.raises(RelpError, match="has 28 pairs in split 'all' for this model, 29 were asked"):
        task.pairs(MODEL, n=29, split="all")


BAD = {
    "missing key": ([TEXT, {"original": "a", "patch": "b", "answer": "c"}], r"f\.jsonl:2: missing key 'foil'"),
    "misspelt": (
        [{"original": "a", "patch": "b", "answer": "c", "foill": "d"}],
        r"f\.jsonl:1: missing key 'foil' .*'foill': did you mean 'foil'",
    ),
    "misspelt optional": ([{**TEXT, "ptach": "x"}], r"f\.jsonl:1: unknown key 'ptach'; did you mean 'patch'"),
    "mixed": ([{**TEXT, "clean_prefix": "x"}], r"f\.jsonl:1: key 'clean_prefix' does not belong to the text format"),
    "mixed rows": ([TEXT, {"prompt": "a", "answer": "b"}], r"f\.jsonl: mixes formats"),
    "no object": ([TEXT, [1]], r"f\.jsonl:2: expected a JSON object"),
    "type": ([{**TEXT, "answer": 3}], r"f\.jsonl:1: answer: expected text or a list of texts, got 3"),
    "prompt type": ([{**TEXT, "original": ""}], r"f\.jsonl:1: original: expected text"),
    "id type": ([{"original": "a", "answer_id": -4, "foil_id": 1}], r"f\.jsonl:1: answer_id: expected a token id"),
    "split": ([{**TEXT, "split": "test"}], r"f\.jsonl:1: split: expected discovery or heldout"),
    "some split": ([TEXT, {**TEXT, "split": "heldout"}], r"f\.jsonl: some records have the key 'split'"),
    "roles": ([{**TEXT, "roles": {"S": [3, 99]}}], r"f\.jsonl:1: roles: expected a label per token"),
    "roles type": ([{**TEXT, "roles": 3}], r"f\.jsonl:1: roles: expected a label per token"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_in_a_file_is_one_line(tmp_path, case):
    records, expected = BAD[case]
    with pytest.raises(RelpError, match=expected) as caught:
        load_task(write(tmp_path, "f.jsonl", lines(*records)))
    assert "\n" not in str(caught.value)


UNFIT = {
    "lengths": (
        {**TEXT, "patch": "Bob was very sad so"},
        r"f\.jsonl:1: original and patch have different token lengths: "
        r"original Ann\|was\|sad\|so \(4\) / patch Bob\|was\|very\|sad\|so \(5\)",
    ),
    "same": ({**TEXT, "patch": "Ann was sad so"}, r"f\.jsonl:1: original and patch are the same"),
    "unknown": (
        {**TEXT, "patch": "Zed was sad so"},
        r"f\.jsonl:1: 'Zed was sad so': not in the vocabulary of fake: Zed",
    ),
    "answer": ({**TEXT, "answer": "she he"}, r"f\.jsonl:1: answer 'she he' is not a single token of fake: she\|he"),
    "unknown answer": ({**TEXT, "answer": "zed"}, r"f\.jsonl:1: answer 'zed' is not a single token"),
    "same answer": ({**TEXT, "foil": "she"}, r"f\.jsonl:1: answer and foil share the token she"),
    "labels": ({**TEXT, "roles": ["a"]}, r"f\.jsonl:1: 1 roles for 4 tokens"),
    "ids": (
        {"original_ids": [1, 2], "patch_ids": [1], "answer_id": 1, "foil_id": 2},
        r"f\.jsonl:1: original has 2 token ids, patch 1",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_pair_that_does_not_fit_the_model_is_one_line(tmp_path, case):
    record, expected = UNFIT[case]
    with pytest.raises(RelpError, match=expected) as caught:
        load_task(write(tmp_path, "f.jsonl", lines(record))).pairs(MODEL, n=1, split="all")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("f.jsonl", '{"original": "a"\n', r"f\.jsonl:1: not valid JSON"),
        ("f.jsonl", "\n" + json.dumps(TEXT) + "\n{x}\n", r"f\.jsonl:3: not valid JSON"),
        ("f.jsonl", "", r"f\.jsonl: no pairs in this file"),
        ("f.json", "", r"f\.json:1: not valid JSON"),
        ("f.json", "3", r"f\.json:1: expected JSON-lines, a list"),
        (
            "f.json",
            '{"prompts": [\n\n{"clean": "a", "corrupt": "b"}]}',
            r"f\.json:3: missing key 'answers', 'wrong_answers' .*\(the record has 'clean'.*`columns` of a task YAML",
        ),
        ("f.csv", "clean,corrupted,correct_idx\na,b,1\n", r"f\.csv:2: missing key 'incorrect_idx'"),
        (
            "f.csv",
            "clean,corrupted,correct_idx,incorrect_idx\na,b,1,2\na,b,x,2\n",
            r"f\.csv:3: correct_idx: expected a token id",
        ),
        ("f.csv", "clean,corrupted,correct_idx,incorrect_idx\na,b,1\n", r"f\.csv:2: expected 4 cells"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, name, content, expected):
    with pytest.raises(RelpError, match=expected) as caught:
        load_task(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RelpError, match=r"gone\.jsonl: no such file"):
        load_task(tmp_path / "gone.jsonl")
    path = write(tmp_path, "t.yaml", "name: t\npairs: gone.jsonl\n")
    with pytest.raises(RelpError, match=r"t\.yaml:2: pairs: no such file"):
        load_task(path)
