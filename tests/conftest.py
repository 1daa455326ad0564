"""Run `relp` as a user would: the real entry point, in this process, in an empty folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from jaxtyping import install_import_hook

install_import_hook("relp_cli", "typed.shapes")  # before anything of it is imported: see typed.py

from relp_cli.models.catalog import embedded_names


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
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit) as stop:
            run()
        signal.signal(signal.SIGINT, handler)
        out, err = capfd.readouterr()
        return Done(int(stop.value.code or 0), out, err)

    return call
