"""Pictures of circuits: every edge between the right dots, in the colour of its sign, with a width in proportion."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matplotlib.colors import to_hex

from relp_cli.report.canvas import DARK, LIGHT, rendered
from relp_cli.report.graph import circuit_figure, edge_drawing, feature_drawing
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.edges import EdgeScores, circuit_of_names
from relp_cli.spaces.feature_graph import FeatureEdges
from relp_cli.spaces.features import feature_circuit, feature_nodes
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.sites import Site


def three_features() -> Circuit:
    sites = (Site("embed", -1), Site("attn", 0), Site("resid", 0))
    features = {s: torch.zeros(3, 9, dtype=torch.bool) for s in sites}
    errors = {s: torch.zeros(3, dtype=torch.bool) for s in sites}
    features[sites[0]][0, [4, 7]] = True
    features[sites[1]][2, 5] = True
    errors[sites[2]][2] = True
    circuit = feature_circuit(features, errors, ("a", "b", "c"))
    index = torch.tensor([[0, 2], [1, 2], [2, 3], [3, 4]])
    scores = torch.tensor([-1.0, 0.25, 0.5, -2.0])
    return replace(
        circuit, edges=FeatureEdges(feature_nodes(circuit), index, scores, scores, torch.ones(4, dtype=torch.long))
    )


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_feature_circuits(theme):
    circuit = three_features()
    drawing = feature_drawing(circuit, None, {"c": "the"})
    assert [dot.name for dot in drawing.dots] == ["4", "7", "5", "ε", "metric"]
    assert [dot.y for dot in drawing.dots] == [0, 0, 1, 2, 3]
    assert drawing.dots[0].x < drawing.dots[1].x < drawing.dots[2].x == drawing.dots[3].x
    assert list(drawing.rows.values()) == ["embedding", "attention 0", "residual 0"]
    assert list(drawing.columns.values()) == ["a", "c\nthe"]  # no column for a position without nodes
    (axes,) = circuit_figure(circuit, theme=theme).axes
    (lines,) = axes.collections[:1]
    drawn = {
        (tuple(ends[0]), tuple(ends[-1])): (to_hex(color), width)
        for ends, color, width in zip(lines.get_segments(), lines.get_color(), lines.get_linewidth(), strict=True)
    }
    assert len(drawn) == 4
    widths = []
    for line in drawing.lines:
        u, v = drawing.dots[line.source], drawing.dots[line.target]
        color, width = drawn[(u.x, u.y), (v.x, v.y)]
        assert color == theme.diverging[1 if line.score < 0 else -2]
        widths.append(width)
    gained = torch.tensor(widths) - 0.3
    torch.testing.assert_close(gained / gained.max(), circuit.edges.mean.abs().double() / 2)  # type: ignore[union-attr]
    assert rendered(circuit_figure(circuit, theme=theme)) == rendered(circuit_figure(circuit, theme=theme))


def test_edge_circuits():
    graph = Graph(2, 3)
    mean = torch.zeros(2, *graph.mask.shape)
    names = {"input->a0.h1<q>": (1.0, 2.0), "a0.h1->m1": (-1.0, 0.5), "m1->logits": (3.0, 3.0)}
    circuit = circuit_of_names(graph, list(names))
    circuit = replace(circuit, mask=torch.cat([circuit.mask, circuit.mask]), labels=("a", "b"))
    for name, values in names.items():
        writer, _, reader = name.partition("->")
        mean[:, graph.writer(writer), graph.reader(reader)] = torch.tensor(values)
    circuit.mask[1, graph.edge_names().index("a0.h1->m1")] = False
    n = torch.tensor([4, 4])
    drawing = edge_drawing(circuit, EdgeScores(graph, mean, mean, n, ("a", "b"), "position").whole)
    ends = [(drawing.dots[line.source], drawing.dots[line.target], line.score, line.style) for line in drawing.lines]
    places = [(u.name, u.y, v.name, v.y, score, style) for u, v, score, style in ends]
    assert places == [("input", 0, "1", 1, 3.0, "q"), ("1", 1, "", 4, -1.0, ""), ("", 4, "logits", 5, 6.0, "")]
    assert len(drawing.dots) == 2 + 2 * 4
    assert len({(dot.x, dot.y) for dot in drawing.dots}) == len(drawing.dots)
    joint = edge_drawing(circuit_of_names(graph, list(names)), EdgeScores(graph, mean.sum(0), mean[0], n[:1]).whole)
    assert [line.score for line in joint.lines] == [3.0, -0.5, 6.0]


def test_circuits_without_edges_are_dots():
    empty = replace(three_features(), edges=None)
    assert not circuit_figure(empty).axes[0].collections[0].get_segments()
    nothing = replace(empty, mask=empty.mask & False)
    assert rendered(circuit_figure(nothing)).startswith(b"\x89PNG")
