"""Numbers in tables equal the inputs, in every form."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from relp_cli.errors import RelpError
from relp_cli.report.tables import cell, cells, latex, markdown, show, table5, write_table
from tests.report.made import agreement_rows


def printed(table, title=None):
    console = Console(width=200, record=True, color_system=None, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        show(table, console, title)
    return console.export_text()


def test_table5_has_one_row_per_model_and_the_numbers_of_the_comparison():
    rows = agreement_rows()
    table = table5(rows)
    assert list(table.columns) == ["model", "task", "residual atp", "residual relp", "MLP atp", "MLP relp"]
    for model in ("gpt2", "tiny"):
        for title, kind in (("residual", "resid_pre"), ("MLP", "mlp_out")):
            for method in ("atp", "relp"):
                want = rows[(rows.model == model) & (rows.kind == kind) & (rows.method == method)].pcc.item()
                assert table.set_index("model").loc[model, f"{title} {method}"] == want
    assert table5(rows, "spearman")["residual atp"].tolist() == pytest.approx([0.25, 0.3])


def test_table5_makes_rows_of_what_else_varies_and_refuses_doubles():
    rows = agreement_rows()
    both = pd.concat([rows.assign(direction="noising"), rows.assign(direction="denoising")])
    assert table5(both).direction.tolist() == ["noising", "noising", "denoising", "denoising"]
    with pytest.raises(RelpError, match="several rows for gpt2, resid_pre, atp"):
        table5(pd.concat([rows, rows]))
    with pytest.raises(RelpError, match="no column 'kind'"):
        table5(rows.drop(columns="kind"))


def test_missing_values_are_dashes_with_a_note():
    rows = agreement_rows()
    rows.loc[0, ["pcc", "note"]] = [np.nan, "estimate is constant"]
    rows = rows.drop(index=7)
    table = table5(rows)
    assert table.attrs["notes"] == ["gpt2, ioi, resid_pre, atp: estimate is constant"]
    text = printed(table, "a title [with brackets]")
    assert "a title [with brackets]" in text
    assert " ".join(text.split()).count("gpt2 ioi — 0.700 0.520 0.720 tiny ioi 0.600 0.800 0.620 —") == 1
    assert "  gpt2, ioi, resid_pre, atp: estimate is constant" in text
    assert "- gpt2, ioi" in markdown(table)


def test_the_best_of_each_kind_is_bold_also_when_shown_numbers_tie():
    rows = agreement_rows()
    rows.loc[:1, "pcc"] = [0.90001, 0.90002]
    table = table5(rows)
    first = markdown(table).splitlines()[2]
    assert first == "| gpt2 | ioi | **0.900** | **0.900** | 0.520 | **0.720** |"
    assert r"gpt2 & ioi & \textbf{0.900} & \textbf{0.900} & 0.520 & \textbf{0.720} \\" in latex(table)


def test_markdown_and_latex_escape_what_they_must():
    table = pd.DataFrame({"a_b|c": ["50 % of_x|y", "τ ≥ {1}\\"], "n": [1, 2]})
    assert markdown(table).splitlines() == [
        r"| a_b\|c | n |", "| :--- | ---: |", r"| 50 % of_x\|y | 1 |", "| τ ≥ {1}\\ | 2 |",
    ]  # fmt: skip
    assert r"50 \% of\_x|y & 1 \\" in latex(table)
    assert r"$\tau$ $\geq$ \{1\}\textbackslash{} & 2 \\" in latex(table)


def test_files_hold_the_numbers_in_full(tmp_path):
    table = table5(agreement_rows().assign(pcc=lambda t: t.pcc + 1 / 3e5))
    write_table(table, tmp_path / "t.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), table)
    for ending in (".md", ".tex"):
        write_table(table, tmp_path / f"t{ending}")
    assert (tmp_path / "t.md").read_text() == markdown(table)
    assert (tmp_path / "t.tex").read_text() == latex(table)


def test_parquet_or_one_clear_line(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    table = table5(agreement_rows())
    write_table(table, tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), table)
    with pytest.raises(RelpError, match="cannot be written as parquet"):
        write_table(pd.DataFrame({"a": [1, "x"]}), tmp_path / "u.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RelpError, match="needs pyarrow"):
        write_table(table, tmp_path / "v.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_bad_paths_are_one_line(tmp_path):
    table = table5(agreement_rows())
    with pytest.raises(RelpError, match=r"unknown file ending '\.xlsx'; expected one of \.csv"):
        write_table(table, tmp_path / "t.xlsx")
    (tmp_path / "file").write_text("")
    with pytest.raises(RelpError, match="cannot write"):
        write_table(table, tmp_path / "file" / "t.csv")


def test_show_leaves_out_an_empty_note_column():
    table = pd.DataFrame({"n": [1], "note": [""]})
    assert "note" not in printed(table)
    assert "ill-posed" in printed(table.assign(note="ill-posed"))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (None, "—"), (float("nan"), "—"), (0.0, "0.000"), (0.00012, "0.00012"), (3, "3"), (-1.5, "-1.500"),
     (1e6, "1e+06"), (float("inf"), "inf"), ("x", "x")],
)  # fmt: skip
def test_cells(value, text):
    assert cell(value) == text


def test_csv_cells_are_no_formulas_and_numbers_stay_numbers(tmp_path):
    table = pd.DataFrame({"task": ["=1+1", "+x", "-x", "@x", "a=b"], "score": [-1.5, 2, 3, 4, -5]})
    write_table(table, tmp_path / "table.csv")
    again = pd.read_csv(tmp_path / "table.csv")
    assert again.task.tolist() == ["'=1+1", "'+x", "'-x", "'@x", "a=b"]
    assert again.score.tolist() == [-1.5, 2, 3, 4, -5]


def test_a_columns_numbers_have_one_form():
    """So many decimals, whatever is small beside the others; the exceptions are what is small on purpose, and counts."""
    table = pd.DataFrame({"random": [0.06, -5.2e-10, -0.0004], "tiny": [2e-7, -1e-5, 0.0], "p": [1e-9, 0.04, 0.5],
                          "passes": [4.0, 32.0, 2.5], "rejected": [True, False, True]})  # fmt: skip
    columns = list(zip(*cells(table), strict=True))
    assert columns[0] == ("0.060", "0.000", "0.000")
    assert columns[1] == ("2e-07", "-1e-05", "0.000")
    assert columns[2] == ("1e-09", "0.04", "0.5")
    assert columns[3] == ("4", "32", "2.5")
    assert columns[4] == ("yes", "no", "yes")
