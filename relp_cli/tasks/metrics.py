"""The table of metrics. Higher always means more of the original behaviour; values are per example, never averaged.

A metric is one formula (`formulas.py`) and one row. It is computed in float32 at least, whatever the model's dtype, and
refuses to be anything but a finite number. No torch needed to list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from relp_cli.errors import RelpError
from relp_cli.registry import Registry, load

if TYPE_CHECKING:
    from relp_cli.tasks.formulas import MetricFn


@dataclass(frozen=True)
class Metric:
    """A row of the table. `where` is `module:function`, imported when the metric is used.

    linear: in the logits (conservation holds). differentiable: gradient methods can use it.
    zero_grad_at_original: its gradient at the original prompt is exactly 0, so methods that evaluate there are refused.
    several: takes answers of several tokens (`tasks.parts`); for others every answer is one token, or a set of such.
    """

    name: str
    where: str
    linear: bool
    differentiable: bool
    zero_grad_at_original: bool
    description: str
    formula: Callable[..., Any] | None = None  # a function of a Python session, in place of `where`
    several: bool = False

    @cached_property
    def fn(self) -> MetricFn:
        """(logits, answer, foil, reference) → Float[batch]. Raises: `formulas.NotFinite`."""
        from relp_cli.tasks.formulas import checked

        return checked(self.name, load(self.where) if self.formula is None else self._held_to_its_shape, self.several)

    def _held_to_its_shape(self, logits: Any, answer: Any, foil: Any, reference: Any) -> Any:
        assert self.formula is not None
        wanted = (logits, answer, foil, reference) if self.zero_grad_at_original else (logits, answer, foil)
        values = self.formula(*wanted)
        shape = tuple(getattr(values, "shape", ())) if hasattr(values, "is_floating_point") else None
        if shape != (len(logits),) or not values.is_floating_point():
            told = type(values).__name__ if shape is None else f"{values.dtype} of shape {list(shape)}"
            raise RelpError(f"metric '{self.name}': expected one float per example, [{len(logits)}], got {told}")
        if logits.requires_grad and not values.requires_grad:
            raise RelpError(f"metric '{self.name}' has no gradient; it serves act_patch and evaluation only")
        return values


METRICS: Registry[Metric] = Registry("metric")
FORMULAS = "relp_cli.tasks.formulas"
for _row in (
    Metric("logit_diff", f"{FORMULAS}:logit_diff", True, True, False, "logit[answer] − logit[foil]"),
    Metric("prob_diff", f"{FORMULAS}:prob_diff", False, True, False, "p(answers) − p(foils), over token sets"),
    Metric(
        "answer_logprob",
        f"{FORMULAS}:answer_logprob",
        False,
        True,
        False,
        "log p(answer) − log p(foil), summed over the tokens of each: answers of several tokens",
        several=True,
    ),
    Metric("kl", f"{FORMULAS}:kl", False, True, True, "−KL(original ‖ run), summed over the vocabulary"),
    Metric("accuracy", f"{FORMULAS}:accuracy", False, False, False, "1 where the answer beats the foil"),
):
    METRICS.add(_row.name, _row)

OWN = "own:"  # what a function's name is recorded with, so that it is never taken for a row's


def metric_of(metric: str | Callable[..., Any] | Metric) -> Metric:
    """The row of a name, or one made of a function (logits, answer, foil) → Float[batch].

    logits Float[batch, vocab] are of the last position, in float32 at least; answer, foil Int[batch, k] with -1 where there
    are fewer. A function with a fourth parameter that has no default also gets the original run's logits; it counts as one
    whose gradient is 0 there, as kl's is, so gradient methods that evaluate at the original refuse it.

    Raises: RelpError for an unknown name, the recorded name of a function, and what cannot be called with three or four values.
    """
    if isinstance(metric, Metric):
        return metric
    if not callable(metric):
        if isinstance(metric, str) and metric.startswith(OWN):
            raise RelpError(
                f"metric '{metric}' was a function of a Python session: give metric= again, the function or one of "
                f"{', '.join(METRICS)}"
            )
        return METRICS[metric]
    name = OWN + str(getattr(metric, "__name__", type(metric).__name__))
    try:
        parameters = list(inspect.signature(metric).parameters.values())
    except (TypeError, ValueError):  # builtins may have no signature
        parameters = []
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in places)
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if needed > 4 or (len(places) < 3 and not starred):
        raise RelpError(
            f"metric '{name}': expected a function of (logits, answer, foil) or (logits, answer, foil, reference), it takes "
            f"{len(places)} values"
        )
    return Metric(name, "", False, True, needed == 4, "a function of a Python session", metric)
