"""`relp init` writes what `relp validate` takes; `relp validate --model` says what does not fit, and why there are no pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml


@pytest.mark.parametrize("what", ["task", "job"])
def test_what_is_written_is_commented_valid_and_never_overwritten(relp, what):
    file = Path(f"odd name-{what}.yaml")
    assert relp("init", what, file).code == 0
    text = file.read_text()
    assert text.count("\n#") > 10
    assert yaml.safe_load(text)["name"] == f"odd_name-{what}"
    assert relp("validate", file).code == 0
    again = relp("init", what, file)
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "exists already" in again.err
    assert file.read_text() == text
    assert relp("init", what).code == 0
    assert Path(f"{what}.yaml").is_file()


def test_the_written_task_runs_and_the_job_is_a_grid(relp):
    relp("init", "task")
    fits = json.loads(relp("validate", "task.yaml", "--model", "tiny-gpt2", "--json").out)
    assert fits["pairs"] == {"discovery": 100, "heldout": 100}
    assert sum(fits["lengths"].values()) == 200
    assert json.loads(relp("show", "task.yaml", "--pairs", 50, "--json").out)["accuracy"] > 0.9
    relp("init", "job")
    assert json.loads(relp("validate", "job.yaml", "--json").out)["cells"] == 2 * 1 * 2 * 2


def _task(name="t", **keys):
    content = {"name": name, "metric": "logit_diff", **keys}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    return f"{name}.yaml"


TEMPLATE = ("Then, {A1=A} went to the park. {A2=A} gave a ring to",)


def test_words_of_several_tokens_are_named(relp):
    Path("w.txt").write_text("Mary\nQuetzalcoatl\nJohn\nAlice\nLisa\nLaura\n")
    task = _task(slots={"A": {"list": "w.txt"}}, templates=TEMPLATE, patch={"A": "other"}, answer="{A}")
    fits = json.loads(relp("validate", task, "--model", "tiny-gpt2", "--json").out)
    assert list(fits["several"]["w.txt"]) == ["Quetzalcoatl"]
    assert sum(fits["pairs"].values()) <= 5 * 4
    assert "Quetzalcoatl (" in relp("validate", task, "--model", "tiny-gpt2").out
    Path("w.txt").write_text("Quetzalcoatl\nBartholomew\n")
    done = relp("validate", task, "--model", "tiny-gpt2")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "no word of list 'w.txt' is a single token of tiny-gpt2" in done.err

    for verb in ("score", "show", "compare"):
        done = relp(verb, task)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "(no --model was given: tiny-gpt2 is the default)" in done.err
    assert "no --model" not in relp("show", task, "--model", "tiny-gpt2").err


def test_prompts_that_are_not_aligned_are_named(relp):
    end = "went to the park. John gave a ring to"
    shifted = "Then, Mary went to the park John gave a ring to", "Then, to Mary went to the park John gave a ring"
    rows = [(f"Then, Mary {end}", f"Then, Alice {end}"), shifted]
    Path("p.jsonl").write_text("".join(
        json.dumps({"original": a, "patch": b, "answer": "Mary", "foil": "John", "split": "discovery"}) + "\n" for a, b in rows
    ))  # fmt: skip
    for verb in ("validate", "show", "score"):
        err = relp(verb, "p.jsonl", "--model", "tiny-gpt2").err.replace("\n", "")
        assert err.count("p.jsonl:2: 10 of 12 tokens differ: are the prompts aligned?") == 1, (verb, err)
        assert "p.jsonl:1" not in err
    said = relp("show", "ioi", "--pairs", 2).err
    assert said.count("no --model was given: tiny-gpt2 is the default") == 1


NAMES = {"A": {"values": ["Mary", "John"]}}


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"answer": "ring", "foil": "ring"}, "2 have a foil that equals the answer"),
        ({"answer": "ring"}, "2 have the same answer to the patch prompt as to the original (name a foil)"),
    ],
)
def test_why_there_are_no_pairs_is_counted(relp, keys, why):
    task = _task(slots=NAMES, templates=TEMPLATE, patch={"A": "other"}, **keys)
    assert relp("validate", task).code == 0
    for verb in ("validate", "show", "score"):
        done = relp(verb, task, "--model", "tiny-gpt2")
        assert done.code == 2
        assert f"of 2 combinations of words {why}" in done.err  # Mary → John, John → Mary


def test_jobs_are_checked_as_they_would_be_run(relp):
    assert "valid: yes" in relp("validate", "table5_tiny").out
    Path("j.yaml").write_text("name: j\ntasks: [ioi]\nmodels: [tiny-gpt2]\nmethods: [atp]\nkinds: [head]\n")
    for more, expected in (
        ("", "expected `evaluate:` or `agreement:`"),
        ("evaluate: {sweep: nonsense}\n", "sweep 'nonsense'"),
        ("agreement: {}\nparams: {relp: {}}\n", "'relp' is not among the job's methods"),
    ):
        Path("k.yaml").write_text(Path("j.yaml").read_text() + more)
        done = relp("validate", "k.yaml")
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert expected in done.err
    refused = relp("validate", "table5_tiny", "--model", "tiny-gpt2")
    assert refused.code == 2
    assert "--model is for tasks" in refused.err


def test_a_file_of_pairs_is_drawn_from_too(relp):
    rows = [
        {"original": f"Then, {a} gave a ring to", "patch": f"Then, {b} gave a ring to", "answer": b, "foil": a}
        for a, b in (("Mary", "John"), ("John", "Alice"), ("Alice", "Mary"), ("Lisa", "John"))
    ]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fits = json.loads(relp("validate", "p.jsonl", "--model", "tiny-gpt2", "--json").out)
    assert fits["pairs"] == {"discovery": fits["splits"]["discovery"], "heldout": fits["splits"].get("heldout", 0)}
    rows[0]["answer"] = "Quetzalcoatl"
    Path("p.jsonl").write_text(json.dumps(rows[0]) + "\n")
    done = relp("validate", "p.jsonl", "--model", "tiny-gpt2")
    assert done.code == 2
    assert "Quetzalcoatl" in done.err
