"""The JSON Schemas take what relp takes: shipped files, and what `relp init` writes; and not what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from relp_cli.config.load import read_values
from relp_cli.config.paths import data_root
from relp_cli.outputs.schemas import SCHEMAS, schema

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
KNOWN = {
    "$schema", "$defs", "$ref", "title", "description", "default", "anyOf", "oneOf", "enum", "const", "type", "properties",
    "required", "additionalProperties", "items", "minItems", "maxItems", "minimum", "maximum",
}  # fmt: skip


def takes(rule, value, root):
    """Whether a schema takes a value: the part of JSON Schema that ours are made of, written out."""
    if isinstance(rule, bool):
        return rule
    assert set(rule) <= KNOWN, set(rule) - KNOWN
    kind = rule.get("type")
    checks = [
        kind is None or (isinstance(value, TYPES[kind]) and not (kind == "integer" and isinstance(value, bool))),
        "$ref" not in rule or takes(root["$defs"][rule["$ref"].removeprefix("#/$defs/")], value, root),
        "anyOf" not in rule or any(takes(r, value, root) for r in rule["anyOf"]),
        "oneOf" not in rule or sum(takes(r, value, root) for r in rule["oneOf"]) == 1,
        "enum" not in rule or value in rule["enum"],
        "const" not in rule or value == rule["const"],
    ]
    if isinstance(value, dict):
        known, rest = rule.get("properties", {}), rule.get("additionalProperties", True)
        checks += [takes(known.get(key, rest), item, root) for key, item in value.items()]
        checks += [key in value for key in rule.get("required", [])]
    if isinstance(value, list):
        checks += [takes(rule.get("items", True), item, root) for item in value]
        checks.append(rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value)))
    if isinstance(value, int | float):
        checks.append(rule.get("minimum", value) <= value <= rule.get("maximum", value))
    return all(checks)


def fits(what, value):
    made = schema(what)
    return takes(made, value, made)


@pytest.mark.parametrize("what", ["task", "job"])
def test_shipped_files_fit_and_a_wrong_key_does_not(what):
    root = data_root("configs")
    files = [*sorted((root / f"{what}s").glob("*.yaml")), root / "init" / f"{what}.yaml"]
    assert len(files) > 5
    for file in files:
        values = read_values(file).values
        assert fits(what, values), file
        assert not fits(what, values | {"templtes": ["a"]})
        assert not fits(what, values | {"metric": "logitdiff"})
        assert fits(what, values | {"include": "base.yaml"})
    assert not fits(what, {"description": "no name"})


def test_parts_of_tasks_and_jobs():
    one = {
        "name": "t",
        "slots": {"A": "names", "B": {"values": ["a", {"sg": "b"}]}},
        "templates": ["{A}"],
        "answer": "{A}",
    }
    assert fits("task", one)
    assert not fits("task", one | {"slots": {"A": {"lst": "names"}}})
    assert not fits("task", one | {"templates": "{A}"})
    columns = {"original": "a", "answer": {"list": "verbs", "by": "c", "forms": {"true": "pl", "false": "sg"}}}
    assert fits("task", {"name": "t", "pairs": "a.csv", "columns": columns, "only": {"kind": 3}, "unusable": "drop"})
    assert not fits("task", {"name": "t", "pairs": "a.csv", "columns": columns | {"answr": "x"}})
    grid = {
        "name": "j",
        "tasks": ["ioi", "my.yaml"],
        "models": ["m"],
        "methods": ["relp+ah"],
        "kinds": ["head", "edges"],
    }
    assert fits("job", grid | {"rules": "auto", "agreement": {}, "params": {"ig_inputs": {"steps": 3}}})
    for wrong in ({"tasks": []}, {"seeds": [-1]}, {"agreement": {"top": 3}}, {"directions": ["up"]}, {"pairs": 0}):
        assert not fits("job", grid | wrong), wrong


def test_pairs_of_every_form():
    good = [
        {
            "original": "a b",
            "patch": "c b",
            "answer": "d",
            "foil": ["e", "f"],
            "roles": {"S": [0, 1]},
            "split": "heldout",
        },
        {"original_ids": [1, 2], "patch_ids": [3, 2], "answer_id": 4, "foil_id": [5, 6], "roles": ["S", "end"]},
        {"prompt": "a b", "answer": "c"},
        {"clean": "a", "corrupted": "b", "correct_idx": 3, "incorrect_idx": 4, "template": "free"},
        {"clean": "a", "corrupt": "b", "answers": ["c"], "wrong_answers": ["d"]},
    ]
    assert fits("pairs", good)
    assert fits("pairs", {"prompts": good, "word_idxs": {}})
    for record in good:
        assert fits("pairs", record)
    for wrong in (
        {"original": "a", "patch": "b", "answer": "c"},
        good[0] | {"split": "train"},
        good[0] | {"clean": "x"},
        good[0] | {"roles": {"S": [1]}},
        good[1] | {"answer_id": -1},
    ):
        assert not fits("pairs", wrong), wrong


def test_the_verb_prints_and_writes_them_and_init_names_one(relp):
    for what in SCHEMAS:
        assert json.loads(relp("schema", what).out) == schema(what)
    assert json.loads(relp("schema", "job", "s.json", "--json").out) == {"file": "s.json"}
    assert json.loads(Path("s.json").read_text()) == schema("job")
    refused = relp("schema", "tsk")
    assert (refused.code, refused.out) == (2, "")
    assert "did you mean 'task'?" in refused.err
    for what in ("task", "job"):
        assert relp("init", what, f"{what}.yaml").code == 0
        first, *_ = Path(f"{what}.yaml").read_text().splitlines()
        named = Path(first.removeprefix("# yaml-language-server: $schema="))
        assert json.loads(named.read_text()) == schema(what)
        assert fits(what, yaml.safe_load(Path(f"{what}.yaml").read_text()))
