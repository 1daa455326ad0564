"""A number of pairs that was asked for is had or refused, on the command line and in Python; by default there may be fewer."""

from __future__ import annotations

import json
from typing import Any

import pytest

import relp_cli
from relp_cli.errors import RelpError

NAMES = "Mary, John, Alice, Sarah, Laura, Peter, Anna, James, Robert, Emma"
FEW = f"name: few\nslots: {{A: {{values: [{NAMES}]}}}}\ntemplates: ['Then {{A}} gave a ring to']\n"
FEW += "patch: {A: other}\nanswer: '{A}'\n"


def test_one_rule_for_both(relp: Any, tmp_path: Any) -> None:
    (tmp_path / "few.yaml").write_text(FEW)
    record = {"original": "Mary saw", "patch": "John saw", "answer": "Mary", "foil": "John"}
    originals = {"discovery": ("Mary", "Alice", "Sarah"), "heldout": ("Peter", "Anna", "James")}
    rows = [record | {"split": split, "original": f"{name} saw"} for split, all_ in originals.items() for name in all_]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = relp_cli.load_model("tiny-gpt2")
    for name in ("few.yaml", "few.jsonl"):
        task, folder = relp_cli.load_task(name), name.replace(".", "-")
        there = {split: sum(map(len, task.pairs(model, split=split))) for split in ("discovery", "heldout")}
        if name == "few.jsonl":
            assert there == {"discovery": 3, "heldout": 3}
        assert all(there.values())
        with pytest.raises(RelpError, match=f"has {there['discovery']} pairs in split 'discovery'"):
            task.pairs(model, n=100)
        assert sum(map(len, task.pairs(model, n=there["discovery"]))) == there["discovery"]
        said = f"{there['discovery']} discovery pairs exist, 100 were asked"
        assert said in relp("score", name, "--nodes", "head", "-o", folder).err
        assert said in relp("show", name).err
        evaluate = ("evaluate", folder, "--sweep", "counts:1")
        done = relp(*evaluate, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["rows"][0]["n_pairs"] == there["heldout"]
        for line in (("score", name), ("show", name), evaluate, ("compare", name)):
            done = relp(*line, "--pairs", 100)
            assert done.code == 2
            assert "100 were asked" in done.err


def test_json_of_pairs_says_how_many_there_are_and_which_are_shown(relp: Any) -> None:
    said = json.loads(relp("show", "ioi", "--pairs", 12, "--examples", 1, "--json").out)
    assert said["n"] == 12
    assert "pairs" not in said
    lengths = [len(example["roles"]) for example in said["examples"]]
    assert lengths == sorted(set(lengths))  # one of each length
