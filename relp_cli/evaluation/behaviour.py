"""What the model itself does on a task: accuracy and metric on original and patch prompts, and whether that is chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.methods.room import Room, fitting
from relp_cli.models.model import Model
from relp_cli.tasks.counted import distinct, effective, pairs_text
from relp_cli.tasks.formulas import NotFinite
from relp_cli.tasks.metrics import METRICS, Metric
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.parts import parts_of
from relp_cli.tasks.shared import prompts_of

LEVEL = 0.01  # of the tests against chance
NEAR = 2 / 3  # an accuracy that counts as chance at most


@dataclass(frozen=True)
class Behaviour:
    """accuracy: share of originals with answer above foil; metric_original, metric_patch: means of the task's metric.

    correct:  per batch Bool[batch]. original, patch: per batch the metric, Float64[batch] (patch: empty for single prompts).
    n, n_prompts: pairs, and distinct originals among them. Where these are fewer, interval and verdict are those of fewer pairs,
              `tasks.shared.effective` (Korn and Graubard 1998).
    interval: of the accuracy, 95 % (Clopper and Pearson 1934, exact).
    verdict:  `against_chance`; "" where a pair has no foil.
    """

    accuracy: float
    metric_original: float
    metric_patch: float | None
    n: int
    n_prompts: int
    correct: tuple[Tensor, ...]
    original: tuple[Tensor, ...]
    patch: tuple[Tensor, ...]
    interval: tuple[float, float]
    verdict: str

    @property
    def at_chance(self) -> bool:
        """Whether a test says that the model is at chance, or below."""
        return self.verdict in ("at", "below")

    def as_dict(self) -> dict[str, float | int | bool | str | None]:
        low, high = self.interval
        return {
            "accuracy": self.accuracy,
            "accuracy_lo": low,
            "accuracy_hi": high,
            "metric_original": self.metric_original,
            "metric_patch": self.metric_patch,
            "n": self.n,
            "n_prompts": self.n_prompts,
            "at_chance": self.at_chance,
            "against_chance": self.verdict,
        }

    def note(self, model: str, task: str) -> str:
        """What people have to know of it, or ""."""
        low, high = self.interval
        pairs, few = (pairs_text(self.n, self.n_prompts, does=does) for does in (None, ("is", "are")))
        n = f"n = {self.n}" if self.n_prompts == self.n else pairs
        about = f"accuracy {self.accuracy:.2f} [{low:.2f}, {high:.2f}], {n}"
        return {
            "below": f"WARNING: {model} is below chance on {task} ({about}): it prefers the foils, and scores explain that",
            "at": f"WARNING: {model} is at chance on {task} ({about}); scores explain no behaviour here",
            "undecided": f"{few} too few to tell {model}'s behaviour on {task} from chance ({about})",
        }.get(self.verdict, "")


def said(does: Mapping[str, Any], metric: str) -> str:
    """`Behaviour.as_dict`, new or of a run's record, for people: accuracy with its interval and n, and the metric's means."""
    sure = f" [{does['accuracy_lo']:.2f}, {does['accuracy_hi']:.2f}]" if "accuracy_lo" in does else ""
    pairs = pairs_text(does["n"], does.get("n_prompts"))
    patch = "" if does.get("metric_patch") is None else f", on patches {does['metric_patch']:+.3f}"
    return f"accuracy {does['accuracy']:.2f}{sure} over {pairs}; mean {metric} on originals {does['metric_original']:+.3f}{patch}"


def against_chance(hits: float, n: float) -> str:
    """Binomial tests at 1 %: "above" or "below", where ½ is rejected; "at", where 2/3 or more is; else "undecided".

    With fewer than 7 pairs nothing is "above", whatever the model does. Numbers that are not whole, of pairs that share prompts,
    go into the same tails (P(K ≥ k) = I_p(k, n − k + 1)).
    """
    if not hits < n:  # all right: I_p(n, 1)
        return "above" if 0.5**n <= LEVEL else "undecided"
    if hits > 0 and stats.beta.cdf(0.5, hits, n - hits + 1) <= LEVEL:
        return "above"
    if stats.beta.sf(0.5, hits + 1, n - hits) <= LEVEL:
        return "below"
    return "at" if stats.beta.sf(NEAR, hits + 1, n - hits) <= LEVEL else "undecided"


def _interval(hits: int, n: int, worth: float) -> tuple[float, float]:
    """Of hits/n, 95 %; worth: how many independent pairs the n are worth."""
    if worth == n:
        bounds = stats.binomtest(hits, n).proportion_ci(0.95, "exact")
        return float(bounds.low), float(bounds.high)
    k = hits / n * worth
    low = stats.beta.ppf(0.025, k, worth - k + 1) if hits else 0.0
    return float(low), float(stats.beta.ppf(0.975, k + 1, worth - k) if hits < n else 1.0)


@torch.no_grad()
def behaviour(model: Model, pairs: Sequence[PairBatch], metric: str) -> Behaviour:
    """Run all originals and patches once (their cost is not counted to any method)."""
    row = METRICS[metric]
    correct, original, patch = [], [], []
    for batch in pairs:
        # A pass of all pairs would have no bound.
        few = batch.split(fitting(batch.n_pos, Room.on(model.device).patched))
        seen = [_of_few(model, some.to(model.device), row) for some in few]
        original.append(torch.cat([value for value, _, _ in seen]))
        patch += [torch.cat([value for _, value, _ in seen if value is not None])] if seen[0][1] is not None else []
        correct.append(torch.cat([right for _, _, right in seen]))
    hits, n = int(torch.cat(correct).sum()), sum(len(b) for b in pairs)
    has_foil = all((b.foil >= 0).flatten(1).any(-1).all() for b in pairs)
    prompts = prompts_of(pairs)
    worth = effective(prompts)
    return Behaviour(
        accuracy=hits / n,
        metric_original=torch.cat(original).mean().item(),
        metric_patch=torch.cat(patch).mean().item() if patch else None,
        n=n,
        n_prompts=distinct(prompts),
        correct=tuple(correct),
        original=tuple(original),
        patch=tuple(patch),
        interval=_interval(hits, n, worth),
        verdict=against_chance(hits / n * worth, worth) if has_foil else "",
    )


def _of_few(model: Model, batch: PairBatch, metric: Metric) -> tuple[Tensor, Tensor | None, Tensor]:
    """The metric per pair on originals and on patches, and whether the answer is above the foil: 2 forward passes."""
    if batch.several:
        return _of_parts(model, batch, metric)
    logits = model.logits(batch.original)
    original = _values(model, batch, batch.original, metric, logits, logits)
    right = METRICS["accuracy"].fn(logits, batch.answer, batch.foil).bool().cpu()
    if batch.patch is None:
        return original, None, right
    return original, _values(model, batch, batch.patch, metric, model.logits(batch.patch), logits), right


def _of_parts(model: Model, batch: PairBatch, metric: Metric) -> tuple[Tensor, Tensor | None, Tensor]:
    """The metric per pair on originals and on patches, and whether the model is right: log p(answer) > log p(foil), or without a
    foil, whether every token of the answer is the top one after those before it.
    """
    original, patch, top = [], [], list[Tensor]()
    for part in parts_of([batch]):
        logits = (reader := model.reading(part.read)).logits(part.original)
        original.append(_values(model, part, part.original, metric, logits, logits))
        top.append((logits.view(len(part), part.read, -1).argmax(-1) == part.answer).all(-1).cpu())
        if part.patch is not None:
            patch.append(_values(model, part, part.patch, metric, reader.logits(part.patch), logits))
    value = torch.stack(original).sum(0)
    return value, torch.stack(patch).sum(0) if patch else None, value > 0 if len(top) > 1 else top[0]


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
