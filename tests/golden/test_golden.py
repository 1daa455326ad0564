"""No number of any method moves when code does: float64 fingerprints of every method × space × family × direction."""

from __future__ import annotations

import json

import pytest
import torch

from .cells import cells, fingerprint
from .make import FILE

GOLDEN = json.loads(FILE.read_text())
CELLS = cells()


def test_every_cell_has_its_numbers():
    assert list(CELLS) == list(GOLDEN)


@pytest.mark.parametrize("name", CELLS)
def test_numbers_are_the_golden_ones(name):
    got = {key: fingerprint(t) for key, t in CELLS[name]().items()}
    assert got.keys() == GOLDEN[name].keys()
    for key, want in GOLDEN[name].items():
        size = max(want[2], 1.0 if name.startswith("evaluate") else 1e-12)  # ratios: of values of size 1
        torch.testing.assert_close(
            torch.tensor(got[key]), torch.tensor(want), rtol=0, atol=1e-12 * size, msg=lambda m, k=key: f"{k}: {m}"
        )
