"""A sparse autoencoder as data: one dataclass for all classes, and a table of when a feature is active.

Every class is brought to x̂ = f·W_dec + b_dec with f = value · f_scale where the feature is active and 0 elsewhere; value is
pre = (x − b_in)·W_enc + b_enc, or pre · mag_scale + mag_bias. What the classes do differently is when a feature is active (a
row of `ACTIVE`) and which of the tensors are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.precision import wide
from relp_cli.registry import Registry


@dataclass(frozen=True, eq=False)
class Dictionary:
    """One dictionary. d_in: width of the site, d_sae: number of features.

    w_enc: Tensor
    threshold: Float[d_sae] (jumprelu)   k: features kept (topk)   f_scale: Float[d_sae], or None for 1
    gate_bias, mag_scale, mag_bias: Float[d_sae] (gated)
    label: the class it was loaded as, for people. stored: the dtype of its file.
    """

    form: str
    label: str
    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    b_in: Tensor
    threshold: Tensor | None = None
    k: int | None = None
    f_scale: Tensor | None = None
    gate_bias: Tensor | None = None
    mag_scale: Tensor | None = None
    mag_bias: Tensor | None = None
    stored: str = ""

    @property
    def d_in(self) -> int:
        return int(self.w_dec.shape[1])

    @property
    def n_features(self) -> int:
        return int(self.w_dec.shape[0])

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def encode(self, x: Float[Tensor, "... d_in"], units: Sequence[int] | None = None) -> Float[Tensor, "... d_sae"]:
        """f(x) ≥ 0, or of these `units` alone (what is active is decided among all features, as TopK needs it).

        Gradients are those of the linear parts: which features are active is held constant.
        Computed in float32 at least, whatever the model's dtype: which features are the k largest hangs on small differences.
        """
        x = wide(x)
        pre = (x - self.b_in) @ self.w_enc + self.b_enc
        active = ACTIVE[self.form](pre, self)
        chosen = slice(None) if units is None else list(units)
        if units is not None:  # again, so that a gradient meets these columns of W_enc alone
            pre, active = (x - self.b_in) @ self.w_enc[:, chosen] + self.b_enc[chosen], active[..., chosen]
        f = self._value(pre, chosen).masked_fill(~active, 0)
        return f if self.f_scale is None else f * self.f_scale[chosen]

    def _value(self, pre: Tensor, chosen: slice | list[int] = slice(None)) -> Tensor:
        """What a feature is where it is active, before f_scale."""
        if self.mag_scale is None or self.mag_bias is None:
            return pre
        return pre * self.mag_scale[chosen] + self.mag_bias[chosen]

    def decode(self, f: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        """x̂ = f·W_dec + b_dec."""
        return f @ self.w_dec + self.b_dec

    def split(self, x: Float[Tensor, "... d_in"]) -> tuple[Tensor, Tensor]:
        """(f, ε) with x = decode(f) + ε."""
        f = self.encode(x)
        return f, wide(x) - self.decode(f)

    def to(self, device: torch.device, dtype: torch.dtype) -> Dictionary:
        """In that dtype, or in float32 where it is narrower."""
        dtype = torch.promote_types(dtype, torch.float32)
        moved: dict[str, Any] = {name: v.to(device, dtype) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def _relu(pre: Tensor, _: Dictionary) -> Tensor:
    return pre > 0


def _topk(pre: Tensor, d: Dictionary) -> Tensor:
    assert d.k is not None
    return torch.zeros_like(pre, dtype=torch.bool).scatter(-1, pre.topk(d.k, dim=-1).indices, True) & (pre > 0)


def _jumprelu(pre: Tensor, d: Dictionary) -> Tensor:
    assert d.threshold is not None
    return (pre > d.threshold) & (pre > 0)


def _gated(pre: Tensor, d: Dictionary) -> Tensor:
    assert d.gate_bias is not None
    return (pre + d.gate_bias > 0) & (d._value(pre) > 0)


# pre-activations Float[..., d_sae] → Bool[..., d_sae], which features are active
ACTIVE: Registry[Callable[[Tensor, Dictionary], Tensor]] = Registry("dictionary form")
for _name, _form in {"relu": _relu, "topk": _topk, "jumprelu": _jumprelu, "gated": _gated}.items():
    ACTIVE.add(_name, _form)
