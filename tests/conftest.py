"""Run `relp` as a user would: the real entry point, in this process, in an empty folder."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import typed
import typer.main
from jaxtyping import install_import_hook

os.environ.pop("COLUMNS", None)  # workers are given a terminal's width; what is read here is of a pipe
# The tree of commands is built once in a process, not for every call of `relp`.
typer.main.get_command = cache(typer.main.get_command)
jaxtyping.jaxtyped = typed.shapes
# Before anything of the package is imported. The modules that name shapes alone: the hook makes every function slower.
_PACKAGE = Path(__file__).parents[1] / "relp_cli"
_NAMED = [path for path in _PACKAGE.rglob("*.py") if "from jaxtyping" in path.read_text()]
install_import_hook([".".join(p.relative_to(_PACKAGE.parent).with_suffix("").parts) for p in _NAMED], "typed.shapes")

from relp_cli.models.catalog import embedded_names  # noqa: E402 - behind the hook


def pytest_collection_finish() -> None:
    """What is imported stays: collecting garbage does not walk through it again and again, a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@cache
def _loader() -> Callable[..., Any]:
    """`load_model`, but an embedded model is loaded once in a process, as a batch job loads it for all its cells."""
    from relp_cli.models.load import load_model

    once = cache(load_model)
    return lambda name, **how: (once if name in embedded_names() else load_model)(name, **how)


@pytest.fixture
def relp(tmp_path, monkeypatch, capfd) -> Callable[..., Done]:
    from relp_cli.cli.main import run

    monkeypatch.chdir(tmp_path)
    # Not in models.load: modules imported from then on would keep it beyond this test.
    monkeypatch.setattr("relp_cli.runs.scoring.load_model", _loader())

    def call(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["relp", *map(str, args)])
        capfd.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(SystemExit) as stop:
            run()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        out, err = capfd.readouterr()
        return Done(int(stop.value.code or 0), out, err)

    return call
