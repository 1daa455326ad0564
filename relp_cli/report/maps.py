"""Heatmaps as plain numbers for the page's script: methods side by side, one colour scale a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from relp_cli.evaluation.agreement import agreement
from relp_cli.report.heatmap import REFERENCE, Over, panel_title, summed
from relp_cli.report.names import kind_title
from relp_cli.spaces.scores import KindScores, Scores

MOST_UNITS = 128  # of a map of units, added up over positions


def map_set(
    scores: Mapping[str, Scores], tokens: Sequence[str] | None = None, reference: str = REFERENCE
) -> dict[str, Any] | None:
    """The maps of scores of nodes (others have no layer × position: None), the reference first where it is among them.

    labels, tokens: of positions. rows: per kind its panels, one a method, [layer][column] means (added up over units) and
    standard errors (of vector nodes), n per position, and the largest |mean| of the colour scale, the reference's where it is
    there (`beyond`: others have larger ones). Heads and other kinds with few units have a second row, layer × unit.
    """
    methods = sorted(scores, key=lambda m: m != reference)
    first = scores[methods[0]]
    kinds = [k for k in first if all(k in other for other in scores.values())]
    if first.units.space != "nodes" or not kinds:
        return None
    rows = [_row({m: scores[m][kind] for m in methods}, "units", reference) for kind in kinds]
    few = [k for k in kinds if first[k].mean.ndim == 3 and first[k].mean.shape[2] <= MOST_UNITS]
    rows += [_row({m: scores[m][kind] for m in methods}, "positions", reference) for kind in few]
    return {"labels": list(first.labels), "tokens": list(tokens or [""] * len(first.labels)), "rows": rows}


def _row(views: Mapping[str, KindScores], over: Over, reference: str) -> dict[str, Any]:
    panels = {method: summed(view, over) for method, view in views.items()}
    first, exact = next(iter(panels.values())), panels.get(reference)
    largest = {method: float(p.mean.abs().nan_to_num(0, 0, 0).max()) for method, p in panels.items()}
    limit = largest[reference] if exact is not None else max(largest.values())
    vector = next(iter(views.values())).mean.ndim == 2
    about: dict[str, Any] = {"kind": first.kind if over == "units" else f"{first.kind} by unit"}
    if over == "positions":
        unit = "head" if first.kind == "head" else "unit"
        about |= {"title": f"{kind_title(first.kind)}, added up over positions", "unit": unit, "labels": first.labels}
    else:
        about |= {"title": kind_title(first.kind) + ("" if vector else ", added up over units"), "n": first.n.tolist()}
    return {
        **about,
        "limit": short(limit) or 1.0,
        "beyond": max(largest.values()) > limit * (1 + 1e-6),
        "panels": [
            {"name": m, "title": _title(m, p, None if m == reference else exact) if len(panels) > 1 else "",
             "mean": grid(p.mean), "se": grid((p.variance / p.n).sqrt()) if vector else None}
            for m, p in panels.items()
        ],
    }  # fmt: skip


def _title(method: str, panel: KindScores, exact: KindScores | None) -> str:
    """`relp · PCC 0.968 · slope 0.91`, both over the panel's cells."""
    title = panel_title(method, panel, exact)
    if exact is None:
        return title
    return title + slope_text(agreement(panel, exact, bootstrap=0, unsigned=not panel.meta.get("signed", True)).slope)


def slope_text(slope: float) -> str:
    """What a title says of an estimate's slope on the reference; nothing where there is none."""
    return f" · slope {slope:.2f}" if math.isfinite(slope) else ""


def grid(values: Tensor, digits: int = 6) -> list[list[Any]]:
    """Numbers with so many significant digits; what is not finite is None."""
    return [[short(value, digits) for value in row] for row in values.double().tolist()]


def short(value: float, digits: int = 6) -> Any:
    """A number of so many significant digits, or None for what is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
