"""The page's own script, in a real browser: what it shows is what the score file holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from relp_cli.report.explore import MOST, explorer
from relp_cli.report.html import write_html
from relp_cli.report.maps import map_set
from relp_cli.report.page import script_text
from relp_cli.spaces.scores import Scores
from tests.report.browser import in_browser, told
from tests.report.made import LABELS, evaluation, node_scores, scores

DRIVER = """
const tau = document.getElementById("tau"), search = document.querySelector("#units input");
told.tips = { mlp_out: hover(cell("mlp_out", 2, 3)), head: hover(cell("head", 1, 4)) };
hover(cell("mlp_out", 2, 3));
document.querySelector("svg[data-kind=mlp_out]").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown" }));
told.key = document.getElementById("tip").textContent;
told.rows = rows("#units");
told.count = document.querySelector("#units .count").textContent;
set(tau, 7);
told.tau = document.getElementById("tau-line").textContent;
told.kept = all("#scores rect.kept").length;
told.keptRows = rows("#units").length;
set(tau, tau.max);
set(search, "head end");
told.searched = rows("#units");
set(search, "");
all("#units th button")[1].click();
told.byLayer = rows("#units").map((r) => +r[1]);
all("#units .tools button")[2].click();
told.page2 = document.querySelector("#units .count").textContent;
set(document.getElementById("pair-choice"), 2, "change");
told.pair = hover(cell("pair-mlp_out", 1, 2));
told.marks = all("#pair mark").map((m) => m.textContent);
told.facts = all("#pair dd").map((d) => d.textContent);
told.own = rows("#pair .full");
const curve = document.querySelector("svg[data-measure=faithfulness]");
for (const key of ["ArrowRight", "ArrowRight"]) curve.dispatchEvent(new KeyboardEvent("keydown", { key }));
told.curve = document.getElementById("tip").textContent;
told.bands = all("#evaluation ~ [data-curves] .band").length;
"""

QUICK = """
const took = (what) => { const before = performance.now(); what(); return performance.now() - before; };
const tau = document.getElementById("tau");
told.count = document.querySelector("#units .count").textContent;
told.slide = took(() => set(tau, tau.max - 1));
told.search = took(() => set(document.querySelector("#units input"), "end 7"));
told.sort = took(() => all("#units th button")[1].click());
"""

PAIRS = {
    "metric": "logit_diff", "of": 4, "roles": [list(LABELS)], "shared": {},
    "pairs": [
        {"batch": 0, "original": ["<bos>", " a", f" <i>{i}", " c", " to"], "patch": ["<bos>", " a", " X", " c", " to"],
         "answer": {"words": [" yes", " aye"], "of": 9}, "foil": {"words": [" no"], "of": 1}, "metric_original": 2.5,
         "metric_patch": -1.25, "correct": False}
        for i in range(4)
    ],
}  # fmt: skip


@pytest.fixture
def own() -> Scores:
    made = scores("relp", node_scores("mlp_out", 4, 5), node_scores("head", 4, 5, 3, seed=1))
    noise = torch.randn(4, len(made.mean), generator=torch.Generator().manual_seed(2))
    return replace(made, examples=made.mean + noise, present=torch.ones(4, 5, dtype=torch.bool))


def test_numbers_are_those_of_the_scores(own: Scores) -> None:
    points = {1: 0.0, 10: 0.5}
    assert explorer(own, evaluation(points=points, kind="head"), None)["curve"] == []  # not what the slider keeps
    data = explorer(own, evaluation(points=points, kind="mlp_out+head"), None)
    maps = map_set({"relp": own})
    panels = {row["kind"]: row["panels"][0] for row in maps["rows"]}  # type: ignore[index]
    np.testing.assert_allclose(panels["mlp_out"]["mean"], own["mlp_out"].mean, rtol=1e-5)
    np.testing.assert_allclose(panels["mlp_out"]["se"], (0.25 / 4) ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(panels["head"]["mean"], own["head"].mean.sum(2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(panels["head by unit"]["mean"], own["head"].mean.sum(1), rtol=1e-5, atol=1e-6)
    assert panels["head"]["se"] is None
    assert len(data["rows"]) == data["of"] == 80
    size = torch.cat([own[kind].mean.flatten() for kind in own]).abs()
    assert data["steps"][0][1] == 0
    assert data["steps"][-1][1] == 80
    assert all(int((size > tau).sum()) == count for tau, count in data["steps"])
    assert [row["faithfulness"] for row in data["curve"]] == [0.0, 0.5]


def test_many_units_are_cut_to_the_strongest_and_text_cannot_end_the_script() -> None:
    wide = scores("relp", node_scores("mlp_neuron", 4, 5, 1000))
    data = explorer(wide, pd.DataFrame(), ["</script><b>", "&", "a", "b", "c"])
    assert (len(data["rows"]), data["of"]) == (MOST, 20_000)
    sizes = [abs(row[4]) for row in data["rows"]]
    assert sizes == sorted(sizes, reverse=True)
    text = script_text(data)
    assert "<" not in text
    assert json.loads(text)["tokens"][0] == "</script><b>"


@in_browser
def test_in_a_browser(own: Scores, tmp_path: Path) -> None:
    shared = ["<bos>", "a", "b<i>", "c", ""]
    (page, *_) = write_html(tmp_path, {}, {"relp": own}, None, evaluation(kind="mlp_out+head"), shared, pairs=PAIRS)
    said = told(page, DRIVER)
    mean = own["mlp_out"].mean
    assert said["tips"]["mlp_out"] == f"MLP, layer 2, S2 ‘c’: {mean[2, 3]:.4f} ± 0.2500 (n = 4)"
    assert f": {own['head'].mean[1, 4].sum():.4f} (n = 4)" in said["tips"]["head"]
    assert said["key"] == f"MLP, layer 3, S2 ‘c’: {mean[3, 3]:.4f} ± 0.2500 (n = 4)"  # below where the pointer was
    size = torch.cat([own[kind].mean.flatten() for kind in own]).abs()
    assert float(said["rows"][0][4]) == pytest.approx(float(size.max()) * np.sign(float(said["rows"][0][4])), abs=1e-4)
    assert said["count"] == "80 of 80; page 1 of 4"
    tau, count = explorer(own, None, None)["steps"][7]
    assert said["tau"].startswith(f"τ = {tau:.4f}: {count} of 80 units".replace("0.0000", "0"))
    assert "faithfulness" in said["tau"]
    assert said["keptRows"] == min(count, 25)
    assert 0 < said["kept"] <= count
    assert len(said["searched"]) == 12  # 4 layers × 3 heads at the end
    assert all(row[0] == "head" and row[2].startswith("end") for row in said["searched"])
    assert said["byLayer"] == sorted(said["byLayer"])
    assert said["page2"] == "80 of 80; page 2 of 4"
    examples = own["mlp_out"].examples
    assert examples is not None
    column = LABELS.index("IO")
    assert said["pair"] == (
        f"MLP, layer 1, IO ‘ <i>2’ → ‘ X’: {examples[2, 1, column]:.4f} in this pair; "
        f"mean {mean[1, column]:.4f} ± 0.2500 over 4 pairs"
    )
    assert (said["curve"], said["bands"]) == ("relp, 10 nodes: faithfulness 0.500 [0.400, 0.600]", 2)
    assert said["marks"] == [" <i>2", " X"]
    assert said["facts"] == ["‘ yes’, ‘ aye’ … (9 words)", "‘ no’", "2.500", "-1.250", "no"]
    units = own.examples[2].abs()  # type: ignore[index]
    assert [abs(float(row[4])) for row in said["own"]] == pytest.approx(
        units.sort(descending=True).values[:15].tolist(), abs=1e-4
    )


@in_browser
def test_ten_thousand_units_stay_small_and_quick(tmp_path: Path) -> None:
    wide = scores("relp", node_scores("mlp_neuron", 30, 5, 100))
    (page, *_) = write_html(tmp_path, {}, {"relp": wide})
    assert page.stat().st_size < 5_000_000
    said = told(page, QUICK)
    assert said["count"].startswith("10000 of the 10000 strongest of 15000")
    assert max(said["slide"], said["search"], said["sort"]) < 1000  # milliseconds; a few dozens where nothing else runs
