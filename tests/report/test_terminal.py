"""Tables on terminals of any width: every cell is there, and no line is wider than the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from relp_cli.report.terminal import Column, print_table

NUMBERS = [
    Column("model", ["tiny-gpt2", "SmolLM2-135M"]), Column("nodes", ["residual", "attention"]),
    *(Column(f"method{i}", [f"0.{i}00 [0.{i}11, 0.{i}22]", f"0.{i}33 [0.{i}44, 0.{i}55]"], numeric=i % 2 == 0) for i in range(8)),
]  # fmt: skip
PROSE = [
    Column("method", ["atp", "relp"]), Column("for", ["nodes, edges, features", "nodes"]),
    Column("estimates", ["c(n), linearised at the run, as the paper's second equation says", "with coefficients"]),
    Column("source", ["Nanda 2022; RelP eq. 2; edges: Syed et al. 2023, and more", ""]),
]  # fmt: skip


def printed(columns: list[Column], width: int, keys: int = 1) -> list[str]:
    stream = io.StringIO()
    print_table(Console(file=stream, width=width, markup=False, highlight=False), columns, keys, "a title", ["a note"])
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].rstrip() == "a title"
    assert lines[-1].rstrip() == "  a note"
    return lines


@pytest.mark.parametrize("width", range(57, 300, 7))
def test_numbers_stand_whole_on_a_line_behind_the_names_of_their_row(width: int) -> None:
    lines = printed(NUMBERS, width, keys=2)
    for row in range(2):
        for column in NUMBERS[2:]:
            (line,) = [line for line in lines if column.cells[row] in line]
            assert line.split()[:2] == [NUMBERS[0].cells[row], NUMBERS[1].cells[row]]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 200])
def test_prose_is_wrapped_between_words_and_nothing_is_lost(width: int) -> None:
    words = " ".join(printed(PROSE, width)).split()
    for column in PROSE:
        for cell in column.cells:
            assert sorted(set(cell.split())) == sorted(set(cell.split()) & set(words))


def test_what_fits_is_one_table_and_what_does_not_is_a_list() -> None:
    assert sum("method" in line and "source" in line for line in printed(PROSE, 200)) == 1
    narrow = [line.strip() for line in printed(PROSE, 60)]
    assert {"atp", "relp"} <= set(narrow)
    assert not any(line.startswith("source") for line in narrow[narrow.index("relp") :])  # empty cells have no line
