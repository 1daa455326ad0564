"""Single pairs as plain numbers for the page's script: their prompts, and what each of them scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from relp_cli.report.maps import grid, short
from relp_cli.report.names import kind_title
from relp_cli.report.page import plain
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.top import COLUMNS, unit_table
from relp_cli.tasks.counted import pairs_text

NUMBERS = 120_000  # of all pairs' maps together: about a megabyte
TOP = 15  # strongest units of a pair


def pair_picker(records: Mapping[str, Any], scores: Scores) -> dict[str, Any] | None:
    """The first pairs of `pairs.json`'s content, as many as fit; None where there are none.

    pairs: each with its prompts; `scored`: false where it was set aside (`relp+auto`) or single pairs were not kept.
    maps: per kind of node, [pair][layer][position] scores (added up over units) beside mean and standard error over pairs.
    top: per pair (row of `units`, score) of its strongest units. note: why something is not there.
    """
    pairs, of = records.get("pairs") or [], int(records.get("of", 0))
    if not pairs:
        return None
    mapped = scores.units.space == "nodes"
    kinds = list(scores) if mapped else []
    size = sum(view.mean.shape[0] * view.mean.shape[1] for view in map(scores.__getitem__, kinds))
    shown = pairs[: max(1, NUMBERS // max(size, 6 * TOP))]
    n_prompts = scores.meta.get("n_prompts")
    said = pairs_text(of, n_prompts)
    notes = [f"the first {len(shown)} of {said}"] if len(shown) < of else [said] if "prompt" in said else []
    out: dict[str, Any] = {
        "metric": records.get("metric", "metric"), "roles": records["roles"], "labels": list(scores.labels), "of": of,
        "n": scores.n.tolist(),
    }  # fmt: skip
    if scores.examples is None or scores.present is None or len(scores.examples) != of:
        other = scores.examples is not None
        notes.append(
            "the scores that were kept are of other pairs" if other
            else "single pairs' scores were not kept (relp score --per-example keeps them)"
        )  # fmt: skip
        return {**out, "pairs": [p | {"scored": False} for p in shown], "note": "; ".join(notes), "maps": [], "top": []}
    present = scores.present[: len(shown)]
    some = replace(scores, examples=scores.examples[: len(shown)], present=present)
    scored = present.any(1).tolist()
    if not all(scored):
        notes.append(f"{scored.count(False)} of these were set aside to choose rules and have no scores")
    return {
        **out,
        "pairs": [p | {"scored": s} for p, s in zip(shown, scored, strict=True)],
        "note": "; ".join(notes),
        "maps": [_maps(some, kind) for kind in kinds],
        **_top(some),
    }


def _maps(scores: Scores, kind: str) -> dict[str, Any]:
    view = scores[kind]
    vector = view.mean.ndim == 2
    examples, mean = (v if vector else v.flatten(n).sum(-1) for v, n in ((view.examples, 3), (view.mean, 2)))
    return {
        "kind": kind, "title": kind_title(kind) + ("" if vector else ", added up over units"),
        "pairs": [grid(one, 5) for one in examples], "mean": grid(mean, 5),
        "se": grid((view.variance / view.n).sqrt(), 3) if vector else None,
    }  # fmt: skip


def _top(scores: Scores) -> dict[str, Any]:
    examples = scores.examples
    assert examples is not None
    best = examples.abs().topk(min(TOP, examples.shape[1]), dim=1).indices
    columns = best.unique()  # sorted
    rows = unit_table(scores, columns)[COLUMNS]
    place = {column: i for i, column in enumerate(columns.tolist())}
    return {
        "columns": COLUMNS[:-1],
        "units": [[plain(v) for v in row[:-1]] for row in rows.itertuples(index=False, name=None)],
        "top": [
            [[place[c], short(float(examples[i, c]))] for c in of_pair if examples[i, c] != 0]
            for i, of_pair in enumerate(best.tolist())
        ],
    }
