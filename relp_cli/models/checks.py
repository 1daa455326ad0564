"""Checks at load: what every method and rule assumes of a model, verified on the model itself.

RelP's rules replace how gradients flow and leave values alone, so a wrong assumption about a formula would never show in
a forward pass. These checks compare each assumed formula with what the model computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.models.families import ACTIVATIONS, Activation
from relp_cli.models.model import Hook, Model
from relp_cli.models.moe import CHOSEN, OUT, X, moe_of
from relp_cli.models.offload import device_of

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Two ways to the same logits (fused or not, another order of sums) differ by more than one formula does.
FORWARD = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
UNGATED = ("mlp.in.hook_out", "mlp.out.hook_in")
GATED = (*UNGATED, "mlp.gate.hook_out")
MOE = (X, CHOSEN, OUT)
PROBE = 16  # tokens


def longest(config: Any) -> int | None:
    """How many positions a model was made for, by its text configuration; None where that does not say."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return None if positions is None else int(positions)


def probe(hf: Any, name: str) -> tuple[Int[Tensor, "1 pos"], Float[Tensor, "1 pos vocab"]]:
    """Some token ids, spread over the vocabulary, and the plain model's logits on them: before anything wraps it.

    Raises: RelpError where the plain model cannot run, or its logits are not finite.
    """
    vocab, n = hf.get_input_embeddings().weight.shape[0], min(PROBE, longest(hf.config.get_text_config()) or PROBE)
    tokens = (torch.arange(n, device=device_of(hf)) * (vocab // n + 1) % vocab)[None]
    try:
        with torch.no_grad():
            logits = hf(input_ids=tokens, use_cache=False).logits
    except Exception as error:  # the model's own code, on its own configuration
        raise RelpError(
            f"model '{name}' ({hf.config.model_type}) cannot run even without relp, its configuration or weights are broken: "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        ) from error
    if not torch.isfinite(logits).all():
        raise RelpError(
            f"model '{name}' ({hf.config.model_type}): its logits are not finite even without relp; its weights or "
            f"configuration are broken, or too large for {str(logits.dtype).removeprefix('torch.')}"
        )
    return tokens, logits


def check_forward(model: Model, tokens: Int[Tensor, "1 pos"], plain: Float[Tensor, "1 pos vocab"]) -> None:
    """Raises RelpError unless the wrapped model computes the plain model's logits."""
    try:
        with torch.no_grad():
            logits = model.logits(tokens, all_positions=True)
    except RelpError:
        raise
    except Exception as error:  # whatever a bridge's own attention or norm trips over
        raise RelpError(
            f"TransformerLens cannot run model '{model.name}' ({model.family.name}): "
            f"{(str(error).splitlines() or [type(error).__name__])[0][:160] or type(error).__name__}"
        ) from error
    error_ = ((logits - plain).abs().max() / plain.abs().max().clamp_min(1e-6)).item()
    if not error_ <= FORWARD[model.dtype]:
        raise RelpError(
            f"model '{model.name}' ({model.family.name}): TransformerLens's wrapper computes other logits than the model "
            f"itself, off by {error_:.1%} of the largest; it ignores something in the configuration, so every number would "
            "be of another model"
        )


def flat_points(model: Model) -> frozenset[str]:
    """Hook points of the MLPs where values are [batch·pos, width] (OPT): nodes and rules need to see positions."""
    if model.shape.moe:
        return frozenset()  # routers and experts work on tokens, and are read as such (`moe`)
    parts = ("ln2", "ln2_post", "mlp", "hook_mlp_out", "hook_mlp_in")
    names = [
        f"blocks.{layer}.{rest}"
        for layer in range(model.shape.n_layers)
        for rest in {n.removeprefix("blocks.0.") for n in model.points if n.startswith("blocks.0.")}
        if rest.partition(".")[0] in parts and f"blocks.{layer}.{rest}" in model.points
    ]
    flat: set[str] = set()
    tokens = torch.arange(6, device=model.device).view(2, 3) % model.shape.vocab

    def look(name: str) -> Hook:
        return lambda value: (
            flat.add(name) if isinstance(value, Tensor) and value.ndim == 2 and len(value) == 6 else None
        )

    with torch.no_grad(), model.hooks({name: look(name) for name in names}):
        model.logits(tokens)
    return frozenset(flat)


def mlp_form(model: Model) -> dict[str, Any]:
    """`d_mlp` and `activation` as the MLPs have them: how many hidden units, and where the configuration names no activation
    that is known here, the one that fits. (One that it names and that does not fit is refused by `check_model`.)
    """
    named = model.shape.activation
    names = ["mlp.in.hook_out", "mlp.out.hook_in", *(["mlp.gate.hook_out"] if model.shape.gated else [])]
    at = {} if model.shape.moe else _values(model, [f"blocks.0.{n}" for n in names if f"blocks.0.{n}" in model.points])
    if len(at) < len(names):
        return {}  # of mixtures of experts, or check_model says what is missing
    up, hidden = at["blocks.0.mlp.in.hook_out"], at["blocks.0.mlp.out.hook_in"]
    pre = at.get("blocks.0.mlp.gate.hook_out", up)
    size = hidden.abs().max().clamp_min(1e-6)

    def off(act: Activation) -> float:
        return ((hidden - pre * act.ratio(pre) * (up if model.shape.gated else 1)).abs().max() / size).item()

    tolerance = TOLERANCE[model.dtype]
    errors = {name: off(act) for name, act in ACTIVATIONS.items()}
    best = min(errors, key=lambda name: errors[name])
    fits = named if named in ACTIVATIONS or errors[best] > tolerance else best
    return {"d_mlp": hidden.shape[-1], "activation": fits}


NORM = re.compile(r"(?:Layer|RMS|RMSLayer|RMS_)?Norm", re.IGNORECASE)


def unscaled_norms(model: Model) -> tuple[str, ...]:
    """Norms inside the blocks, by their path in the plain model, at which no hook shows a scale."""
    hooked = {id(m) for name in model.points if name.endswith(".hook_scale") for m in _wrapped(model, name)}
    return tuple(
        path.replace("._original_component", "").replace(".original_component", "")
        for path, module in model.hf.named_modules()
        if NORM.search(type(module).__name__)
        and "Bridge" not in type(module).__name__
        and not any(True for _ in module.children())
        and re.search(r"\.\d+\.", path)
        and "vision" not in path
        and id(module) not in hooked
    )


def _wrapped(model: Model, point: str) -> list[Any]:
    component = model.component(point.removesuffix(".hook_scale"))
    return [component, getattr(component, "original_component", None)]


def _values(model: Model, names: Sequence[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        return lambda value: seen.__setitem__(name, value)

    tokens = torch.arange(4, device=model.device)[None] % model.shape.vocab
    with torch.no_grad(), model.hooks({name: keep(name) for name in names}):
        model.logits(tokens)
    return seen


def check_model(model: Model) -> None:
    """Raises RelpError unless, in every layer, resid_post = resid_pre + attn_out + mlp_out and the MLP is
    act(pre) or act(gate)·up with the activation that the configuration names.
    """
    layers = range(model.shape.n_layers)
    form = MOE if model.shape.moe else GATED if model.shape.gated else UNGATED
    names = ["hook_in", "hook_attn_out", "hook_mlp_out", "hook_out", *form]
    seen = _values(model, [f"blocks.{layer}.{n}" for layer in layers for n in names])
    tolerance = TOLERANCE[model.dtype]
    for layer in layers:
        silent = [n for n in names if f"blocks.{layer}.{n}" not in seen]
        if silent:
            raise RelpError(f"model {model.name}: layer {layer} never calls {', '.join(silent)}; not supported")
        at = {n: seen[f"blocks.{layer}.{n}"] for n in names}
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
    if got.shape != want.shape:
        raise RelpError(
            f"model {model.name} ({model.family.name}): layer {layer}: {claim} has shapes {list(got.shape)} and "
            f"{list(want.shape)}; this architecture is not supported"
        )
    error = ((got - want).abs().max() / got.abs().max().clamp_min(1e-6)).item()
    if not error <= tolerance:
        raise RelpError(
            f"model {model.name} ({model.family.name}): layer {layer} does not satisfy {claim} "
            f"(relative error {error:.1e} > {tolerance:.0e}); this architecture is not supported"
        )
