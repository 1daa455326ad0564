"""Checks at load: what every method and rule assumes of a model, verified on the model itself.

RelP's rules replace how gradients flow and leave values alone, so a wrong assumption about a formula would never show in
a forward pass. These checks compare each assumed formula with what the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.models.families import ACTIVATIONS
from relp_cli.models.model import Hook, Model
from relp_cli.models.moe import CHOSEN, OUT, X, moe_of

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
UNGATED = ("mlp.in.hook_out", "mlp.out.hook_in")
GATED = (*UNGATED, "mlp.gate.hook_out")
MOE = (X, CHOSEN, OUT)


def check_model(model: Model) -> None:
    """Raises RelpError unless, in every layer, resid_post = resid_pre + attn_out + mlp_out and the MLP is
    act(pre) or act(gate)·up with the activation that the configuration names.
    """
    layers = range(model.shape.n_layers)
    form = MOE if model.shape.moe else GATED if model.shape.gated else UNGATED
    names = ["hook_in", "hook_attn_out", "hook_mlp_out", "hook_out", *form]
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        return lambda value: seen.__setitem__(name, value)

    hooks = {f"blocks.{layer}.{n}": keep(f"{layer}.{n}") for layer in layers for n in names}
    tokens = torch.arange(4, device=model.device)[None] % model.shape.vocab
    with torch.no_grad(), model.hooks(hooks):
        model.logits(tokens)
    tolerance = TOLERANCE[model.dtype]
    for layer in layers:
        silent = [n for n in names if f"{layer}.{n}" not in seen]
        if silent:
            raise RelpError(f"model {model.name}: layer {layer} never calls {', '.join(silent)}; not supported")
        at = {n: seen[f"{layer}.{n}"] for n in names}
        total = at["hook_in"] + at["hook_attn_out"] + at["hook_mlp_out"]
        _must_equal(model, layer, "resid_post = resid_pre + attn_out + mlp_out", at["hook_out"], total, tolerance)
        if model.shape.activation in ACTIVATIONS:
            claim, got, want = _mlp(model, layer, at)
            _must_equal(model, layer, claim, got, want, tolerance)


def _mlp(model: Model, layer: int, at: Mapping[str, Tensor]) -> tuple[str, Tensor, Tensor]:
    """What is claimed of an MLP, the model's value and the formula's."""
    name, act = model.shape.activation, model.activation
    if model.shape.moe:
        want = moe_of(model, layer).output(at[X], at[CHOSEN], lambda pre, up: pre * act.ratio(pre) * up, torch.mul)
        return f"MLP = Σ weight·W_down({name}(gate)·up) over the chosen experts", at[OUT], want
    up = at["mlp.in.hook_out"]
    if not model.shape.gated:
        return f"MLP hidden = {name}(pre)", at["mlp.out.hook_in"], up * act.ratio(up)
    pre = at["mlp.gate.hook_out"]
    return f"MLP hidden = {name}(gate)·up", at["mlp.out.hook_in"], pre * act.ratio(pre) * up


def _must_equal(model: Model, layer: int, claim: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = ((got - want).abs().max() / got.abs().max().clamp_min(1e-6)).item()
    if not error <= tolerance:
        raise RelpError(
            f"model {model.name} ({model.family.name}): layer {layer} does not satisfy {claim} "
            f"(relative error {error:.1e} > {tolerance:.0e}); this architecture is not supported"
        )
