"""Configs: includes, overrides, and one clear line per mistake."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from relp_cli.config.load import load_config
from relp_cli.config.paths import data_root, find_config, list_configs
from relp_cli.errors import RelpError


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    steps: int = 1
    rule: str = "left"


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    inner: Inner = Inner()
    extra: Inner | list[str] | None = None
    words: list[str] = []


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_include_is_merged_underneath(tmp_path):
    write(tmp_path, "base.yaml", "name: base\ninner: {steps: 5, rule: right}\nwords: [a, b]\n")
    path = write(tmp_path, "top.yaml", "include: base.yaml\nname: top\ninner: {steps: 7}\nwords: [c]\n")
    found = load_config(path, Config)
    assert found == Config(name="top", inner=Inner(steps=7, rule="right"), words=["c"])


def test_the_first_of_several_includes_lies_deepest_and_the_last_wins(tmp_path):
    write(tmp_path, "one.yaml", "name: one\nwords: [x]\n")
    write(tmp_path, "two.yaml", "name: two\n")
    found = load_config(write(tmp_path, "top.yaml", "include: [one.yaml, two.yaml]\n"), Config)
    assert found == Config(name="two", words=["x"])


def test_a_null_takes_an_included_key_away(tmp_path):
    write(tmp_path, "base.yaml", "name: base\ninner: {steps: 5, rule: right}\nwords: [a]\n")
    path = write(tmp_path, "top.yaml", "include: base.yaml\ninner: {rule: null}\nwords: null\n")
    assert load_config(path, Config) == Config(name="base", inner=Inner(steps=5, rule="left"), words=[])


def test_overrides_are_typed_and_may_make_mappings_and_reach_into_lists(tmp_path):
    path = write(tmp_path, "c.yaml", "name: n\nwords: [a, b]\n")
    found = load_config(path, Config, ["inner.steps=20", "name=new", "words.1=z"])
    assert found == Config(name="new", inner=Inner(steps=20), words=["a", "z"])


BAD = {
    "unknown key": ("name: n\n\ninner:\n  stepz: 3\n", r"c\.yaml:4: inner\.stepz: unknown key; did you mean 'steps'\?"),
    "in a union": ("name: n\nextra:\n  stepz: 3\n", r"c\.yaml:3: extra\.stepz: unknown key; did you mean 'steps'\?"),
    "wrong type": ("name: n\ninner:\n  steps: many\n", r"c\.yaml:3: inner\.steps: expected a valid integer.*'many'"),
    "in a list": ("name: n\nwords:\n  - a\n  - 3\n", r"c\.yaml:4: words\.1: expected a valid string, got 3"),
    "missing": ("words: []\n", r"c\.yaml:1: missing key 'name'"),
    "duplicate": ("name: n\nwords: []\nname: m\n", r"c\.yaml:3: name: duplicate key"),
    "syntax": ("name: n\nwords: [a\ninner: 3\n", r"c\.yaml:\d: not valid YAML"),
    "no mapping": ("- a\n", r"c\.yaml:1: expected `key: value` lines"),
    "empty": ("", r"c\.yaml:1: expected `key: value` lines"),
    "include type": ("include: 3\nname: n\n", r"c\.yaml:1: include: expected a file name"),
    "include missing": ("name: n\ninclude: none.yaml\n", r"c\.yaml:2: include: no such file"),
    "include itself": ("include: c.yaml\nname: n\n", r"c\.yaml:1: include: circular"),
    "python tag": ("name: !!python/object:os.system x\n", r"c\.yaml:1: name: could not determine a constructor"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_with_file_line_and_key(tmp_path, case):
    text, expected = BAD[case]
    path = write(tmp_path, "c.yaml", text)
    with pytest.raises(RelpError, match=expected) as caught:
        load_config(path, Config)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_an_included_file_names_that_file(tmp_path):
    write(tmp_path, "base.yaml", "name: n\ninner:\n  steps: x\n")
    with pytest.raises(RelpError, match=r"base\.yaml:3: inner\.steps"):
        load_config(write(tmp_path, "top.yaml", "include: base.yaml\n"), Config)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("inner.steps=x", r"override 'inner.steps=x': inner\.steps: expected a valid integer"),
        ("inner.stepz=3", r"did you mean 'steps'"),
        ("inner.steps", r"expected dotted\.key=value"),
        ("=3", r"expected dotted\.key=value"),
        ("name.first=3", r"name has no keys below it"),
        ("words.5=z", r"words\.5: expected an index below 2"),
        ("name=[", r"not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, expected):
    path = write(tmp_path, "c.yaml", "name: n\nwords: [a, b]\n")
    with pytest.raises(RelpError, match=expected):
        load_config(path, Config, [override])


def test_an_unreadable_file(tmp_path):
    with pytest.raises(RelpError, match="cannot be read"):
        load_config(tmp_path, Config)


def test_shipped_names_paths_and_mistakes(tmp_path):
    assert find_config("tasks", "ioi") == data_root("configs") / "tasks" / "ioi.yaml"
    mine = write(tmp_path, "mine.yaml", "name: mine\n")
    assert find_config("tasks", mine) == mine
    assert "sva_across_pp" in list_configs("tasks")
    with pytest.raises(RelpError, match="unknown task 'io'; did you mean 'ioi'"):
        find_config("tasks", "io")
    with pytest.raises(RelpError, match=r"gone\.yaml: no such file"):
        find_config("tasks", tmp_path / "gone.yaml")
    with pytest.raises(RelpError, match="no such file"):
        find_config("tasks", "ioi.yml")
