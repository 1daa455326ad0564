"""The interactive graph: its data are the scores', and what a browser shows of them is what the files say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from relp_cli.report.circuit_graph import MOST, graph_data, graph_section
from relp_cli.report.graph_places import BAR, LINE, LINES, Mark, placed
from relp_cli.report.html import write_html
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.edges import EdgeScores
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.scores import Scores
from tests.report.browser import in_browser
from tests.report.browser import told as told_by
from tests.report.made import LABELS, evaluation, node_scores, scores
from tests.report.test_graph import three_features


def edge_scores(seed: int = 0, labels: tuple[str, ...] = ("*",), method: str = "relp") -> Scores:
    graph = Graph(3, 2)
    shape = graph.mask.shape if labels == ("*",) else (len(labels), *graph.mask.shape)
    mean = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * graph.mask
    axis = "all" if labels == ("*",) else "position"
    meta = {"method": method, "direction": "noising", "metric": "logit_diff", "signed": True}
    n = torch.full((len(labels),), 4)
    return EdgeScores(graph, mean, graph.mask.expand(shape) * 0.25, n, labels, axis, meta=meta).whole


def swept(own: Scores, taus: tuple[float, ...]) -> pd.DataFrame:
    """A sweep's table: faithfulness 1 − τ/10, so that every row is known by its number."""
    kept = [int((own.mean.abs() > tau).sum()) for tau in taus]
    columns = {"tau": taus, "n_nodes": kept, "n_possible": own.n_nodes, "n_pairs": 7, "ablation": "mean"}
    for name, sign in (("faithfulness", 1), ("completeness", -1)):
        values = [(sign < 0) + sign * (1 - tau / 10) for tau in taus]
        columns |= {name: values, f"{name}_lo": [v - 0.01 for v in values], f"{name}_hi": [v + 0.02 for v in values]}
    return pd.DataFrame(columns)


def test_edges_stand_between_their_writers_and_readers_and_lead_upwards() -> None:
    own, other = edge_scores(), edge_scores(1, method="atp")
    circuit = select(own, top_k=9)
    data = graph_data({"relp": own, "atp": other}, circuit, swept(own, (0.5, 1.5)))
    json.dumps(data, allow_nan=False)
    graph: Graph = own.units.structure
    units, names, y = data["units"], data["nodes"]["name"], data["layouts"]["all"]["y"]
    order = own.mean.abs().argsort(descending=True)
    np.testing.assert_allclose(units["score"], own.mean[order], rtol=1e-6)
    assert set(units["se"]) == {0.25}
    assert sum(units["kept"]) == 9 == sum(units["kept"][:9])
    for i, unit in enumerate(order.tolist()):
        writer, _, reader = graph.edge_names()[unit].partition("->")
        part = reader.partition("<")[2][:1]
        assert (names[units["u"][i]], names[units["v"][i]], units["part"][i]) == (
            writer,
            reader.partition("<")[0],
            part,
        )
        assert y[units["u"][i]] < y[units["v"][i]]
    np.testing.assert_allclose(data["methods"][0]["score"], other.mean[order], rtol=1e-6)
    assert [row["kept"] for row in data["curve"]] == [int((own.mean.abs() > tau).sum()) for tau in (1.5, 0.5)]
    upper = swept(own, (0.5,)).assign(exclude_layers=2, n_nodes=int((own.mean.abs() > 0.5)[own.units.layer >= 2].sum()))
    for table, kept in ((upper, int((own.mean.abs() > 0.5).sum())), (upper.assign(n_nodes=upper.n_nodes - 1), None)):
        assert graph_data({"relp": own}, circuit, table)["curve"][0]["kept"] == kept  # a count that cut a tie is no τ
    (row,) = graph_data({"relp": own}, circuit, upper.assign(circuit=circuit.hash))["curve"]
    assert (row["own"], row["kept"]) == (True, None)
    places = list(zip(data["layouts"]["all"]["x"], y, strict=True))
    assert len(set(places)) == len(places)


def test_edges_at_positions_stand_in_columns_of_positions() -> None:
    own = edge_scores(labels=("a", "b"))
    data = graph_data({"relp": own}, select(own, threshold=1.0))
    layout, nodes = data["layouts"]["all"], data["nodes"]
    assert [column["label"] for column in data["columns"]] == ["a", "b"]
    for name, column, x in zip(nodes["name"], nodes["column"], layout["x"], strict=True):
        left, width = layout["columns"][column]
        assert name.endswith(f" @ {'ab'[column]}")
        assert left - 1e-3 < x < left + width
    summed = graph_data({"relp": own}, select(own, threshold=1.0, aggregate="sum"))
    graph: Graph = own.units.structure
    total = own.dense(own.mean).sum(0)
    assert summed["units"]["score"][0] == pytest.approx(float(total[total.abs().argmax()]), rel=1e-6)
    assert (summed["units"]["se"], summed["of"], summed["positions"]) == (None, graph.n_edges, False)


def test_nodes_in_cells_and_methods_of_other_kinds() -> None:
    own = scores("relp", node_scores("head", 3, 5, 2), node_scores("mlp_out", 3, 5, seed=1))
    other = scores("act_patch", node_scores("head", 3, 5, 2, seed=5))
    circuit = select(own, top_k=7)
    data = graph_data({"relp": own, "act_patch": other}, circuit)
    names, units = data["nodes"]["name"], data["units"]
    assert (data["of"], data["complete"], data["below"], sum(units["kept"])) == (45, 45, 0.0, 7)
    for name, score, theirs in zip(names, units["score"], data["methods"][0]["score"], strict=True):
        what, label = name.split(" @ ")
        kind, layer, *unit = what.split(".")
        at = (int(layer), LABELS.index(label), *map(int, unit))
        assert score == pytest.approx(float(own[kind].mean[at]), rel=1e-6)
        assert theirs == (None if kind == "mlp_out" else pytest.approx(float(other["head"].mean[at]), rel=1e-6))
    inside = data["layouts"]["circuit"]
    assert len({(inside["x"][i], inside["y"][i]) for i in range(7)}) == 7
    assert inside["size"][0] < data["layouts"]["all"]["size"][0]


def test_features_errors_apart_and_edges() -> None:
    circuit = three_features()
    cells = circuit.mask.flatten().nonzero()[:, 0]
    n = torch.full((3,), 4)
    own = Scores(circuit.units, circuit.labels, "position", n, -1.0 - torch.arange(4.0), torch.ones(4), cells)
    data = graph_data({"relp": own}, circuit, meanings=pd.DataFrame({"node": ["embed/7"], "meaning": ["x"]}))
    names, links, layout = data["nodes"]["name"], data["links"], data["layouts"]["circuit"]
    edges = circuit.edges.table()  # type: ignore[union-attr]
    assert [(names[u], names[v]) for u, v in zip(links["u"], links["v"], strict=True)] == [
        *zip(edges.source, edges.target, strict=True)
    ]
    assert links["score"] == pytest.approx(list(edges.score))
    assert links["se"] == [None if v != v else pytest.approx(v, rel=1e-3) for v in edges.se]
    assert all(layout["y"][u] < layout["y"][v] for u, v in zip(links["u"], links["v"], strict=True))
    at = names.index("resid_out_layer0/error@c")
    assert data["kinds"][data["nodes"]["kind"][at]]["shape"] == "hollow"
    assert layout["x"][at] > max(x for x, i in zip(layout["x"], range(4), strict=False) if i != at)
    assert data["meanings"] == {names.index("embed/7@a"): "x"}


def test_a_cell_has_room_for_its_strongest_and_counts_the_rest() -> None:
    size = LINE * LINES
    marks = [Mark(f"n{i}", 0, 0, "unit", order=-i) for i in range(size + 5)] + [Mark("bar", 1, BAR, "bar")]
    places = placed(marks, 2, 1)
    assert places.over.tolist() == [False] * (size - 1) + [True] * 6 + [False]
    shown = [(places.x[i], places.y[i]) for i in range(size)]
    assert len(set(shown)) == size
    assert shown[0] != (0.0, 2.0)  # the strongest is the last in the cell's own order
    assert places.y[-1] > places.y[:-1].max()


DRIVER = """
const $ = (id) => document.getElementById(id), text = (id) => $(id).textContent;
const shown = (kind) => all(`.cg-${kind}`).filter((e) => e.style.display !== "none").length;
const put = (id, value, kind) => set($(id), value, kind);
const see = () => ({ line: text("cg-line"), said: text("cg-said"), nodes: shown("node"), edges: shown("edge") });
const list = () => all("#cg-card li button").map((b) => [...b.children].slice(0, 2).map((c) => c.textContent));
"""


def browse(section: str, steps: str, folder: Path) -> Any:
    """What the steps put into `told`; the page may ask for nothing."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    page = folder / "page.html"
    head = f'<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    page.write_text(f"{head}<body>{section}</body>")
    return told_by(page, f"{DRIVER}{steps}document.querySelector('section').remove();")


@in_browser
def test_the_threshold_and_a_node_in_a_browser(tmp_path: Path) -> None:
    own, other = edge_scores(), edge_scores(1, method="atp")
    circuit = select(own, top_k=20)
    taus = (0.3, 1.0, 2.0)
    section = graph_section({"relp": own, "atp": other}, circuit, swept(own, taus))
    told = browse(
        section,
        """
told.start = see();
document.querySelector("[data-mode=all]").click();
put("cg-number", "1", "change");
told.one = see();
put("cg-number", "1.2", "change");
told.between = see();
put("cg-tau", $("cg-tau").max);
told.whole = see();
put("cg-number", "0.5", "change");
const name = relpGraph.nodes.name, logits = name.indexOf("logits");
document.querySelector(`[data-i="${logits}"]`).dispatchEvent(new MouseEvent("click", { bubbles: true }));
told.logits = { text: $("cg-card").textContent, list: list() };
document.querySelector("#cg-card li button").click();
told.next = document.querySelector("#cg-card h3").textContent;
$("cg-svg").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowUp" }));
told.up = document.querySelector("#cg-card h3").textContent;
$("cg-svg").dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
told.free = document.querySelector("#cg-card h3").textContent;
$("cg-in").click();
told.zoomed = relpGraph.view.k;
""",
        tmp_path,
    )
    sizes, graph = own.mean.abs(), own.units.structure
    total, writer, reader = own.n_nodes, *graph.mask.nonzero().T

    def nodes(chosen: torch.Tensor) -> int:
        ends = {graph.writers[u] for u in writer[chosen].tolist()}
        return len(ends | {graph.readers[v].partition("<")[0] for v in reader[chosen].tolist()})

    kept = circuit.mask[0]
    assert (told["start"]["edges"], told["start"]["nodes"]) == (20, nodes(kept))
    assert "20 of the circuit's 20 edges" in told["start"]["line"]
    for step, tau in (("one", 1.0), ("between", 1.2), ("whole", 0.0)):
        count = int((sizes > tau).sum())
        assert (told[step]["edges"], told[step]["nodes"]) == (count, nodes(sizes > tau))
        assert f": {count} of {total} edges" in told[step]["line"]
    assert told["one"]["said"].startswith(
        f"τ = 1 ({int((sizes > 1).sum())} of {total}): faithfulness 0.90 [0.89, 0.92]"
    )
    assert "Not measured at τ = 1.2" in told["between"]["said"]
    assert "τ = 2 " in told["between"]["said"]
    assert "τ = 1 " in told["between"]["said"]
    assert "0.70" not in told["between"]["said"]
    into = [
        i for i in sizes.argsort(descending=True).tolist() if reader[i] == len(graph.readers) - 1 and sizes[i] > 0.5
    ]
    assert [row[0] for row in told["logits"]["list"]] == [graph.writers[writer[i]] for i in into]
    assert told["logits"]["list"][0][1] == f"{own.mean[into[0]]:.3f} ± 0.250".replace("-", "−")
    assert f"atp: {other.mean[into[0]]:.3f}".replace("-", "−") in told["logits"]["text"]
    assert f"Σ {own.mean[into].sum():.4f}".replace("-", "−") in told["logits"]["text"]
    assert told["next"] == graph.writers[writer[into[0]]]
    assert told["up"] not in ("", told["next"])
    assert told["free"] == "Pick a node"
    assert told["zoomed"] == 1.5


@in_browser
def test_ten_thousand_nodes_stay_responsive(tmp_path: Path) -> None:
    own = scores("relp", node_scores("mlp_neuron", 30, 5, 400))
    circuit = Circuit.from_mask("mlp_neuron", own["mlp_neuron"].mean.abs() > 2.5, LABELS)
    section = graph_section(
        {"relp": own}, replace(circuit, meta={}), None, {"S1": [(" a", " b")], "IO": [(" c", " d"), (" e", " f")]}
    )
    assert len(section) < 2_000_000
    told = browse(
        section,
        """
document.querySelector("[data-mode=all]").click();
const times = [];
for (const at of [0.3, 1, 0.5, 0.9, 0.7, 1]) {
  const start = performance.now();
  put("cg-tau", Math.round(at * $("cg-tau").max));
  document.body.getBoundingClientRect();
  times.push(performance.now() - start);
}
told.times = times;
told.end = see();
put("cg-number", "0", "change");
told.zero = [text("cg-line"), +$("cg-number").value];
$("cg-svg").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
told.card = $("cg-card").textContent;
told.axes = all("#cg-svg > g:last-child text").map((t) => t.textContent);
const chip = [...document.querySelectorAll(".cg-chip")].find((c) => c.style.display !== "none");
chip.dispatchEvent(new MouseEvent("click", { bubbles: true }));
told.chip = [chip.textContent, $("cg-card").querySelector("h3").textContent];
""",
        tmp_path,
    )
    assert f": {MOST:,} of {own.n_nodes:,} nodes" in told["end"]["line"]
    assert f"the page holds the {MOST:,} strongest" in told["end"]["line"]
    below = float(own.mean.abs().sort(descending=True).values[MOST])
    assert told["zero"][1] >= below * (1 - 1e-8)  # the page cannot say how many there are below
    assert f": {MOST:,} of {own.n_nodes:,} nodes" in told["zero"][0]
    hidden = int(re.search(r"; ([\d,]+) stand in their cells", told["end"]["line"])[1].replace(",", ""))  # type: ignore[index]
    assert told["end"]["nodes"] + hidden == MOST
    assert any(text in ("S1", "S1  a") for text in told["axes"])
    assert {"IO", "bos"} <= set(told["axes"])  # tokens that pairs do not share stand on cards alone
    best = own.mean.abs().max()
    assert f"{best:.4f}" in told["card"]
    assert f"rank1 of {own.n_nodes:,}" in told["card"]
    assert told["chip"][1] == f"{told['chip'][0][1:]} more in this cell"
    assert sorted(told["times"])[2] < 700, told["times"]  # ms, one thread of a busy machine
    assert "Nothing yet" in told["end"]["said"]


@in_browser
def test_the_whole_page_of_one_evaluated_circuit(tmp_path: Path) -> None:
    """No script of the page stumbles over another's part that is not there."""
    own = scores("relp", node_scores("mlp_out", 3, 5))
    circuit = Circuit.from_mask("mlp_out", own["mlp_out"].mean.abs() > 1, LABELS, selection={"threshold": 1.0})
    table = evaluation(points={circuit.n_nodes: 0.5}, circuit=circuit.hash)
    page = write_html(tmp_path, {}, {"relp": own}, circuit, table)[0]
    seen = told_by(page, f"{DRIVER}told.whole = see(); put('cg-tau', 1); told.part = text('cg-said');")
    assert seen["whole"]["said"].startswith(f"This circuit ({circuit.n_nodes} of 200): faithfulness 0.50 [0.40, 0.60]")
    assert seen["part"].startswith(f"Only the whole circuit was measured ({circuit.n_nodes} of 200): faithfulness 0.50")
