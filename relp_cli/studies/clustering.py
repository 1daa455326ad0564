"""`relp circuit --clusters`: the mechanisms in a run's pairs, as a folder of circuits and one table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from relp_cli.clustering import Groups, groups_of
from relp_cli.errors import RelpError
from relp_cli.evaluation.mechanisms import checked_sizes, circuits_of_groups, cross_faithfulness, unit_scores
from relp_cli.files import check_writable, write_atomically
from relp_cli.methods.request import Progress
from relp_cli.runs.scoring import Prepared, Session, prepare_again
from relp_cli.runs.spec import ScoreSpec
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores

AUTO = "auto"


@dataclass(frozen=True)
class Clustered:
    """groups of pairs, their circuits, the cross-faithfulness table, the pairs' texts, and where all of it was written."""

    groups: Groups
    circuits: list[Circuit]
    table: pd.DataFrame
    texts: list[str]
    folder: Path

    @property
    def files(self) -> list[Path]:
        return [self.folder / f"circuit-{i + 1}.json" for i in range(len(self.circuits))]

    @property
    def verdict(self) -> str:
        """How many clusters, and by what."""
        groups = self.groups
        if groups.best == 1:
            why = "no cut has clusters of enough pairs whose mean scores are 45° apart"
        else:
            silhouette, cosine = groups.tried[groups.best]
            why = (
                f"{groups.best} have silhouette {silhouette:.2f} and cosines up to {cosine:.2f}; one Gaussian does as well with "
                f"p = {groups.p:.3f}"
            )
        found = f"{groups.found} clusters" if groups.found > 1 else "one cluster"
        return (
            f"{found} ({why})" if groups.n == groups.found else f"{groups.n} clusters as asked; auto: {found} ({why})"
        )

    def as_dict(self) -> dict[str, Any]:
        groups, sizes = self.groups, np.bincount(self.groups.labels)
        return {
            "clusters": groups.n,
            "verdict": self.verdict,
            "tried": {str(k): {"silhouette": s, "largest_cosine": c} for k, (s, c) in groups.tried.items()},
            "p": None if math.isnan(groups.p) else groups.p,
            "circuits": [
                {"cluster": i + 1, "file": file.name, "pairs": int(sizes[i]), "n_nodes": circuit.n_nodes}
                for i, (circuit, file) in enumerate(zip(self.circuits, self.files, strict=True))
            ],
            "cross_faithfulness": self.table.to_dict("records"),
            "pairs": [
                {"cluster": int(label) + 1, "original": text}
                for label, text in zip(groups.labels, self.texts, strict=True)
            ],
        }


def clusters_asked(text: str) -> int | None:
    """`auto` (None) or a number of clusters. Raises RelpError for anything else."""
    if text == AUTO:
        return None
    if not text.isdecimal() or not int(text[:9]) >= 1:
        raise RelpError(f"--clusters: expected auto or a number from 1 up, got '{text}'")
    return int(text[:9])


def cluster_run(
    spec: ScoreSpec,
    scores: Scores,
    k: int | None,
    how: Mapping[str, Any],
    session: Session,
    folder: Path,
    progress: Progress | None = None,
) -> Clustered:
    """Group a run's pairs, select a circuit for each group, and write them with clusters.json into `folder`.

    scores: of the run, or some kinds of it. how: keywords of `select`.
    Raises: RelpError where examples were not kept, or are not all of the pairs.
    """
    check_writable(folder)
    groups = groups_of(unit_scores(scores), k, spec.seed)
    checked_sizes(scores, groups.labels)
    circuits = circuits_of_groups(scores, groups.labels, how)
    prepared = prepare_again(spec, scores, session)
    n = sum(map(len, prepared.pairs))
    if n != len(groups.labels):
        raise RelpError(f"this run keeps scores of {len(groups.labels)} of its {n} pairs; clusters need all of them")
    where = spec.params.get("dictionary")
    table = cross_faithfulness(
        prepared.model, prepared.pairs, scores, groups.labels, how, prepared.metric,
        session.dictionaries(where, prepared.model) if where else None, spec.batch_size, progress,
    )  # fmt: skip
    made = Clustered(groups, circuits, table, _texts(prepared), folder)
    for circuit, file in zip(circuits, made.files, strict=True):
        circuit.save(file)
    for stale in set(folder.glob("circuit-*.json")) - set(made.files):  # of more clusters, asked for before
        stale.unlink()
    write_atomically(folder / "clusters.json", json.dumps(_plain(made.as_dict()), indent=1, ensure_ascii=False) + "\n")
    return made


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, and null for what is no number."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _texts(prepared: Prepared) -> list[str]:
    """Every pair's original, without the BOS token that was prepended."""
    tokenizer, out = prepared.model.tokenizer, []
    for batch in prepared.pairs:
        skip = int(batch.labels[0] == "bos")
        for ids in batch.original[:, skip:].tolist():
            out.append(" ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(ids)))
    return out
