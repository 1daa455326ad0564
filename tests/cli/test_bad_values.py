"""Every option of every verb with every bad value of its kind: refused in one line that names the culprit, with exit code 2,
before a model is loaded, and nothing left behind; or a value that is really valid (VALID).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from typer.main import get_command

from relp_cli.cli import main
from relp_cli.cli.app import app
from relp_cli.errors import visible

BIG = "1" * 5000
NUMBERS = ("", "abc", "-1", "0", "9" * 25, BIG, "inf", "nan", "[/x]")
TEXT = ("", "nowhere-x", "-1", "[/x]", "\x1b[31m", "a\nb\u2028", "n" * 300, "../x", "a,")
FILES = (
    "folder", "binary", "empty", "latin.txt", "list.json", "odd.json", "deep.json", "digits.json", "huge.json", "list.yaml",
    "bomb.yaml", "deep.yaml", "odd.jsonl", "digits.jsonl", "deep.jsonl", "binary.pt", "cut.json",
)  # fmt: skip
PLACES = ("", "empty/x", "n" * 300)
NO_FILE = ("folder.json", "empty/x.json")
TEXTS = tuple(f for f in FILES if f not in ("folder", "binary", "empty", "latin.txt", "binary.pt"))

# What stands before the option under test; of arguments, one is replaced.
ARGUMENTS = {
    "score": ["ioi"], "circuit": ["run"], "evaluate": ["run"], "compare": ["ioi"], "diagnose": ["ioi"], "overlap": ["run", "run"],
    "report": ["run"], "ls": ["tasks"], "bench": [], "validate": ["ioi"], "show": ["ioi"], "train-dictionary": [],
    "test": ["run"], "robustness": ["run"], "export": ["edges", "x.json"], "import": ["edges.json"], "reproduce": ["table5"],
    "init": ["task", "new.yaml"],
    "schema": ["task", "new.json"], "collect": ["run"],
}  # fmt: skip
BESIDE = {
    ("circuit", "confirm"): ["--verify", "--top-k=3"], ("circuit", "annotations"): ["--edge-threshold=1", "--top-k=3"],
    ("evaluate", "corpus"): ["--ablation=corpus"], ("test", "corpus"): ["--ablation=corpus"],
    **{("circuit", p): [] for p in ("threshold", "fraction", "top_k", "top_p")},
}  # fmt: skip
BESIDE_ALL = {"circuit": ["--top-k=3"]}

# Really valid: (verb or "", parameter) → values. Thresholds that keep everything say so; nothing replaces no circuit.
VALID = {
    ("", "seed"): ("0",), ("circuit", "threshold"): ("-1", "0"), ("circuit", "fraction"): ("-1", "0"),
    ("circuit", "confirm"): ("0", "9" * 25),
    ("circuit", "resamples"): ("0",), ("evaluate", "exclude_layers"): ("0",), ("evaluate", "random"): ("0",),
    ("diagnose", "show"): ("0",), ("show", "examples"): ("0",), ("bench", "only"): ("",),
    ("train-dictionary", "l1"): ("0", "9" * 25), ("train-dictionary", "lr"): ("9" * 25,),
    ("evaluate", "corpus"): TEXTS, ("test", "corpus"): TEXTS, ("test", "exclude_layers"): ("0",), ("test", "epsilon"): ("0",),
    ("robustness", "exclude_layers"): ("0",),
}  # fmt: skip
HUB_NAMES = (
    "nowhere-x",
    "a,",
    "list.json",
)  # may exist on the hub: a job goes on without them, and fails in the end (1)
# How a message names what has no letters of its own.
NAMED = {"": ("''", "'.'", " . "), "a,": ("'a'", "'a,'"), "a\nb\u2028": ("'a\\nb",)}


class ModelAsked(BaseException):
    """Raised in place of loading a model."""


def _asked(*_: object) -> None:
    raise ModelAsked


def _call(*arguments: str) -> tuple[int | None, str]:
    """Exit code (None: it went on to load a model) and stderr."""
    err, handler = io.StringIO(), signal.getsignal(signal.SIGINT)
    with (
        patch.object(sys, "argv", ["relp", *arguments]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(err),
    ):
        try:
            main.run()
        except SystemExit as stop:
            return int(stop.code or 0), err.getvalue()
        except ModelAsked:
            return None, ""
        finally:
            signal.signal(signal.SIGINT, handler)
    raise AssertionError("run() returns by SystemExit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run, a run of edges with its export, and files that are not what they should be."""
    root = tmp_path_factory.mktemp("bad") / "in"
    root.mkdir()
    before = Path.cwd()
    os.chdir(root)
    try:
        for line in ("score ioi --pairs 2 --nodes head -o run", "circuit run --top-k 3", "circuit edges --top-k 3",
                     "export edges edges.json"):  # fmt: skip
            if "edges" in line and not Path("edges").exists():
                assert (
                    _call(*["score", "ioi", "--pairs", "2", "--nodes", "edges", "--method", "eap", "-o", "edges"])[0]
                    == 0
                )
            assert _call(*line.split())[0] == 0
    finally:
        os.chdir(before)
    (root / "folder").mkdir()
    (root / "folder.json").mkdir()
    odd = {"cfg": [], "nodes": 3, "masks": [], "graph": 1, "meta": [], "kind": {}, "original": [], "patch": 1}
    shape = {"n_layers": 10**9, "n_heads": 12, "d_model": 4, "parallel_attn_mlp": False}
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
    contents = {
        "binary": bytes(range(256)), "latin.txt": "é\n".encode("latin-1"), "empty": b"", "list.json": b"[1, 2]",
        "odd.json": json.dumps(odd).encode(), "deep.json": b"[" * 100_000, "digits.json": b'{"a": %s}' % BIG.encode(),
        "huge.json": json.dumps({"cfg": shape, "nodes": {}, "edges": {}}).encode(), "list.yaml": b"- a\n- b\n",
        "bomb.yaml": bomb.encode(), "deep.yaml": b"[" * 1000, "cut.json": b'{"a": ',
    }  # fmt: skip
    for name, content in contents.items():
        (root / name).write_bytes(content)
    for copy in ("odd.jsonl", "digits.jsonl", "deep.jsonl", "binary.pt"):
        source = copy.split(".")[0]
        shutil.copy(root / (source if source in contents else f"{source}.json"), root / copy)
    return root


@pytest.fixture(autouse=True)
def _no_model(monkeypatch, folder):
    from relp_cli.models import load

    real, commands = load._from_pretrained, get_command(app)

    def only_broken(name, *more):
        return _asked() if name in load.embedded_names() else real(name, *more)

    monkeypatch.setattr(load, "_from_pretrained", only_broken)
    monkeypatch.setattr(load, "_hub_resolves", lambda: False)
    monkeypatch.setattr("relp_cli.costs.bench.fixture", _asked)
    monkeypatch.setattr("typer.main.get_command", lambda _: commands)
    monkeypatch.chdir(folder)


def _values(verb: str, parameter) -> tuple[str, ...]:
    kind = str(parameter.type_descriptor.annotation)
    if parameter.name == "output" or (verb, parameter.name) == ("export", "file"):
        return (*PLACES, *NO_FILE) if verb in ("circuit", "export", "import") else PLACES
    if "int" in kind or "float" in kind:
        return NUMBERS
    paths = parameter.param_type_name == "argument" or parameter.name in ("model", "models", "dictionary")
    return (*TEXT, *FILES) if "Path" in kind or paths else TEXT


def _cases(verb: str):
    """(parameter, value, command line) for every parameter that takes a value."""
    parameters = [p for p in get_command(app).commands[verb].params if not getattr(p, "is_flag", False)]
    places = [p.name for p in parameters if p.param_type_name == "argument"]
    for parameter in parameters:
        beside = BESIDE.get((verb, parameter.name), BESIDE_ALL.get(verb, []))
        for value in _values(verb, parameter):
            arguments, option = list(ARGUMENTS[verb]), []
            if parameter.name in places:
                arguments[places.index(parameter.name)] = value
            else:
                option = [f"{max(parameter.opts, key=len)}={value}"]
            if verb == "evaluate" and parameter.name in ("override", "engine", "shard", "workers"):
                arguments = ["table5_tiny"]
            yield parameter, value, [verb, *beside, *option, "--", *arguments]


def _complaint(verb: str, parameter, value: str, code: int | None, err: str) -> str:
    """What is wrong with a refusal; "" where nothing is."""
    if value in (*VALID.get((verb, parameter.name), ()), *VALID.get(("", parameter.name), ())):
        return "" if code in (None, 0) else "valid, and refused"
    if (verb, parameter.name) == ("reproduce", "models") and value in HUB_NAMES and code == 1:
        return ""
    if code != 2:
        return f"exit code {code}"
    if err.count("\n") != 1 or not err.startswith("error: ") or "RELP_DEBUG" in err or "Traceback" in err:
        return "not one clear line"
    names = {parameter.name, *(o.lstrip("-") for o in parameter.opts)} - {""}
    culprits = (*NAMED.get(value, (visible(value)[:40],)), *names)
    return "" if any(c in err for c in culprits) else "culprit not named"


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_bad_values_are_refused_in_one_line(verb, folder):
    def there() -> set[str]:
        return {str(Path(at) / name) for at, folders, names in os.walk(folder.parent) for name in (*folders, *names)}

    wrong, before = [], there()
    for parameter, value, arguments in _cases(verb):
        start = time.monotonic()
        code, err = _call(*arguments)
        complaint = _complaint(verb, parameter, value, code, err)
        if code == 2 and there() != before:
            complaint = f"left behind: {sorted(there() - before)}"
        if time.monotonic() - start > 10:
            complaint = f"took {time.monotonic() - start:.0f} s"
        if complaint:
            wrong.append(f"relp {visible(' '.join(arguments))[:90]}: {complaint}: {err.strip()[-200:]}")
        before = there()
    assert wrong == []


def test_every_verb_is_driven():
    assert set(ARGUMENTS) == set(get_command(app).commands)
