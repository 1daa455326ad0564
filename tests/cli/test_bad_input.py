"""Bad input: exit code 2 (1 for failures), one line that names what is wrong and the nearest valid name, nothing left behind."""

from __future__ import annotations

import json

import pytest

CASES = {
    "unknown task": (["score", "ioy"], "did you mean 'ioi'?"),
    "unknown method": (["score", "ioi", "--method", "rellp"], "did you mean 'relp'?"),
    "unknown node": (["score", "ioi", "--nodes", "mlp_neurons"], "did you mean 'mlp_neuron'?"),
    "unknown rule": (["score", "ioi", "--rules", "identiti"], "did you mean 'identity'?"),
    "rule suffix": (["score", "ioi", "--method", "relp+ahh"], "did you mean 'ah'?"),
    "rules for atp": (["score", "ioi", "--method", "atp+ah"], "takes no rules"),
    "gate on ungated": (["score", "ioi", "--rules", "ln,half"], "its MLP is not gated"),
    "two norms": (["score", "ioi", "--rules", "ln,ln2"], "both replace the norm"),
    "unknown metric": (["score", "ioi", "--metric", "logit_dif"], "did you mean 'logit_diff'?"),
    "kl gradient": (["score", "ioi", "--metric", "kl"], "gradient exactly 0 at the original"),
    "accuracy gradient": (["score", "ioi", "--metric", "accuracy"], "has no gradient"),
    "unknown parameter": (["score", "ioi", "--set", "step=3"], "has no parameter 'step'"),
    "malformed set": (["score", "ioi", "--set", "steps"], "--set expects name=value"),
    "a set value that repeats a key": (["score", "ioi", "--set", "steps={a: 1, a: 2}"], "a: duplicate key"),
    "a set value that is too deep": (["score", "ioi", "--set", f"steps={'[' * 99}{']' * 99}"], "nested too deeply"),
    "set twice": (
        ["score", "ioi", "--method", "ig_inputs", "--set", "steps=3", "--set", "steps=4"],
        "steps: given twice",
    ),
    "direction": (["score", "ioi", "--direction", "noise"], "did you mean 'noising'?"),
    "too many pairs": (["score", "sva_simple", "--pairs", "9999999"], "9999999 were asked"),
    "no pairs": (["score", "ioi", "--pairs", "0"], "greater than or equal to 1"),
    "dtype": (["score", "ioi", "--dtype", "float23"], "unknown dtype 'float23'"),
    "no such model folder": (["score", "ioi", "-m", "./nowhere"], "does not exist"),
    "missing pair file": (["score", "pairs.jsonl"], "no such file"),
    "not a run": (["circuit", "nowhere", "-t", "0.1"], "does not exist"),
    "unknown list": (["ls", "method"], "did you mean 'methods'?"),
    "unknown job": (["evaluate", "figure3_tinny"], "did you mean 'figure3_tiny'?"),
    "unknown reference method": (
        ["compare", "ioi", "--reference", "act_pach", "--pairs", "2"],
        "did you mean 'act_patch'?",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(relp, tmp_path, case):
    arguments, expected = CASES[case]
    done = relp(*arguments)
    assert done.code == 2, done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert "Traceback" not in done.err
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_says_that_work_resumes(relp, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("relp_cli.runs.rundir.RunDir.read", interrupted)
    done = relp("circuit", "run", "-t", "1")
    assert done.code == 130
    assert done.err == "error: interrupted; the same command again resumes what was finished\n"


def test_a_file_is_no_run_and_a_table_needs_a_name(relp, tmp_path):
    (tmp_path / "file").write_text("")
    relp("score", "ioi", "--pairs", 3, "-o", "run")
    relp("score", "ioi", "--pairs", 3, "--baseline", "zero", "-o", "zero")
    for arguments, expected in (
        (("circuit", "file", "-t", "1"), "'file' is a file; expected a run directory"),
        (("evaluate", "run", "-o", "run"), "--output run: expected the name of a .csv file"),
        (("evaluate", "run", "--minimality", "--sweep", "counts:1"), "has no circuit to drop nodes of"),
        (("circuit", "zero", "--top-k", "3", "--verify"), "these scores have baseline 'zero'"),
    ):
        done = relp(*arguments)
        assert done.code == 2
        assert expected in done.err


def test_unreachable_hub_says_what_to_do(relp, monkeypatch):
    monkeypatch.setattr("relp_cli.models.load._hub_resolves", lambda: False)
    done = relp("score", "ioi", "-m", "tiny-gpt")
    assert done.code == 2
    assert "hf download tiny-gpt --local-dir" in done.err
    assert "did you mean 'tiny-gpt2'?" in done.err


def test_unwritable_output_is_found_before_the_work(relp, tmp_path):
    (tmp_path / "file").write_text("")
    done = relp("score", "ioi", "--pairs", 2, "-o", "file/run")
    assert done.code == 2
    assert "file" in done.err


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("name: x\nslotz: {}\n", "did you mean 'slots'?"),
        ("name: [1]\n", "bad.yaml:1: name"),
        ("name: x\nname: y\n", "bad.yaml:2"),
        ("name: x\nslots: [a\n", "bad.yaml:3"),
    ],
)
def test_broken_task_yaml_names_file_line_and_key(relp, tmp_path, yaml, expected):
    (tmp_path / "bad.yaml").write_text(yaml)
    done = relp("validate", "bad.yaml")
    assert done.code == 2
    assert expected in done.err


def test_other_run_in_the_folder_is_refused(relp):
    assert relp("score", "ioi", "--pairs", 2, "-o", "run").code == 0
    done = relp("score", "ioi", "--pairs", 3, "-o", "run")
    assert done.code == 2
    assert "holds another run" in done.err


def test_damaged_scores_are_redone_by_score_and_named_by_others(relp, tmp_path):
    relp("score", "ioi", "--pairs", 2, "-o", "run")
    file = tmp_path / "run/scores.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    broken = relp("circuit", "run", "-t", 0.1)
    assert (broken.code, "cannot be read" in broken.err) == (1, True)
    again = relp("score", "ioi", "--pairs", 2, "-o", "run")
    assert again.code == 0
    assert "already done" not in again.err
    assert relp("circuit", "run", "-t", 0.1).code == 0


def test_circuit_of_another_model_or_task_is_refused_with_both_named(relp, tmp_path):
    relp("score", "ioi", "--nodes", "head", "--pairs", 2, "-o", "run")
    relp("circuit", "run", "-t", 0.1)
    content = json.loads((tmp_path / "run/circuit.json").read_text())
    for key, value in (("model", "tiny-pythia"), ("task", "sva_simple")):
        other = {**content, "meta": {**content["meta"], key: value}}
        (tmp_path / "other.json").write_text(json.dumps(other))
        done = relp("evaluate", "run", "--circuit", "other.json", "--pairs", 4)
        assert done.code == 2
        assert value in done.err
        assert content["meta"][key] in done.err


@pytest.mark.parametrize(("threshold", "what", "values"), [("-1", "everything", (1, 0)), ("inf", "nothing", (0, 1))])
def test_threshold_that_keeps_everything_or_nothing_says_so_and_evaluates(relp, threshold, what, values):
    relp("score", "ioi", "--nodes", "head", "--pairs", 2, "-o", "run")
    assert f"keeps {what}" in relp("circuit", "run", "--threshold", threshold).err
    row = json.loads(relp("evaluate", "run", "--pairs", 4, "--json").out)["rows"][0]
    assert (row["faithfulness"], row["completeness"]) == values


def test_full_disk_fails_with_one_line_and_leaves_no_half_file(relp, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    relp("score", "ioi", "--pairs", 2, "-o", "run")
    monkeypatch.setattr("os.fsync", full)
    done = relp("circuit", "run", "-t", 0.1)
    assert done.code == 1
    assert "No space left on device" in done.err
    assert not (tmp_path / "run/circuit.json").exists()
    assert not list((tmp_path / "run").glob(".*"))
