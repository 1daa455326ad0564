"""The table of metrics. Higher always means more of the original behaviour; values are per example, never averaged.

A metric reads logits Float[batch, vocab] at the last position, answer and foil Int[batch, k] (-1 fills shorter sets;
a foil of -1 only means there is none), and for `kl` the reference logits Float[batch, vocab] of the original run. It is
computed in float32 at least, whatever the model's dtype, and refuses to be anything but a finite number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.precision import wide
from relp_cli.registry import Registry

Logits = Float[Tensor, "batch vocab"]
TokenSets = Int[Tensor, "batch _"]  # their sizes need not be equal
PerExample = Float[Tensor, " batch"]


class MetricFn(Protocol):
    """(logits, answer, foil, reference) → Float[batch]."""

    def __call__(self, logits: Tensor, answer: Tensor, foil: Tensor, reference: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    linear: in the logits (conservation holds). differentiable: gradient methods can use it.
    zero_grad_at_original: its gradient at the original prompt is exactly 0, so methods that evaluate there are refused.
    """

    name: str
    fn: MetricFn
    linear: bool
    differentiable: bool
    zero_grad_at_original: bool
    description: str


METRICS: Registry[Metric] = Registry("metric")


class NotFinite(RelpError):
    """A metric is nan or infinite; `row` is the first run for which it is."""

    def __init__(self, name: str, values: Tensor, row: int) -> None:
        count = int((~torch.isfinite(values)).sum())
        super().__init__(
            f"metric '{name}' is {values[row].item()} in {count} of {len(values)} runs (the model's logits are not finite "
            "there; is its dtype too narrow?)"
        )
        self.row = row


def _metric(fn: Callable[..., Tensor]) -> MetricFn:
    """`fn` on wide logits. Raises: NotFinite."""

    @wraps(fn)
    def checked(logits: Tensor, answer: Tensor, foil: Tensor, reference: Tensor | None = None) -> Tensor:
        values = fn(wide(logits), answer, foil, None if reference is None else wide(reference))
        broken = ~torch.isfinite(values)
        if broken.any():
            raise NotFinite(fn.__name__, values, int(broken.nonzero()[0, 0]))
        return values

    return checked


@_metric
def logit_diff(logits: Logits, answer: TokenSets, foil: TokenSets, reference: Tensor | None = None) -> PerExample:  # noqa: ARG001
    """logit[answer] − logit[foil] (without a foil: logit[answer]).

    Raises: RelpError for sets of more than one token: a difference of summed logits means nothing.
    """
    if _most(answer) > 1 or _most(foil) > 1:
        raise RelpError("metric logit_diff needs one answer and one foil token; for sets of tokens use prob_diff")
    return _summed(logits, answer) - _summed(logits, foil)


@_metric
def prob_diff(logits: Logits, answer: TokenSets, foil: TokenSets, reference: Tensor | None = None) -> PerExample:  # noqa: ARG001
    """p(answer) − p(foil), each summed over its set."""
    return _prob_diff(logits, answer, foil)


@_metric
def kl(logits: Logits, answer: TokenSets, foil: TokenSets, reference: Tensor | None = None) -> PerExample:  # noqa: ARG001
    """−KL(reference ‖ run), summed over the vocabulary: 0 on the original run, negative elsewhere.

    With d = ln(q/p), KL = Σ p·(eᵈ − 1 − d): its terms are never negative, and no rounding makes their sum so.
    """
    if reference is None:
        raise RelpError("metric kl needs the logits of the original run as reference")
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
    small = d.clamp(-1, 1)  # eᵈ overflows where q is far above p
    return -torch.where(d == small, p * (torch.expm1(small) - small), q - p - p * d).sum(-1)


@_metric
def accuracy(logits: Logits, answer: TokenSets, foil: TokenSets, reference: Tensor | None = None) -> PerExample:  # noqa: ARG001
    """1 where the answer set is more probable than the foil set; without a foil, where the answer is the top token."""
    margin = _prob_diff(logits, answer, foil)
    better = margin > 0
    if _most(answer) <= 1 and _most(foil) == 1:
        better = _summed(logits, answer) > _summed(logits, foil)  # survives probabilities that underflow to 0
    top = (logits.argmax(-1, keepdim=True) == answer).any(-1)
    right = torch.where((foil >= 0).any(-1), better, top).to(logits.dtype)
    return torch.where(torch.isfinite(margin), right, margin)


def _prob_diff(logits: Tensor, answer: Tensor, foil: Tensor) -> Tensor:
    probs = logits.softmax(-1)
    return _summed(probs, answer) - _summed(probs, foil)


def _most(sets: Tensor) -> int:
    return int((sets >= 0).sum(-1).max())


def _summed(values: Tensor, sets: Tensor) -> Tensor:
    """Sum of values[batch, vocab] over each row's set of tokens."""
    return (values.gather(-1, sets.clamp(min=0)) * (sets >= 0)).sum(-1)


METRICS.add("logit_diff", Metric("logit_diff", logit_diff, True, True, False, "logit[answer] − logit[foil]"))
METRICS.add("prob_diff", Metric("prob_diff", prob_diff, False, True, False, "p(answers) − p(foils), over token sets"))
METRICS.add("kl", Metric("kl", kl, False, True, True, "−KL(original ‖ run), summed over the vocabulary"))
METRICS.add("accuracy", Metric("accuracy", accuracy, False, False, False, "1 where the answer beats the foil"))
