"""pairs.json: a run's prompt pairs as people read them, written with its scores, so that a report needs no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from relp_cli.errors import RunFailed
from relp_cli.evaluation.behaviour import Behaviour
from relp_cli.files import read_object, write_atomically
from relp_cli.runs.rundir import RunDir, checksum
from relp_cli.tasks.pairs import PairBatch

MOST = 200  # pairs that are written; `of` says how many there were
MOST_WORDS = 6  # of an answer or foil that is a set
SCHEMA = 1


def pair_records(tokenizer: Any, pairs: Sequence[PairBatch], seen: Behaviour, metric: str) -> dict[str, Any]:
    """The first `MOST` pairs, in the order of the scores' examples: tokens (decoded one by one), answer and foil, the metric
    of the model's run on both prompts, whether it is right. `roles`: per batch its positions' labels; a pair names its
    batch. `shared`: label → the token that all pairs (not only those written) have there in the original, "" where they differ.
    """

    def words(ids: Sequence[int]) -> list[str]:
        return [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids]

    def choice(ids: list[Any]) -> dict[str, Any]:
        if ids and isinstance(ids[0], list):  # tokens that follow one another: one answer
            text = "".join(words([i for i in ids[0] if i >= 0]))
            return {"words": [text] if text else [], "of": int(bool(text))}
        known = [i for i in ids if i >= 0]
        return {"words": words(known[:MOST_WORDS]), "of": len(known)}

    shared: dict[str, set[int]] = {}
    rows: list[dict[str, Any]] = []
    for number, batch in enumerate(pairs):
        for label, column in zip(batch.labels, batch.original.T.tolist(), strict=True):
            shared.setdefault(label, set()).update(column)
        patches: list[Any] = [None] * len(batch) if batch.patch is None else batch.patch.tolist()
        values: list[Any] = [None] * len(batch) if batch.patch is None else seen.patch[number].tolist()
        for i in range(min(len(batch), MOST - len(rows))):
            rows.append({
                "batch": number, "original": words(batch.original[i].tolist()),
                "patch": None if patches[i] is None else words(patches[i]),
                "answer": choice(batch.answer[i].tolist()), "foil": choice(batch.foil[i].tolist()),
                "metric_original": float(seen.original[number][i]), "metric_patch": values[i],
                "correct": bool(seen.correct[number][i]),
            })  # fmt: skip
    return {
        "schema": SCHEMA,
        "metric": metric,
        "of": sum(len(batch) for batch in pairs),
        "roles": [list(batch.labels) for batch in pairs],
        "shared": {label: words(list(ids))[0] if len(ids) == 1 else "" for label, ids in shared.items()},
        "pairs": rows,
    }


def write_pairs(run: RunDir, records: dict[str, Any]) -> None:
    write_atomically(run.pairs, json.dumps(records, ensure_ascii=False, separators=(",", ":")) + "\n")


def read_pairs(run: RunDir, record: dict[str, Any]) -> dict[str, Any] | None:
    """A run's pairs; None for a run of a version that wrote none. Raises RunFailed where they are not those that it wrote."""
    then = record["files"].get(run.pairs.name)
    if then is None:
        return None
    if not run.pairs.is_file() or checksum(run.pairs) != then:
        raise RunFailed(f"{run.pairs} is not the file that this run wrote; score again to replace it")
    return read_object(run.pairs, "pairs of a run")


def token_examples(records: dict[str, Any], most: int = 4) -> dict[str, list[tuple[str, str | None]]]:
    """Position label → the first `most` different (clean token, corrupted token); None where there is no patch."""
    found: dict[str, dict[tuple[str, str | None], None]] = {}
    for pair in records["pairs"]:
        for at, label in enumerate(records["roles"][pair["batch"]]):
            seen = found.setdefault(label, {})
            if len(seen) < most:
                seen[pair["original"][at], None if pair["patch"] is None else pair["patch"][at]] = None
    return {label: list(seen) for label, seen in found.items()}
