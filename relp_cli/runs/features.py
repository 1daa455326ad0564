"""Feature scores of a run, shown with what the features mean."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from relp_cli.features.annotations import read_annotations
from relp_cli.features.kinds import SCORED
from relp_cli.features.scores import FeatureScores
from relp_cli.features.show import described, top_features
from relp_cli.methods.scores import Scores
from relp_cli.report.tables import show
from relp_cli.runs.scoring import Session, prepare
from relp_cli.runs.spec import ScoreSpec


def show_features(
    spec: ScoreSpec, session: Session, scores: Scores, annotations: Path | None, console: Console, k: int = 10
) -> None:
    """The k features and error terms with the largest |score|, with annotations or contexts and promoted tokens."""
    found = scores[SCORED]
    assert isinstance(found, FeatureScores)
    prepared = prepare(spec, session)
    dictionaries = session.dictionaries(spec.params["dictionary"], prepared.model)
    notes = read_annotations(annotations) if annotations else None
    table = described(top_features(found, k), prepared.model, dictionaries, prepared.pairs, notes)
    meta = scores.meta
    if meta["rules"]:
        table.attrs["notes"] = ["rules applied (layers): " + ", ".join(f"{r}×{n}" for r, n in meta["rules"].items())]
    where = f"{meta.get('task', '?')}, {meta['model']}, dictionary {meta['dictionary']}, {meta['n_pairs']} pairs"
    show(
        table.drop(columns=["kind", "n"]),
        console,
        f"{meta['method']} on {where}, {meta['direction']}, {meta['metric']}",
        digits=3,
    )
