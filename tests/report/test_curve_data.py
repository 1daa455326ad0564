"""Curves on the page: every line's points are the table's, a mean is one where all have data, what is beyond is counted."""

from __future__ import annotations

import pandas as pd
import pytest

from relp_cli.report.curve_data import curve_panels
from tests.report.made import evaluation


def test_one_structure_keeps_its_intervals():
    (panel,) = curve_panels(evaluation(points={100: 1.0, 0: 0.0, 10: 0.5}))
    assert panel["title"] == "MLP neurons, tiny"
    faithful, complete = panel["measures"]
    (line,) = faithful["lines"]
    assert line["points"] == [[0, 0, -0.1, 0.1], [10, 0.5, 0.4, 0.6], [100, 1, 0.9, 1.1]]
    assert complete["lines"][0]["points"][1] == [10, 0.5, 0.4, 0.6]
    assert faithful["beyond"] == 0


def test_several_structures_have_a_mean_and_what_is_beyond_the_axis_is_counted():
    two = pd.concat([
        evaluation("a", points={1: 0.0, 10: 0.5, 100: 1.0}), evaluation("b", points={1: 0.2, 10: 0.7, 100: 9.0}),
        evaluation("a", "atp", points={1: 0.0, 10: 0.0}), evaluation("a", "atp", points={1: 0.0}, kind="head"),
    ]).assign(random_faithfulness=0.25, random_completeness=0.75)  # fmt: skip
    (panel,) = curve_panels(two)  # one circuit of heads is no curve
    lines = panel["measures"][0]["lines"]
    assert [(line["name"], line["weight"]) for line in lines] == [
        ("relp", 0.9), ("relp", 0.9), ("relp", 2.2), ("atp", 2.2), ("random circuits", 1.4),
    ]  # fmt: skip
    assert [point[:2] for point in lines[2]["points"]] == [[1, pytest.approx(0.1)], [10, pytest.approx(0.6)], [100, 5]]
    assert lines[2]["points"][0][2] is None
    assert lines[0]["color"] != lines[3]["color"]
    assert lines[0]["dash"] != lines[3]["dash"]
    assert panel["measures"][0]["high"] < 1.6
    assert panel["measures"][0]["beyond"] == 2  # 9, and the mean of it
