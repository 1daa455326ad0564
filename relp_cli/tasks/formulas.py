"""What the metrics compute. A formula reads wide logits Float[batch, vocab], answer and foil Int[batch, k] (-1 fills shorter
sets; a foil of -1 only means there is none) and the reference logits Float[batch, vocab] of the original run. One that takes
answers of several tokens also reads Float[batch, k, vocab], the logits before each of the k tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.precision import wide

Logits = Float[Tensor, "batch vocab"]
TokenSets = Int[Tensor, "batch _"]  # their sizes need not be equal
PerExample = Float[Tensor, " batch"]


class MetricFn(Protocol):
    """(logits, answer, foil, reference) → Float[batch]."""

    def __call__(self, logits: Tensor, answer: Tensor, foil: Tensor, reference: Tensor | None = None) -> Tensor: ...


class NotFinite(RelpError):
    """A metric is nan or infinite; `row` is the first run for which it is."""

    def __init__(self, name: str, values: Tensor, row: int) -> None:
        count = int((~torch.isfinite(values)).sum())
        super().__init__(
            f"metric '{name}' is {values[row].item()} in {count} of {len(values)} runs (the model's logits are not finite "
            "there; is its dtype too narrow?)"
        )
        self.row = row


SEVERAL = "answers of several tokens need metric answer_logprob, which reads two runs of a prompt (docs/tasks.md lists its verbs)"


def checked(name: str, formula: Callable[..., Tensor], several: bool = False) -> MetricFn:
    """A metric of that name, made of its formula; several: it takes answers of several tokens. Raises: NotFinite."""

    @wraps(formula)
    def metric(logits: Tensor, answer: Tensor, foil: Tensor, reference: Tensor | None = None) -> Tensor:
        if answer.ndim > 2 or (logits.ndim > 2 and not several):
            raise RelpError(f"metric '{name}': {SEVERAL}")
        values = formula(wide(logits), answer, foil, None if reference is None else wide(reference))
        broken = ~torch.isfinite(values)
        if broken.any():
            raise NotFinite(name, values, int(broken.nonzero()[0, 0]))
        return values

    return metric


def logit_diff(logits: Logits, answer: TokenSets, foil: TokenSets, reference: Tensor | None = None) -> PerExample:
    """logit[answer] − logit[foil] (without a foil: logit[answer]).

    Raises: RelpError for sets of more than one token: a difference of summed logits means nothing.
    """
    if _most(answer) > 1 or _most(foil) > 1:
        raise RelpError("metric logit_diff needs one answer and one foil token; for sets of tokens use prob_diff")
    return _summed(logits, answer) - _summed(logits, foil)


def prob_diff(logits: Logits, answer: TokenSets, foil: TokenSets, reference: Tensor | None = None) -> PerExample:
    """p(answer) − p(foil), each summed over its set."""
    return _prob_diff(logits, answer, foil)


def answer_logprob(
    logits: Float[Tensor, "batch *read vocab"], answer: TokenSets, foil: TokenSets, reference: Tensor | None = None
) -> PerExample:
    """Σ log p(answer's tokens) − Σ log p(foil's tokens); of Float[batch, vocab], of one token each.

    Raises: RelpError for sets of more than one token where there are logits for one.
    """
    if logits.ndim == 2:
        if _most(answer) > 1 or _most(foil) > 1:
            raise RelpError("metric answer_logprob needs one answer and one foil; for sets of tokens use prob_diff")
        logits, answer, foil = logits[:, None], *(sets.max(-1, keepdim=True).values for sets in (answer, foil))
    log_p = logits.log_softmax(-1)
    of_answer, of_foil = (
        torch.where(ids >= 0, log_p.gather(-1, ids.clamp(min=0)[..., None])[..., 0], 0).sum(-1)
        for ids in (answer, foil)
    )
    return of_answer - of_foil


def kl(logits: Logits, answer: TokenSets, foil: TokenSets, reference: Tensor | None = None) -> PerExample:
    """−KL(reference ‖ run), summed over the vocabulary: 0 on the original run, negative elsewhere.

    With d = ln(q/p), KL = Σ p·(eᵈ − 1 − d): its terms are never negative, and no rounding makes their sum so.
    """
    if reference is None:
        raise RelpError("metric kl needs the logits of the original run as reference")
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
    small = d.clamp(-1, 1)  # eᵈ overflows where q is far above p
    return -torch.where(d == small, p * (torch.expm1(small) - small), q - p - p * d).sum(-1)


def accuracy(logits: Logits, answer: TokenSets, foil: TokenSets, reference: Tensor | None = None) -> PerExample:
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
