"""The page's own script, in a real browser: what it shows is what the score file holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from relp_cli.report.explore import MOST, explorer
from relp_cli.report.html import write_html
from relp_cli.report.maps import map_set
from relp_cli.report.page import script_text
from relp_cli.spaces.scores import Scores
from tests.report.made import evaluation, node_scores, scores

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = """
<script>
const told = {};
const set = (id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event("input")); };
const search = (value) => { document.querySelector("#units input").id = "search"; set("search", value); };
const rows = () => [...document.querySelectorAll("#units tbody tr")].map((r) => [...r.children].map((c) => c.textContent));
const tipAt = (kind, layer, at) => {
  const rect = document.querySelector(`svg[data-kind=${kind}] rect[data-layer="${layer}"][data-at="${at}"]`);
  rect.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: 5, clientY: 5 }));
  return document.getElementById("tip").textContent;
};
told.tips = { mlp_out: tipAt("mlp_out", 2, 3), head: tipAt("head", 1, 4) };
told.rows = rows();
told.count = document.querySelector("#units .count").textContent;
set("tau", 7);
told.tau = document.getElementById("tau-line").textContent;
told.kept = document.querySelectorAll("#scores rect.kept").length;
told.keptRows = rows().length;
set("tau", document.getElementById("tau").max);
search("head end");
told.searched = rows();
search("");
document.querySelectorAll("#units th button")[1].click();
told.byLayer = rows().map((r) => +r[1]);
document.querySelectorAll("#units .tools button")[2].click();
told.page2 = document.querySelector("#units .count").textContent;
const svg = document.querySelector("svg[data-kind=mlp_out]");
svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown" }));
told.key = document.getElementById("tip").textContent;
document.body.append(Object.assign(document.createElement("pre"), { id: "told", textContent: JSON.stringify(told) }));
</script>
"""


@pytest.fixture
def own() -> Scores:
    return scores("relp", node_scores("mlp_out", 4, 5), node_scores("head", 4, 5, 3, seed=1))


def test_numbers_are_those_of_the_scores(own: Scores) -> None:
    data = explorer(own, evaluation(points={1: 0.0, 10: 0.5}), None)
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


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")
def test_in_a_browser(own: Scores, tmp_path: Path) -> None:
    (page, *_) = write_html(tmp_path, {}, {"relp": own}, None, evaluation(), ["<bos>", "a", "b<i>", "c", "to"])
    page.write_text(page.read_text().replace("</body>", DRIVER + "</body>"))
    done = _dom(page)
    told = json.loads(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)[1])  # type: ignore[index]
    assert "CONSOLE" not in done.stderr
    mean = own["mlp_out"].mean
    assert told["tips"]["mlp_out"] == f"MLP, layer 2, S2 ‘c’: {mean[2, 3]:.4f} ± 0.2500 (n = 4)"
    assert f": {own['head'].mean[1, 4].sum():.4f} (n = 4)" in told["tips"]["head"]
    assert told["key"] == f"MLP, layer 3, S2 ‘c’: {mean[3, 3]:.4f} ± 0.2500 (n = 4)"  # below where the pointer was
    size = torch.cat([own[kind].mean.flatten() for kind in own]).abs()
    assert float(told["rows"][0][4]) == pytest.approx(float(size.max()) * np.sign(float(told["rows"][0][4])), abs=1e-4)
    assert told["count"] == "80 of 80; page 1 of 2"
    tau, count = explorer(own, None, None)["steps"][7]
    assert told["tau"].startswith(f"τ = {tau:.4f}: {count} of 80 units".replace("0.0000", "0"))
    assert "faithfulness" in told["tau"]
    assert told["keptRows"] == min(count, 50)
    assert 0 < told["kept"] <= count
    assert len(told["searched"]) == 12  # 4 layers × 3 heads at the end
    assert all(row[0] == "head" and row[2].startswith("end") for row in told["searched"])
    assert told["byLayer"] == sorted(told["byLayer"])
    assert told["page2"] == "80 of 80; page 2 of 2"


def _dom(page: Path) -> Any:
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--dump-dom",
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)  # type: ignore[arg-type]
