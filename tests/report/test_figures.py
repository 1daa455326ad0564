"""What figures show equals the data they were given; files are valid and reproducible; bad input is one line."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from relp_cli.errors import RelpError
from relp_cli.report.canvas import method_colors, rendered
from relp_cli.report.curves import curve, mean_curve, reach
from relp_cli.report.figures import (
    agreement_bars,
    agreement_figure,
    curves_figure,
    faithfulness_curves,
    heatmap_figure,
    heatmaps,
)
from tests.report.made import LABELS, agreement_rows, evaluation, node_scores, scores


@pytest.fixture
def three():
    """relp, delta (unsigned) and act_patch; two kinds."""
    return {
        "relp": scores("relp", node_scores("resid_pre", 3, 5, seed=1), node_scores("mlp_out", 3, 5, seed=2)),
        "delta": scores(
            "delta", node_scores("resid_pre", 3, 5, seed=3, signed=False), node_scores("mlp_out", 3, 5, signed=False)
        ),
        "act_patch": scores("act_patch", node_scores("resid_pre", 3, 5, seed=4), node_scores("mlp_out", 3, 5, seed=5)),
    }


def panels(figure):
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def shown(axes):
    return np.asarray(axes.images[0].get_array())


def test_heatmaps_put_exact_patching_first_and_share_its_scale(three):
    first, second, third, *_ = panels(heatmap_figure(three, ["resid_pre", "mlp_out"], "t"))
    exact = three["act_patch"]["resid_pre"].mean.numpy()
    np.testing.assert_allclose(shown(first), exact)
    np.testing.assert_allclose(shown(second), three["relp"]["resid_pre"].mean.numpy())
    for axes in (first, second, third):
        norm = axes.images[0].norm
        assert (-norm.vmin, norm.vmax) == pytest.approx((np.abs(exact).max(),) * 2)


def test_panel_titles_have_numpys_pcc(three):
    titles = [axes.get_title(loc="left") for axes in panels(heatmap_figure(three, ["mlp_out"], "t"))]
    exact = three["act_patch"]["mlp_out"].mean.numpy().ravel()
    relp, delta = (three[m]["mlp_out"].mean.numpy().ravel() for m in ("relp", "delta"))
    assert titles == [
        "act_patch",
        f"relp · PCC {np.corrcoef(relp, exact)[0, 1]:.3f}",
        f"delta · PCC with |exact| {np.corrcoef(delta, np.abs(exact))[0, 1]:.3f}",
    ]


def test_a_constant_array_has_no_pcc(three):
    constant = node_scores("mlp_out", 3, 5)
    three["relp"] = scores("relp", type(constant)(**{**vars(constant), "mean": torch.ones(3, 5)}))
    del three["delta"]
    assert panels(heatmap_figure(three, ["mlp_out"], "t"))[1].get_title(loc="left") == "relp · PCC —"


@pytest.mark.parametrize(("over", "axis"), [("units", -1), ("positions", 1)])
def test_kinds_with_units_are_summed_and_say_so(over, axis):
    heads = {m: scores(m, node_scores("head", 3, 5, 2, seed=s)) for s, m in enumerate(("act_patch", "relp"))}
    first, second = panels(heatmap_figure(heads, ["head"], "t", over=over))
    mine, exact = (heads[m]["head"].mean.numpy().sum(axis) for m in ("relp", "act_patch"))
    np.testing.assert_allclose(shown(second), mine, rtol=1e-5)
    assert f"Σ over {over}" in first.get_ylabel()
    assert second.get_title(loc="left") == f"relp · PCC {np.corrcoef(mine.ravel(), exact.ravel())[0, 1]:.3f}"


def test_positions_are_labelled_with_roles_and_tokens(three):
    tokens = ["<bos>", "", "a$", "\n", " "]
    last = panels(heatmap_figure(three, ["mlp_out"], "t", tokens))[-1]
    assert [label.get_text() for label in last.get_xticklabels()] == list(LABELS)
    assert [text.get_text() for text in last.texts] == ["<bos>", "a$", "↵", "␣"]  # "": pairs differ


def test_a_token_that_the_font_lacks_is_no_warning(three):
    assert rendered(heatmap_figure(three, ["mlp_out"], "t", ["中", "文", "x", "y", "z"])).startswith(b"\x89PNG")


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml"), ("pdf", b"%PDF-")])
def test_files_are_what_they_are_called_and_reproducible(tmp_path, three, ending, start):
    draw = {
        "heat": lambda p: heatmaps(three, ["resid_pre", "mlp_out"], p, "t"),
        "bars": lambda p: agreement_bars(agreement_rows(), p),
        "curves": lambda p: faithfulness_curves(evaluation(), p),
    }
    for name, write in draw.items():
        one, two = tmp_path / f"{name}1.{ending}", tmp_path / f"{name}2.{ending}"
        write(one)
        write(two)
        assert one.read_bytes().startswith(start)
        assert one.read_bytes() == two.read_bytes()
    assert len(list(tmp_path.iterdir())) == 6


def test_heatmaps_refuse_what_does_not_fit(tmp_path, three):
    with pytest.raises(RelpError, match=r"'\.gif'; expected one of \.png, \.svg, \.pdf"):
        heatmaps(three, ["mlp_out"], tmp_path / "a.gif", "t")
    with pytest.raises(RelpError, match=r"unknown node kind .* did you mean 'mlp_out'"):
        heatmaps(three, ["mlp_outt"], tmp_path / "a.png", "t")
    with pytest.raises(RelpError, match="4 tokens for 5 positions"):
        heatmaps(three, ["mlp_out"], tmp_path / "a.png", "t", ["x"] * 4)
    with pytest.raises(RelpError, match="no units"):
        heatmap_figure(three, ["mlp_out"], "t", over="positions")
    three["relp"] = scores("relp", node_scores("mlp_out", 2, 5))
    with pytest.raises(RelpError, match="same layers and columns"):
        heatmaps(three, ["mlp_out"], tmp_path / "a.png", "t")
    with pytest.raises(RelpError, match="no scores"):
        heatmaps({}, ["mlp_out"], tmp_path / "a.png", "t")
    assert not list(tmp_path.iterdir())


def test_bars_are_as_high_as_the_pccs_with_their_intervals():
    table = agreement_rows()
    axes = agreement_figure(table).axes
    assert [a.get_title(loc="left") for a in axes] == ["residual", "MLP"]
    for one, kind in zip(axes, ("resid_pre", "mlp_out"), strict=True):
        rows = table[table.kind == kind]
        heights = sorted(bar.get_height() for bar in one.patches)
        assert heights == pytest.approx(sorted(rows.pcc))
        intervals = [list(line.get_ydata()) for line in one.lines if line.get_color() == "#1d2129"]
        np.testing.assert_allclose(sorted(intervals), sorted(rows[["pcc_lo", "pcc_hi"]].to_numpy().tolist()))


def test_bars_mark_what_is_missing_and_refuse_doubles():
    table = agreement_rows()
    table.loc[0, "pcc"] = np.nan
    assert [text.get_text() for text in agreement_figure(table).axes[0].texts] == ["n/a"]
    with pytest.raises(RelpError, match="2 rows for gpt2, relp, resid_pre"):
        agreement_figure(pd.concat([table, table.iloc[[1]]]))
    with pytest.raises(RelpError, match="no column 'pcc'"):
        agreement_figure(table.drop(columns="pcc"))
    with pytest.raises(RelpError, match="no rows"):
        agreement_figure(table.iloc[:0])


def test_mean_curve_by_hand():
    """Linear in log x: at 10 the first is halfway, the second has reached 1."""
    x, y = mean_curve([(np.array([1.0, 100]), np.array([0.0, 1])), (np.array([1.0, 10, 1000]), np.array([0.0, 1, 1]))])
    assert x.tolist() == [1, 10, 100]
    assert y == pytest.approx([0, 0.75, 1])


def test_mean_curve_needs_data_of_all():
    apart = [(np.array([1.0, 2]), np.zeros(2)), (np.array([5.0, 9]), np.zeros(2))]
    assert len(mean_curve(apart)[0]) == 0
    assert len(mean_curve([])[0]) == 0
    assert len(mean_curve([apart[0], (np.array([]), np.array([]))])[0]) == 0


def test_where_a_curve_reaches_a_value():
    one = (np.array([1.0, 100, 1000]), np.array([0.0, 1, 0.5]))
    assert [reach(one, v) for v in (-1, 0.5, 1)] == pytest.approx([1, 10, 100])
    assert np.isnan(reach(one, 1.1))


def test_a_curve_is_sorted_without_zero_and_missing_points():
    table = pd.DataFrame({"n": [10, 0, 1, 10, 5], "f": [1.0, 9.0, 0.0, 2.0, np.nan]})
    x, y = curve(table, "n", "f")
    assert (x.tolist(), y.tolist()) == ([1, 10], [0, 1.5])


def lines(axes, color):
    return [line for line in axes.lines if to_hex(line.get_color()) == color]


def test_curves_show_each_structure_faintly_and_their_mean_in_bold():
    table = pd.concat([evaluation("a", points={1: 0, 100: 1}), evaluation("b", points={1: 0, 10: 1, 100: 1})])
    left, right = curves_figure(table).axes
    *faint, bold = lines(left, method_colors(["relp"])["relp"])
    assert [line.get_alpha() for line in faint] == [0.35, 0.35]
    assert bold.get_xdata() == pytest.approx([1, 10, 100])
    assert bold.get_ydata() == pytest.approx([0, 0.75, 1])
    assert lines(right, method_colors(["relp"])["relp"])[-1].get_ydata() == pytest.approx([1, 0.25, 0])
    assert left.get_xscale() == "log"
    assert {0, 1} <= {line.get_ydata()[0] for line in left.lines if line.get_linestyle() == ":"}


def test_an_empty_circuit_stands_at_the_left_edge_over_0():
    axes = curves_figure(evaluation(points={0: 0.25, 4: 0.5, 400: 1.0})).axes[0]
    ring = next(line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1)
    assert ring.get_ydata() == pytest.approx([0.25])
    assert axes.get_xlim()[0] < ring.get_xdata()[0] < 4
    assert (
        dict(zip(axes.get_xticks(), (t.get_text() for t in axes.get_xticklabels()), strict=True))[ring.get_xdata()[0]]
        == "0"
    )


def test_random_circuits_are_dashed():
    axes = curves_figure(evaluation(random_faithfulness=0.125, random_completeness=0.5)).axes[0]
    dashed = [line for line in axes.lines if len(line.get_xdata()) == 3 and line.is_dashed()]
    assert [list(line.get_ydata()) for line in dashed] == [[0.125] * 3]


def test_seeds_are_structures_directions_are_lines():
    table = pd.concat([evaluation(seed=0, direction="noising"), evaluation(seed=1, direction="noising"),
                       evaluation(seed=0, direction="denoising")])  # fmt: skip
    figure = curves_figure(table)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["relp (noising)", "relp (denoising)"]
    colors = method_colors(["relp (noising)", "relp (denoising)"])
    assert [len(lines(figure.axes[0], color)) for color in colors.values()] == [3, 1]


def test_points_beyond_the_axis_are_counted():
    table = pd.concat([evaluation("a", points={1: 0, 10: 9, 100: 1}), evaluation("b", points={1: 0, 10: -9, 100: 1})])
    assert "2 points beyond the axis" in [t.get_text() for t in curves_figure(table).axes[0].texts]


def test_curves_refuse_tables_without_numbers():
    with pytest.raises(RelpError, match="no column 'task'"):
        curves_figure(evaluation().drop(columns="task"))
    with pytest.raises(RelpError, match="no finite"):
        curves_figure(evaluation().assign(faithfulness=np.nan, completeness=np.nan))


def test_figures_use_no_pyplot_and_the_package_loads_none_of_it():
    check = (
        "import sys, relp_cli; assert not {'matplotlib', 'pandas', 'torch'} & set(sys.modules); "
        "import relp_cli.report.figures; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
