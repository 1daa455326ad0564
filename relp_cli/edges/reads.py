"""Where a layer's readers read the residual stream, and the norm between the two.

Most architectures norm before attention and again before the MLP. In parallel blocks both may read one norm (GPT-J, Phi,
Falcon, Cohere): the MLP's own input then passes that norm by hand. Where norms only follow (OLMo-2, Exaone-4), readers read
the stream itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.lrp.sites import centred, linear_parameters, weighted
from relp_cli.models.model import Model
from relp_cli.models.offload import parameter
from relp_cli.spaces.graph import QKV


@dataclass(frozen=True)
class Norm:
    """weight · centre(x)/σ(x) + bias; without a component, x. centre: x − mean(x) under LayerNorm, else x."""

    name: str
    component: Any | None

    @property
    def centres(self) -> bool:
        return self.component is not None and not self.component.uses_rms_norm

    def bias(self, like: Tensor) -> Tensor | None:
        return parameter(self.component, "bias", like) if self.centres else None

    def centre(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return x if self.component is None else centred(self.component, x)

    def weighted(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """x times the norm's weight."""
        return x if self.component is None else weighted(self.component, x)

    def sigma(self, centred: Float[Tensor, "... d_model"]) -> Tensor | float:
        """What the centred stream is divided by: Float[..., 1]."""
        if self.component is None:
            return 1.0
        mean_square = torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square() / centred.shape[-1]
        return (mean_square + _epsilon(self, centred)).sqrt()

    def __call__(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        numerator = self.centre(x)
        out = self.weighted(numerator / self.sigma(numerator))
        bias = self.bias(x)
        return (out if bias is None else out + bias).to(x.dtype)


def _epsilon(norm: Norm, like: Tensor) -> float:
    """What a norm adds to the variance; measured on a small input where it does not say (OLMo's)."""
    original = norm.component.original_component  # type: ignore[union-attr]
    for name in ("eps", "variance_epsilon"):
        if getattr(original, name, None) is not None:
            return float(getattr(original, name))
    small = 1e-2 * (1 - 2 * (torch.arange(like.shape[-1], device=like.device) % 2)).to(like.dtype)
    out = (original(small[None]) - original(-small[None])) / 2  # without the bias
    sigma = (norm.weighted(small) / out[0]).double().mean()
    return float(sigma**2 - small.double().square().mean())


@dataclass(frozen=True)
class Reads:
    """stream: hook point of the stream that attention reads through `norm`; mlp: where the MLP's own input is put, which is
    the stream where the MLP has a norm of its own or none, and (`shared`) else the output of attention's norm.
    """

    stream: str
    norm: Norm
    mlp: str
    shared: bool


def reads(model: Model, layer: int) -> Reads:
    """What a layer's readers read. `edges.check` verifies it on the model."""
    block = f"blocks.{layer}"
    first, second = (f"{block}.{norm}.hook_in" in model.points for norm in ("ln1", "ln2"))
    return Reads(
        f"{block}.ln1.hook_in" if first else f"{block}.attn.hook_in",
        Norm(f"{block}.ln1", model.component(f"{block}.ln1") if first else None),
        f"{block}.ln2.hook_in" if second else f"{block}.mlp.hook_in",
        first and not second,
    )


def projections(
    model: Model, layer: int, transposed: bool = False
) -> list[tuple[Float[Tensor, "head d_head d_model"], Tensor | None]]:
    """Per q, k, v: the projection of each query head with the attention's norm folded in, and its bias.

    For a reader input x with norm denominator σ(x): value = W·centre(x)/σ + bias, where W = W_part ∘ norm weight
    (centre: subtract the mean over d_model; nothing under RMSNorm).
    transposed: with centred rows, W∘centre: then Wᵀg/σ is pulled back to x, the centring included.
    """
    shape, norm = model.shape, reads(model, layer).norm
    out: list[tuple[Tensor, Tensor | None]] = []
    for part in QKV:
        heads = shape.n_heads if part == "q" else shape.n_kv_heads
        weight, bias = linear_parameters(model, f"blocks.{layer}.attn.{part}", shape.d_model, heads * shape.d_head)
        folded = norm.weighted(weight)
        folded = (norm.centre(folded) if transposed else folded).unflatten(0, (heads, -1))
        of_norm = norm.bias(weight)
        total = bias if of_norm is None else weight @ of_norm + (0 if bias is None else bias)
        total = None if total is None else total.unflatten(0, (heads, -1))
        repeats = shape.n_heads // heads
        if repeats > 1:
            folded = folded.repeat_interleave(repeats, dim=0)
            total = None if total is None else total.repeat_interleave(repeats, dim=0)
        out.append((folded, total))
    return out


def project(
    norm: Norm, x: Float[Tensor, "reader batch pos d_model"], projection: Tensor, bias: Tensor | None
) -> Float[Tensor, "reader batch pos d_head"]:
    """norm and projection of one reader input per head: x must be centred already (`projections`)."""
    out = torch.bmm(x.flatten(1, 2), projection.transpose(1, 2)).unflatten(1, x.shape[1:3]) / norm.sigma(x)
    return (out if bias is None else out + bias[:, None, None]).to(x.dtype)
