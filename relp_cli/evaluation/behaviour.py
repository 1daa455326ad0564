"""What the model itself does on a task: accuracy and metric on original and patch prompts, and whether that is chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.models.model import Model
from relp_cli.tasks.formulas import NotFinite
from relp_cli.tasks.metrics import METRICS, Metric
from relp_cli.tasks.pairs import PairBatch


@dataclass(frozen=True)
class Behaviour:
    """accuracy: share of originals with answer above foil; metric_original, metric_patch: means of the task's metric.

    correct: per batch Bool[batch]. at_chance: accuracy is not above 1/2 at the 1 % level (only asked where there is a foil).
    too_few: there are too few pairs to tell.
    """

    accuracy: float
    metric_original: float
    metric_patch: float | None
    n: int
    correct: tuple[Tensor, ...]
    at_chance: bool
    too_few: bool = False

    def as_dict(self) -> dict[str, float | int | bool | None]:
        return {
            "accuracy": self.accuracy,
            "metric_original": self.metric_original,
            "metric_patch": self.metric_patch,
            "n": self.n,
            "at_chance": self.at_chance,
        }


@torch.no_grad()
def behaviour(model: Model, pairs: Sequence[PairBatch], metric: str) -> Behaviour:
    """Run all originals and patches once (their cost is not counted to any method)."""
    row = METRICS[metric]
    correct, original, patch = [], [], []
    for batch in (b.to(model.device) for b in pairs):
        logits = model.logits(batch.original)
        original.append(_values(model, batch, batch.original, row, logits, logits))
        correct.append(METRICS["accuracy"].fn(logits, batch.answer, batch.foil).bool().cpu())
        if batch.patch is not None:
            patch.append(_values(model, batch, batch.patch, row, model.logits(batch.patch), logits))
    hits, n = int(torch.cat(correct).sum()), sum(len(b) for b in pairs)
    has_foil = all((b.foil >= 0).any(-1).all() for b in pairs)
    chance = has_foil and stats.binomtest(hits, n, 0.5, alternative="greater").pvalue > 0.01
    too_few = has_foil and hits > n / 2 and 0.5**n > 0.01  # not even a perfect score would show
    return Behaviour(
        accuracy=hits / n,
        metric_original=torch.cat(original).mean().item(),
        metric_patch=torch.cat(patch).mean().item() if patch else None,
        n=n,
        correct=tuple(correct),
        at_chance=bool(chance and not too_few),
        too_few=bool(too_few),
    )


def _values(
    model: Model, batch: PairBatch, prompts: Tensor, metric: Metric, logits: Tensor, reference: Tensor
) -> Float[Tensor, " batch"]:
    """The metric per pair, in float64. Raises: RelpError naming the first prompt whose metric is not finite."""
    try:
        return metric.fn(logits, batch.answer, batch.foil, reference).double().cpu()
    except NotFinite as error:
        ids = prompts[error.row].tolist()
        raise RelpError(
            f"{error}, first on the prompt {ids if model.tokenizer is None else model.tokenizer.decode(ids)!r}"
        ) from None


def keep_correct(pairs: Sequence[PairBatch], seen: Behaviour) -> list[PairBatch]:
    """The pairs whose original the model gets right. Raises RelpError where none is left."""
    kept = [b.rows(c.nonzero()[:, 0]) for b, c in zip(pairs, seen.correct, strict=True) if c.any()]
    if not kept:
        raise RelpError(f"--only-correct leaves no pair: the model gets 0 of {seen.n} right")
    return kept
