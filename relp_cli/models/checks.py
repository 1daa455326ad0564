"""Checks at load: what every method and rule assumes of a model, verified on the model itself.

RelP's rules replace how gradients flow and leave values alone, so a wrong assumption about a formula would never show in
a forward pass. These checks compare each assumed formula with what the model computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.models.families import ACTIVATIONS
from relp_cli.models.model import Hook, Model

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def check_model(model: Model) -> None:
    """Raises RelpError unless, in every layer, resid_post = resid_pre + attn_out + mlp_out and the MLP is
    act(pre) or act(gate)·up with the activation that the configuration names.
    """
    layers = range(model.shape.n_layers)
    names = ["hook_in", "hook_attn_out", "hook_mlp_out", "hook_out", "mlp.in.hook_out", "mlp.out.hook_in"]
    if model.shape.gated:
        names.append("mlp.gate.hook_out")
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
            up = at["mlp.in.hook_out"]
            pre = at["mlp.gate.hook_out"] if model.shape.gated else up
            hidden = pre * model.activation.ratio(pre) * (up if model.shape.gated else 1)
            formula = f"{model.shape.activation}(gate)·up" if model.shape.gated else f"{model.shape.activation}(pre)"
            _must_equal(model, layer, f"MLP hidden = {formula}", at["mlp.out.hook_in"], hidden, tolerance)


def _must_equal(model: Model, layer: int, claim: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = ((got - want).abs().max() / got.abs().max().clamp_min(1e-6)).item()
    if not error <= tolerance:
        raise RelpError(
            f"model {model.name} ({model.family.name}): layer {layer} does not satisfy {claim} "
            f"(relative error {error:.1e} > {tolerance:.0e}); this architecture is not supported"
        )
