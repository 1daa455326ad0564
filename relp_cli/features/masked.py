"""Running a model with some of a site's features, or a share of each: x + (what is not kept)·((f̃ − f)·W_dec + ε̃ − ε)."""

from __future__ import annotations

from torch import Tensor

from relp_cli.features.dictionary import Dictionary
from relp_cli.models.model import Hook


def keeping(d: Dictionary, features: Tensor | None, error: Tensor | None, other: tuple[Tensor, Tensor]) -> Hook:
    """A site's hook: the running activation with features f and error ε, of which what is not kept takes `other` values.

    features, error: Bool or Float[pos, feature], [pos, 1], the share that is kept, on the model's device; None: nothing is.
    other: (f̃, ε̃), with or without a batch axis. What is kept adds exactly nothing.
    """

    def hook(x: Tensor) -> Tensor:
        f, epsilon = d.split(x)
        change = _outside(features, other[0] - f) @ d.w_dec + _outside(error, other[1] - epsilon)
        return (x + change).to(x.dtype)

    return hook


def _outside(kept: Tensor | None, change: Tensor) -> Tensor:
    if kept is None:
        return change
    return change.masked_fill(kept, 0) if not kept.is_floating_point() else change * (1 - kept.to(change.dtype))
