"""MIB's data sets as local files, in their layout and with sentences of our own: what is read, dropped, counted, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.tasks.mib import mib_folders, read_mib
from relp_cli.tasks.source import mib_source
from relp_cli.tasks.task import load_task
from tests.tasks.helpers import Fake, pieces, word_level, write

NAMES = ["Ann", "Bob", "Cid", "Dee"]
IOI = Fake(pieces([*NAMES, "gave", "it", "to", "and", "An", "Bo"], ["Ann", "Bob", "Cid", "Dee", "Zed"]))
WORDS = Fake(word_level([*"ABCDEFGH", "Q", "red", "blue", "Answer", ":", ".", "10", "20", "30", "41", "is", "sum"]))


def ioi_row(io: str, s: str, **more: Any) -> dict[str, Any]:
    record = {
        "template": "t",
        "metadata": {"subject": s, "indirect_object": io, "random_c": "Zed"},
        "prompt": f"{io} and {s} gave, {s} gave it to",
        "choices": [s, io],
        "answerKey": 1,
        "abc_counterfactual": {"prompt": "Zed and Bob gave, Cid gave it to", "choices": ["Cid", "Zed"], "answerKey": 0},
        "s2_io_flip_counterfactual": {
            "prompt": f"{io} and {s} gave, {io} gave it to",
            "choices": [s, io],
            "answerKey": 0,
        },
    }
    return {**record, **more}


def choice_row(number: str, old: str, new: str, key: int = 0, other: int = 0) -> dict[str, Any]:
    def prompt(labels: str) -> str:
        return f"Q {number} . {labels[0]} . red {labels[1]} . blue Answer :"

    return {
        "prompt": prompt(old),
        "choices": {"label": list(old), "text": ["red", "blue"]},
        "answerKey": key,
        "symbol_counterfactual": {
            "prompt": prompt(new),
            "choices": {"label": list(new), "text": ["red", "blue"]},
            "answerKey": other,
        },
    }


def sum_row(prompt: str, label: Any, other: dict[str, Any] | None) -> dict[str, Any]:
    return {"prompt": prompt, "label": label, "operator": "+", "random_counterfactual": other}


def put(folder: Path, **files: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def text(model: Fake, ids: Tensor) -> str:
    return "".join(model.tokenizer.convert_ids_to_tokens(ids.tolist())).replace("Ġ", " ")


def read(place: Path, model: Fake, split: str = "all") -> set[tuple[str, str, str, str]]:
    """(original, patch, answer, foil) of every usable pair, decoded."""
    return {
        (text(model, o), text(model, p), text(model, a), text(model, f))
        for batch in load_task(place).pairs(model, None, split=split, bos=False)
        for o, p, a, f in zip(batch.original, batch.patch, batch.answer, batch.foil, strict=True)
    }


def test_ioi_reads_the_flipped_subject_and_names_after_a_space(tmp_path: Path) -> None:
    rows = [ioi_row("Ann", "Bob"), ioi_row("Cid", "Dee")]
    found = read(put(tmp_path / "ioi", rows=rows), IOI)
    assert found == {
        (f"{io} and {s} gave, {s} gave it to", f"{io} and {s} gave, {io} gave it to", f" {io}", f" {s}")
        for io, s in (("Ann", "Bob"), ("Cid", "Dee"))
    }
    without = [{k: v for k, v in row.items() if k != "metadata"} for row in rows]  # then from choices[answerKey]
    assert read(put(tmp_path / "again", rows=without), IOI) == found


def test_answers_of_several_tokens_are_read_by_their_first_where_both_have_as_many(tmp_path: Path) -> None:
    """Text " Anx" is ` An|x`, " Boy" ` Bo|y`; " Bob" is one token, " Anx"/" Any" begin alike."""
    same, other, alike = ioi_row("Anx", "Boy"), ioi_row("Anx", "Bob"), ioi_row("Anx", "Any")
    task = load_task(put(tmp_path / "ioi", rows=[same, other, alike]))
    built = task.build(IOI, None, split="all", bos=False)
    (batch,) = built.batches
    assert [text(IOI, x[0]) for x in (batch.answer, batch.foil)] == [" An", " Bo"]
    assert built.dropped == {"pairs": (2, 1)}
    assert any(
        "2 of 3 pairs dropped, the first:" in line and "have different token lengths" in line for line in built.notes
    )


def test_choices_read_the_label_at_answer_key_as_it_is_written(tmp_path: Path) -> None:
    rows = [choice_row("10", "AB", "CD", 1, 0), choice_row("20", "EF", "GH", 0, 0)]
    assert {pair[2:] for pair in read(put(tmp_path / "copycolors_mcqa" / "4_answer_choices", rows=rows), WORDS)} == {
        ("B", "C"),
        ("E", "G"),
    }
    assert read_mib(tmp_path / "copycolors_mcqa").name == "copycolors_mcqa"
    assert read_mib(tmp_path / "copycolors_mcqa" / "4_answer_choices").name == "copycolors_mcqa"
    cached = put(tmp_path / "datasets--mib-bench--arc_easy" / "snapshots" / "0a1b" / "data", rows=rows)
    assert {read_mib(place).name for place in (cached, cached.parent)} == {"arc_easy"}


def test_arithmetic_takes_single_tokens_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    rows = [
        sum_row("sum 10 20 is", 30, {"prompt": "sum 20 10 is", "label": 41}),
        sum_row("sum 20 20 is", "41", None),
        sum_row("sum 20 30 is", "41", {"prompt": None, "label": None}),
        sum_row("sum 30 30 is", "1020", {"prompt": "sum 30 10 is", "label": "41"}),
    ]
    task = load_task(put(tmp_path / "arithmetic_addition", rows=rows))
    built = task.build(WORDS, None, split="all", bos=False)
    assert [text(WORDS, x[0]) for x in (built.batches[0].answer, built.batches[0].foil)] == ["30", "41"]
    assert built.dropped == {"pairs": (1, 1)}
    assert "2 of 4 rows have no random_counterfactual and are left out" in task.notes


def test_prompts_of_different_length_are_dropped_and_counted(tmp_path: Path) -> None:
    longer = choice_row("10", "AB", "CD")
    longer["symbol_counterfactual"]["prompt"] += " A"
    built = load_task(put(tmp_path / "arc_easy", rows=[longer, choice_row("20", "AB", "CD")])).build(
        WORDS, None, split="all", bos=False
    )
    assert built.dropped == {"pairs": (1, 1)}
    assert any("1 of 2 pairs dropped, the first:" in n and "different token lengths" in n for n in built.notes)


def test_splits_come_from_file_names(tmp_path: Path) -> None:
    rows = {io: [ioi_row(io, s) for s in NAMES if s != io] for io in NAMES}
    folder = put(
        tmp_path / "ioi" / "data",
        **{"train-00000-of-00001": rows["Ann"], "validation-00000": rows["Bob"], "test-00000": rows["Cid"]},
    )
    assert {p[2] for p in read(folder, IOI, "discovery")} == {" Ann"}
    assert {p[2] for p in read(folder, IOI, "heldout")} == {" Bob"}
    assert {raw.pair.answer for raw in mib_source(read_mib(folder), "test").fixed if raw.split == "heldout"} == {
        ("Cid",)
    }
    with pytest.raises(RelpError, match="ioi: unknown split 'tests'; did you mean 'test'"):
        mib_source(read_mib(folder), "tests")
    assert "splits as given by MIB: train for discovery, validation for heldout" in load_task(folder).notes
    twice = put(tmp_path / "twice", train=rows["Ann"], test=rows["Ann"][:1])
    assert any("WARNING: 1 of 1 held-out pairs have a prompt" in line for line in load_task(twice).notes)
    one = load_task(put(tmp_path / "one", validation=[r for row in rows.values() for r in row]))
    assert any("splits share no prompt" in line for line in one.notes)
    (folder / "more.jsonl").write_text(json.dumps(ioi_row("Dee", "Bob")))
    with pytest.raises(RelpError, match=r"more\.jsonl: its name tells no split"):
        load_task(folder)


def test_one_file_and_every_format_read_the_same(tmp_path: Path) -> None:
    pyarrow, parquet = (pytest.importorskip(f"pyarrow{part}") for part in ("", ".parquet"))
    rows = [ioi_row("Ann", "Bob"), ioi_row("Cid", "Dee")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    put(tmp_path, b=rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    found = [read(tmp_path / name, IOI) for name in ("a.json", "b.jsonl", "c.parquet")]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2


def test_a_folder_of_data_sets(tmp_path: Path) -> None:
    for name in ("ioi", "arc_easy"):
        put(tmp_path / name / "data", train=[ioi_row("Ann", "Bob")])
        (tmp_path / name / "dataset_infos.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    assert [folder.name for folder in mib_folders(tmp_path)] == ["arc_easy", "ioi"]
    assert mib_folders(tmp_path / "ioi") == [tmp_path / "ioi"]
    with pytest.raises(RelpError, match="no MIB data set here; expected files that end in"):
        mib_folders(tmp_path / "notes")
    with pytest.raises(RelpError, match="no such folder"):
        mib_folders(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "x", "label": 1}, "1: not a row of MIB's circuit track: expected `prompt` and one of s2_io_flip_"),
        (ioi_row("Ann", "Bob", metadata={"subject": "Bob"}), "1: missing key 'metadata.indirect_object'"),
        (ioi_row("Ann", "Bob", prompt=3), "1: prompt: expected text, got 3"),
        (ioi_row("Ann", "Bob", s2_io_flip_counterfactual="x"), "1: s2_io_flip_counterfactual: expected a record"),
        (choice_row("10", "AB", "CD", 5), r"1: answerKey: expected the index of a choice \(0 to 1\), got 5"),
        (choice_row("10", "AB", "CD", 0, "A"), "1: symbol_counterfactual: answerKey: expected the index"),  # type: ignore[arg-type]
        (sum_row("sum", None, {"prompt": "sum", "label": 1}), "1: missing key 'label'"),
        (sum_row("sum", 1, None), "none of its 1 rows has a random_counterfactual"),
    ],
)
def test_what_is_no_row_of_theirs_is_refused_by_line_and_key(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(RelpError, match=says):
        load_task(put(tmp_path / "bad", rows=[row]))


def test_mixed_data_sets_and_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(tmp_path / "mixed", a=[ioi_row("Ann", "Bob")], b=[choice_row("10", "AB", "CD")])
    with pytest.raises(RelpError, match="rows of several data sets in one: IOI, multiple choice"):
        load_task(folder)
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "ioi", rows=[ioi_row("Ann", "Bob")])
    assert load_task("ioi").spec.templates  # the shipped task, not the folder of its name
    assert not load_task("./ioi").spec.templates
    write(tmp_path, "flat.jsonl", json.dumps({"original": "a b", "patch": "c b", "answer": "x", "foil": "y"}))
    assert load_task("flat.jsonl").spec.description == ""
