"""One layer at which rules act: what it reads, where it writes, and what stands there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class RuleSite:
    """One layer: `reads` are hook points (input name → point), `write` the point whose value the surrogate replaces.

    surrogate(inputs, y, other) → f, where `other` holds the same site's `record`ed values in the other run.
    record(inputs) → what a two-point rule needs of the other run, of which it also reads `beside`.
    value(inputs, other) → what stands at `write` by the formula that the surrogate was made for; `lrp` compares the two.
    """

    name: str
    rules: tuple[str, ...]
    reads: Mapping[str, str]
    write: str
    surrogate: Callable[[Values, Tensor, Values | None], Tensor]
    record: Callable[[Values], dict[str, Tensor]]
    value: Callable[[Values, Values | None], Tensor]
    beside: Mapping[str, str] = field(default_factory=dict)


def replace(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` going forward, the gradient of `surrogate` (which a float32 scale may have widened) going backward."""
    return value.detach() + (surrogate - surrogate.detach()).to(value.dtype)
