"""Granite adds residual_multiplier · attention and residual_multiplier · MLP to the stream: hook points for these products,
which no module of the model computes on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Scaled(nn.Module):
    """A hook point at `factor` times the value of another one; what a hook puts there goes back divided by it."""

    def __init__(self, point: nn.Module, factor: float) -> None:
        super().__init__()
        self.factor = factor
        object.__setattr__(self, "inner", point)  # not a child: its hooks are its own

    def register_forward_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        def scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            value = output * self.factor
            new = hook(module, args, value)
            return (value if new is None else new) / self.factor  # `value` is on the way of the gradient

        inner: Any = self.inner
        handle: RemovableHandle = inner.register_forward_hook(scaled, **options)
        return handle


def contributions(points: Mapping[str, nn.Module], n_layers: int, factor: float) -> dict[str, nn.Module]:
    """`hook_attn_out` and `hook_mlp_out` of every layer; {} where the factor is 1."""
    if factor == 1:
        return {}
    return {
        f"blocks.{layer}.hook_{part}_out": Scaled(points[f"blocks.{layer}.{part}.hook_out"], factor)
        for layer in range(n_layers)
        for part in ("attn", "mlp")
        if f"blocks.{layer}.{part}.hook_out" in points
    }
