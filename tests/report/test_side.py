"""Methods side by side: what the page's tables, maps and correlations say is what the scores are."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from relp_cli.errors import RelpError
from relp_cli.report.maps import map_set
from relp_cli.report.page import Page, Sheet, render_sections
from relp_cli.report.side import correlations, side_by_side, units_by_method
from relp_cli.spaces.scores import Scores
from tests.report.browser import in_browser, told
from tests.report.made import node_scores, scores

DRIVER = """
told.maps = all("#one svg[data-kind=mlp_out]").length;
told.tip = hover(all("#one svg[data-kind=mlp_out]")[1].querySelector('rect[data-layer="2"][data-at="3"]'));
const plot = all("#one svg.scatter")[0], box = plot.getBoundingClientRect();
plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
told.farthest = document.getElementById("tip").textContent;
told.plots = all("#one svg.scatter").length;
told.titles = all("#one figcaption").map((f) => f.textContent);
told.first = rows("[data-table=units-one]")[0];
told.count = all("[data-table=units-one] .count")[0].textContent;
told.same = all(".same").map((p) => p.textContent);
told.columns = all("[data-table=folded] th").map((th) => th.textContent);
"""


@pytest.fixture
def methods() -> dict[str, Scores]:
    exact = scores("act_patch", node_scores("mlp_out", 3, 5, seed=3), node_scores("head", 3, 5, 2, seed=4))
    near = replace(exact, mean=exact.mean * 2 + 0.1, meta={**exact.meta, "method": "atp"})
    size = scores(
        "delta", node_scores("mlp_out", 3, 5, seed=5, signed=False), node_scores("head", 3, 5, 2, signed=False)
    )
    return {"atp": near, "act_patch": exact, "delta": size}


def test_correlations_are_numpys_and_unsigned_methods_meet_sizes(methods):
    table = correlations(methods).set_index(["kind", "method"])
    exact, delta = (methods[m]["head"].mean.numpy().ravel() for m in ("act_patch", "delta"))
    assert table.loc[("heads", "atp"), "act_patch"] == pytest.approx(1)
    assert table.loc[("heads", "delta"), "act_patch"] == pytest.approx(np.corrcoef(delta, np.abs(exact))[0, 1])
    assert table.loc[("heads", "act_patch"), "delta"] == table.loc[("heads", "delta"), "act_patch"]


def test_a_row_has_one_scale_which_is_that_of_exact_patching(methods):
    made = map_set(methods)
    assert made is not None
    row = made["rows"][0]
    assert [panel["name"] for panel in row["panels"]] == ["act_patch", "atp", "delta"]
    assert row["limit"] == pytest.approx(float(methods["act_patch"]["mlp_out"].mean.abs().max()), rel=1e-5)
    assert row["beyond"]
    np.testing.assert_allclose(row["panels"][1]["mean"], methods["atp"]["mlp_out"].mean, rtol=1e-5)


def test_every_unit_has_every_methods_score(methods):
    table, of = units_by_method(methods)
    assert (len(table), of) == (45, 45)
    for row in table.to_dict("records"):
        at = methods["act_patch"].labels.index(row["position"])
        for name, one in methods.items():
            view = one[row["kind"]].mean
            value = view[row["layer"], at] if view.ndim == 2 else view[row["layer"], at, row["unit"]]
            assert row[name] == pytest.approx(float(value), rel=1e-5)
    few, of = units_by_method(methods, 7)
    assert (len(few), of) == (7, 45)
    exact = methods["act_patch"]
    none = {name: replace(exact, mean=torch.where(exact.mean > 0, exact.mean, 0.0)) for name in "ab"}
    assert units_by_method(none)[1] == int((exact.mean > 0).sum())  # what is 0 everywhere is no row


def test_what_cannot_stand_side_by_side_is_one_line(methods):
    other = scores("relp", node_scores("mlp_out", 2, 5))
    with pytest.raises(RelpError, match="cannot stand side by side"):
        side_by_side("one", "t", {"a": methods["atp"].only(["mlp_out"]), "b": other})
    with pytest.raises(RelpError, match="no node kind in common"):
        side_by_side("one", "t", {"a": methods["atp"].only(["head"]), "b": other})


def test_columns_that_are_the_same_everywhere_are_said_once():
    plain = Sheet("t", pd.DataFrame({"task": ["a", "a"], "x": [1.5, None], "n": [3, 3]}), fold=True).plain()
    assert plain["columns"] == ["x"]
    assert plain["same"] == [["task", "a"], ["n", 3]]
    assert (plain["types"], plain["rows"]) == (["float"], [[1.5], [None]])


@in_browser
def test_in_a_browser(methods, tmp_path):
    section = side_by_side("one", "<b>one", methods)
    folded = replace(section, id="two", maps=None, scatters=None,
                     sheets=(Sheet("folded", pd.DataFrame({"task": ["<i>", "<i>"], "x": [1, 2]}), fold=True),))  # fmt: skip
    page = tmp_path / "page.html"
    page.write_text(render_sections(Page("</script>", "about", (section, folded))))
    text = page.read_text()
    assert not re.search(r"<script[^>]* src|<link|@import|url\(|fetch\(|(src|srcset|href)=\"(?!data:|#)", text)
    assert "default-src 'none'" in text
    assert text.count("<script") == 2  # the page's own: data and code
    said = told(page, DRIVER)
    exact, atp = methods["act_patch"]["mlp_out"].mean, methods["atp"]["mlp_out"].mean
    assert said["maps"] == 3
    assert said["tip"].startswith(
        f"MLP, layer 2, S2: atp: {atp[2, 3]:.4f} ± 0.2500 (n = 4); act_patch {exact[2, 3]:.4f}; "
    )
    far = (atp - exact).abs().max()
    layer, at = ((atp - exact).abs() == far).nonzero()[0].tolist()
    label = methods["atp"].labels[at]
    assert (
        said["farthest"]
        == f"mlp_out, layer {layer}, {label}: atp {atp[layer, at]:.4f}, act_patch {exact[layer, at]:.4f}"
    )
    assert said["plots"] == 4  # 2 kinds × 2 methods
    slope = float((atp * exact).sum() / (exact * exact).sum())
    assert f"MLP: atp · PCC 1.000 · slope {slope:.2f}" in said["titles"]
    assert said["count"] == "45 of 45; page 1 of 2"
    assert max(abs(float(v)) for v in said["first"][5:6]) == pytest.approx(
        float(methods["act_patch"].mean.abs().max()), abs=1e-4
    )
    assert (said["same"], said["columns"]) == (["task <i>"], ["x"])
