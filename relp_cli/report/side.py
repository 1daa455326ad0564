"""Methods side by side: one table of units × methods, their correlations, and what scatter plots and heatmaps show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from relp_cli.errors import RelpError
from relp_cli.evaluation.agreement import agreement
from relp_cli.report.heatmap import REFERENCE
from relp_cli.report.maps import map_set, slope_text
from relp_cli.report.names import kind_title
from relp_cli.report.page import MOST_ROWS, Section, Sheet
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import SPACES
from relp_cli.spaces.top import unit_table

PLACE = ("kind", "layer", "position", "unit")


def side_by_side(
    id: str,
    title: str,
    scores: Mapping[str, Scores],
    tokens: Sequence[str] | None = None,
    text: Sequence[str] = (),
    reference: str = REFERENCE,
) -> Section:
    """A section of methods that scored one model on one task: heatmaps with one colour scale per node kind, every method
    against the reference (or, where that is not there, against the first one), correlations, and all units.

    Raises: RelpError where they have no node kind in common, or other positions.
    """
    scores = common(scores)
    methods = sorted(scores, key=lambda m: m != reference)
    table, of = units_by_method(scores)
    order = [*scores[methods[0]], *table.kind]  # features' table has kinds of its own
    kinds = [kind for kind in dict.fromkeys(order) if kind in set(table.kind)]
    x, name = methods[0], f"units-{id}"
    pairs = correlations(scores)
    of_x = {(row["kind"], row["method"]): row[x] for row in pairs.to_dict("records")}
    slopes = _slopes(scores, x)
    panels = [
        {
            "kind": kind,
            "x": x,
            "y": y,
            "title": f"{kind_title(kind)}: {y}"
            + _pcc(of_x.get((kind_title(kind), y)))
            + slope_text(slopes.get((kind, y), float("nan"))),
        }
        for kind in kinds
        for y in methods[1:]
    ]
    cut = "" if of == len(table) else f" (the {len(table)} strongest of {of} that are not 0 everywhere)"
    said = (
        f"Scatter plots: every method against {x}{cut}; dashed: equality. PCC and slope: over all units, of averages over pairs; "
        f"slope: through the origin, 1 where scores are as large as {x}'s, 2 where they are twice as large."
    )
    return Section(
        id, title, (*text, said), map_set(scores, tokens, reference), {"table": name, "words": PLACE, "panels": panels},
        sheets=(
            Sheet(f"pcc-{id}", pairs, "PCC between methods"),
            Sheet(name, table, "Units × methods", by=x, sizes=tuple(methods), of=of, digits=4),
        ),
    )  # fmt: skip


def common(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    """The scores of the kinds that all methods have. Raises RelpError where there are none, or units or positions differ."""
    first = next(iter(scores.values()))
    kinds = [kind for kind in first if all(kind in other for other in scores.values())]
    if not kinds:
        said = "; ".join(f"{name}: {', '.join(other)}" for name, other in scores.items())
        raise RelpError(f"these scores have no node kind in common ({said})")
    out = {name: other.only(kinds) for name, other in scores.items()}
    one = next(iter(out.values()))
    for name, other in out.items():
        if other.labels != one.labels or other.units.blocks != one.units.blocks:
            raise RelpError(
                f"{name} has positions {', '.join(other.labels)} and {len(other.units)} units, "
                f"{next(iter(out))} {', '.join(one.labels)} and {len(one.units)}: they cannot stand side by side"
            )
    return out


def units_by_method(scores: Mapping[str, Scores], most: int = MOST_ROWS) -> tuple[pd.DataFrame, int]:
    """kind, layer, position, unit and a column of mean scores per method, of the `most` units that are largest under any of them,
    as a share of the method's own largest; and how many units are not 0 under all of them.
    """
    dense = {m: s.dense(s.mean.double().nan_to_num(0)).flatten() for m, s in scores.items()}
    sizes = torch.stack([v.abs() / (v.abs().max() or 1.0) for v in dense.values()]).amax(0)
    of = int((sizes > 0).sum())
    order = sizes.argsort(descending=True, stable=True)[: min(most, of)]
    first = next(iter(scores.values()))
    values = next(iter(dense.values()))
    whole = replace(first, columns=None, mean=values, variance=values, examples=None, present=None)
    table = unit_table(whole, order)[list(PLACE)]
    return table.assign(**{m: v[order].numpy() for m, v in dense.items()}), of


def correlations(scores: Mapping[str, Scores]) -> pd.DataFrame:
    """Per node kind and method, its PCC with each of the others, over all units of pair-averaged scores; with |scores| of others
    where it has no sign itself. 1 with itself.
    """
    rows: list[dict[str, Any]] = []
    for kind in _tables(next(iter(scores.values()))):
        views = {m: replace(s.table(kind), examples=None, present=None) for m, s in scores.items()}
        for method, view in views.items():
            row: dict[str, Any] = {"kind": kind_title(kind), "method": method}
            for other, against in views.items():
                signs = {scores[m].meta.get("signed", True) for m in (method, other)}
                a, b = (view, against) if not scores[method].meta.get("signed", True) else (against, view)
                row[other] = 1.0 if method == other else agreement(a, b, bootstrap=0, unsigned=len(signs) > 1).pcc
            rows.append(row)
    return pd.DataFrame(rows)


def _slopes(scores: Mapping[str, Scores], x: str) -> dict[tuple[str, str], float]:
    """(kind, method) → slope on x's scores; with x's |scores| where the method has no sign, none where x alone has none."""
    out = {}
    for kind in _tables(scores[x]):
        views = {m: replace(s.table(kind), examples=None, present=None) for m, s in scores.items()}
        for method, view in views.items():
            signed, exact_signed = (scores[m].meta.get("signed", True) for m in (method, x))
            if method != x and (exact_signed or not signed):
                out[kind, method] = agreement(view, views[x], bootstrap=0, unsigned=exact_signed and not signed).slope
    return out


def _tables(scores: Scores) -> list[str]:
    """The kinds that tables are of: of features, their error terms are among them."""
    alone = SPACES[scores.units.space].kinds
    return [alone[0]] if alone else list(scores)


def _pcc(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f" · PCC {value:.3f}"
