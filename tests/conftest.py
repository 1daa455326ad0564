"""Run `relp` as a user would: the real entry point, in this process, in an empty folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def relp(tmp_path, monkeypatch, capfd) -> Callable[..., Done]:
    from relp_cli.cli.main import run

    monkeypatch.chdir(tmp_path)

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
