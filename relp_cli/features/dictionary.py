"""A sparse autoencoder as data: one dataclass for all classes, and a table of the forms their encoders take.

Every class is brought to x̂ = f·W_dec + b_dec with f = form((x − b_in)·W_enc + b_enc) · f_scale; what the classes do
differently is the form (a row of `FORMS`) and which of the tensors are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.registry import Registry


@dataclass(frozen=True, eq=False)
class Dictionary:
    """One dictionary. d_in: width of the site, d_sae: number of features.

    w_enc: Float[d_in, d_sae]   b_enc: Float[d_sae]   w_dec: Float[d_sae, d_in]   b_dec, b_in: Float[d_in]
    threshold: Float[d_sae] (jumprelu)   k: features kept (topk)   f_scale: Float[d_sae], or None for 1
    gate_bias, mag_scale, mag_bias: Float[d_sae] (gated)
    label: the class it was loaded as, for people.
    """

    form: str
    label: str
    w_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    w_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    b_in: Float[Tensor, " d_in"]
    threshold: Tensor | None = None
    k: int | None = None
    f_scale: Tensor | None = None
    gate_bias: Tensor | None = None
    mag_scale: Tensor | None = None
    mag_bias: Tensor | None = None

    @property
    def d_in(self) -> int:
        return int(self.w_dec.shape[1])

    @property
    def n_features(self) -> int:
        return int(self.w_dec.shape[0])

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """f(x) ≥ 0."""
        f = FORMS[self.form]((x - self.b_in) @ self.w_enc + self.b_enc, self)
        return f if self.f_scale is None else f * self.f_scale

    def decode(self, f: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        """x̂ = f·W_dec + b_dec."""
        return f @ self.w_dec + self.b_dec

    def split(self, x: Float[Tensor, "... d_in"]) -> tuple[Tensor, Tensor]:
        """(f, ε) with x = decode(f) + ε."""
        f = self.encode(x)
        return f, x - self.decode(f)

    def to(self, device: torch.device, dtype: torch.dtype) -> Dictionary:
        moved: dict[str, Any] = {name: v.to(device, dtype) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def _relu(pre: Tensor, d: Dictionary) -> Tensor:  # noqa: ARG001
    return pre.relu()


def _topk(pre: Tensor, d: Dictionary) -> Tensor:
    assert d.k is not None
    best = pre.topk(d.k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())


def _jumprelu(pre: Tensor, d: Dictionary) -> Tensor:
    assert d.threshold is not None
    return pre.relu() * (pre > d.threshold)


def _gated(pre: Tensor, d: Dictionary) -> Tensor:
    assert d.gate_bias is not None
    assert d.mag_scale is not None
    assert d.mag_bias is not None
    return (pre * d.mag_scale + d.mag_bias).relu() * (pre + d.gate_bias > 0)


# pre-activations Float[..., d_sae] → features
FORMS: Registry[Callable[[Tensor, Dictionary], Tensor]] = Registry("dictionary form")
for _name, _form in {"relu": _relu, "topk": _topk, "jumprelu": _jumprelu, "gated": _gated}.items():
    FORMS.add(_name, _form)
