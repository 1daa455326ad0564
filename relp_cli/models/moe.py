"""Mixtures of experts as one formula: out = Σ_k w_k·E_k(x) [+ sigmoid(g·x)·E_shared(x)], E(x) = W_down·(act(W_gate·x)·W_up·x).

w_k is the softmax of the router's logits at the k-th chosen expert, renormalised over the chosen where the model does so
(Mixtral always; Qwen-MoE and OLMoE by `norm_topk_prob`). Which experts are chosen is read from the run, never recomputed.
The formula is verified on the model at load (`checks.py`); LRP rules replace its two products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.models.model import Model
from relp_cli.models.offload import parameter

Product = Callable[..., Tensor]  # (a, b) or, with the other run's values, (a, b, a', b') → a·b, or act(a)·b

X, CHOSEN, OUT = "mlp.hook_in", "mlp.gate.hook_expert_indices", "mlp.hook_out"
PARTS = {"gate", "experts", "shared_expert", "shared_expert_gate"}


@dataclass(frozen=True, eq=False)
class Expert:
    """One gated MLP: gate, up [d_mlp, d_model], down [d_model, d_mlp]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def share(self, weights: list[Tensor], xs: list[Tensor], hidden: Product, weigh: Product) -> Tensor:
        """weight · E(x); lists hold one tensor per run, Float[tokens, 1] and Float[tokens, d_model]."""
        parts = [(x @ self.gate.T, x @ self.up.T) for x in xs]
        others = [*chain(*parts[1:])]
        outputs = [hidden(*own, *others) @ self.down.T for own in parts]
        return weigh(*chain(*zip(weights, outputs, strict=True)))


@dataclass(frozen=True, eq=False)
class MoE:
    """One layer. router [experts, d_model]; normalised: over the chosen; shared, shared_gate [1, d_model]: Qwen2-MoE's."""

    router: Tensor
    experts: tuple[Expert, ...]
    normalised: bool
    shared: Expert | None = None
    shared_gate: Tensor | None = None

    def weights(self, x: Tensor, chosen: Tensor) -> Float[Tensor, "tokens k"]:
        """The chosen experts' weights; their softmax is in float32, as the models' own."""
        weights = (x @ self.router.T).float().softmax(-1).gather(-1, chosen)
        return (weights / weights.sum(-1, keepdim=True) if self.normalised else weights).to(x.dtype)

    def output(
        self,
        x: Float[Tensor, "batch pos d_model"],
        chosen: Int[Tensor, "tokens k"],
        hidden: Product,
        weigh: Product,
        other: Float[Tensor, "batch pos d_model"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The formula at x, with `hidden` for act(pre)·up and `weigh` for w·E. other: another run's x, whose values the
        products see too, under the choice of experts made at x.
        """
        xs = [t.flatten(0, 1) for t in (x, other) if t is not None]
        weights = [self.weights(t, chosen) for t in xs]
        out = torch.zeros_like(xs[0])
        for number in chosen.unique().tolist():
            token, k = torch.where(chosen == number)
            at = [w[token, k, None] for w in weights], [t[token] for t in xs]
            out.index_add_(0, token, self.experts[number].share(*at, hidden, weigh))
        if self.shared is not None and self.shared_gate is not None:
            out = out + self.shared.share([(t @ self.shared_gate.T).sigmoid() for t in xs], xs, hidden, weigh)
        return out.view_as(x)


def check_moe(model: Model, layer: int) -> dict[str, Any]:
    """The modules of a layer's mixture. Raises RelpError for experts of another form than the formula's."""
    block = _plain(model.component(f"blocks.{layer}.mlp"))
    parts = {name: _plain(part) for name, part in block.named_children()}
    experts: Any = parts.get("experts")
    if not _known(experts) or set(parts) - PARTS:
        raise RelpError(
            f"model {model.name} ({model.family.name}): the mixture of experts of layer {layer} ({type(block).__name__}) "
            "is of no form known here (Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE); this architecture is not supported"
        )
    return parts


def moe_of(model: Model, layer: int) -> MoE:
    """A layer's experts, as views of its parameters. Raises RelpError for experts of another form than the formula's."""
    parts = check_moe(model, layer)

    def read(module: Any, name: str = "weight") -> Any:
        return parameter(_plain(module), name, model.device)

    gate, up = read(parts["experts"], "gate_up_proj").chunk(2, dim=1)
    shared = parts.get("shared_expert")
    return MoE(
        router=read(parts["gate"]),
        experts=tuple(Expert(*of) for of in zip(gate, up, read(parts["experts"], "down_proj"), strict=True)),
        normalised=getattr(parts["gate"], "norm_topk_prob", True),
        shared=shared and Expert(*(read(p) for p in (shared.gate_proj, shared.up_proj, shared.down_proj))),
        shared_gate=read(parts["shared_expert_gate"]) if shared else None,
    )


def _known(experts: Any) -> bool:
    """Gate above up in one tensor, no biases, [expert, out, in]."""
    stacked = isinstance(getattr(experts, "gate_up_proj", None), Tensor) and experts.gate_up_proj.ndim == 3
    return stacked and experts.is_concatenated and not (experts.has_bias or experts.is_transposed)


def _plain(module: Any) -> Any:
    """The Hugging Face module inside a bridge component."""
    while hasattr(module, "original_component"):
        module = module.original_component
    return module
