"""The table of metrics. Higher always means more of the original behaviour; values are per example, never averaged.

A metric is one formula (`formulas.py`) and one row. It is computed in float32 at least, whatever the model's dtype, and
refuses to be anything but a finite number. No torch needed to list.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from relp_cli.registry import Registry, load

if TYPE_CHECKING:
    from relp_cli.tasks.formulas import MetricFn


@dataclass(frozen=True)
class Metric:
    """A row of the table. `where` is `module:function`, imported when the metric is used.

    linear: in the logits (conservation holds). differentiable: gradient methods can use it.
    zero_grad_at_original: its gradient at the original prompt is exactly 0, so methods that evaluate there are refused.
    """

    name: str
    where: str
    linear: bool
    differentiable: bool
    zero_grad_at_original: bool
    description: str

    @cached_property
    def fn(self) -> MetricFn:
        """(logits, answer, foil, reference) → Float[batch]. Raises: `formulas.NotFinite`."""
        from relp_cli.tasks.formulas import checked

        return checked(self.name, load(self.where))


METRICS: Registry[Metric] = Registry("metric")
FORMULAS = "relp_cli.tasks.formulas"
for _row in (
    Metric("logit_diff", f"{FORMULAS}:logit_diff", True, True, False, "logit[answer] − logit[foil]"),
    Metric("prob_diff", f"{FORMULAS}:prob_diff", False, True, False, "p(answers) − p(foils), over token sets"),
    Metric("kl", f"{FORMULAS}:kl", False, True, True, "−KL(original ‖ run), summed over the vocabulary"),
    Metric("accuracy", f"{FORMULAS}:accuracy", False, False, False, "1 where the answer beats the foil"),
):
    METRICS.add(_row.name, _row)
