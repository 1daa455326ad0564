"""A small published file on the command line: pairs that do not fit are dropped and counted, and every verb takes the rest."""

from __future__ import annotations

import json

from relp_cli.runs.spec import ScoreSpec

NOUNS = ["uncle", "teacher", "doctor", "lawyer", "farmer", "girl", "boy", "king", "aunt", "author"]


def rows() -> list[dict]:
    both = [(f"The {n}", f"The {n}s", "does", "do") for n in NOUNS]
    both += [(patch, original, foil, answer) for original, patch, answer, foil in both]
    return [{"x": {"clean": o, "corrupted": p}, "good": a, "bad": f} for o, p, a, f in both]


def test_a_small_file_is_scored_and_evaluated(relp, tmp_path):
    unfit = {"x": {"clean": "The uncle", "corrupted": "The uncles do"}, "good": "does", "bad": "do"}
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, [*rows(), unfit])))
    (tmp_path / "t.yaml").write_text(
        "name: small\npairs: f.jsonl\ncolumns: {original: x.clean, patch: x.corrupted, answer: good, foil: bad}\n"
    )
    done = relp("validate", "t.yaml")
    assert done.code == 0, done.err
    assert "splits share no prompt" in done.out
    assert relp("show", "t.yaml", "--split", "all").code == 2
    shown = relp("show", "t.yaml", "--split", "all", "--unusable", "drop")
    assert shown.code == 0, shown.err
    assert "of 21 pairs dropped, the first: f.jsonl:" in shown.err.replace("\n", " ")
    score = ("score", "t.yaml", "--nodes", "mlp_out", "--unusable", "drop", "-o", "run")
    done = relp(*score)
    assert done.code == 0, done.err
    assert "discovery pairs exist, 100 were asked" in done.err
    assert "already done" in relp(*score).err
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["spec"]["unusable"] == "drop"
    done = relp("evaluate", "run", "--sweep", "counts:1,4", "--random", 0)  # the held-out pairs are dropped alike
    assert done.code == 0, done.err
    assert (
        relp("compare", "t.yaml", "--nodes", "mlp_out", "--methods", "atp", "--unusable", "drop", "-o", "c").code == 0
    )
    bad = relp("score", "t.yaml", "--unusable", "dorp")
    assert bad.code == 2
    assert "unusable: unknown value 'dorp'; did you mean 'drop'?" in bad.err.replace("\n", " ")


def test_ids_of_another_tokenizer_by_option(relp, tmp_path):
    lines = [
        {"clean": r["x"]["clean"], "corrupted": r["x"]["corrupted"], "correct_idx": 1, "incorrect_idx": 2}
        for r in rows()
    ]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = relp("show", "f.jsonl", "--model", "tiny-gpt2", "--ids-of", "tiny-pythia")
    assert done.code == 0, done.err
    assert "as they are: the vocabularies are the same" in done.err.replace("\n", " ")
    refused = relp("show", "f.jsonl", "--model", "no/model", "--ids-of", "./nothing")
    assert (refused.code, refused.err) == (2, "error: model folder './nothing' does not exist\n")
    assert "WARNING: the file's token ids" in relp("show", "f.jsonl").err.replace("\n", " ")


def test_requests_that_ask_for_neither_hash_as_before():
    spec = ScoreSpec(task="ioi")
    assert {"unusable", "ids_of"}.isdisjoint(spec.model_dump())
    assert ScoreSpec(task="ioi", unusable="drop").digest() != spec.digest()
    assert ScoreSpec(**ScoreSpec(task="ioi", ids_of="gpt2").model_dump()).ids_of == "gpt2"
