"""Attention scores as the model itself forms them: what enters each layer's softmax, whatever its hooks are called.

Hook names are not enough. Where the bridge leaves attention to Hugging Face (GPT-J, GPT-Neo, OPT), `hook_pattern` and
`hook_attn_scores` fire after the fact and both hold probabilities. So scores are taken at the softmax, and it is verified
that they give the pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from relp_cli.errors import RelpError
from relp_cli.models.checks import TOLERANCE
from relp_cli.models.model import Hook, Model
from relp_cli.models.recompute import again
from relp_cli.nodes.access import Activations, capture, split, units
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind
from relp_cli.precision import wide

PATTERN = NodeKind("pattern", "blocks.{l}.attn.hook_pattern", "vector", "attention probabilities, not a node")
QUERIES_AND_KEYS = (NODE_KINDS["query"], NODE_KINDS["key"])
SOFTMAX = (torch.softmax, Tensor.softmax, torch.nn.functional.softmax)


class _SoftmaxInputs(TorchFunctionMode):
    """Notes what enters every softmax over the keys of `n_heads` heads: Float[batch, head, query, key]."""

    def __init__(self, model: Model, seen: list[Tensor]) -> None:
        super().__init__()
        self.n_heads, self.device, self.seen = model.shape.n_heads, model.device, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SOFTMAX and args and args[0].ndim == 4 and args[0].shape[1] == self.n_heads and not again():
            self.seen.append(args[0].detach().to(self.device))
        return func(*args, **(kwargs or {}))


@contextmanager
def attention_scores(model: Model) -> Iterator[list[Tensor]]:
    """Collect the scores of one forward pass: per layer Float[batch, head, query, key], masked, capped and scaled as the
    model does.

    Raises: RelpError on exit unless every layer has one softmax over its keys, and softmax(scores) is its pattern.
    """
    scores: list[Tensor] = []
    patterns: dict[int, Tensor] = {}

    def keep(layer: int) -> Hook:
        return lambda value: patterns.__setitem__(layer, value.detach())

    layers = range(model.shape.n_layers)
    with model.hooks([(PATTERN.point(n), keep(n)) for n in layers]), _SoftmaxInputs(model, scores):
        yield scores
    if len(scores) != len(layers) or len(patterns) != len(layers):
        raise _unknown(model, f"{len(scores)} softmaxes and {len(patterns)} patterns for {len(layers)} layers")
    for n in layers:
        if scores[n].shape != patterns[n].shape:
            raise _unknown(model, f"layer {n} has a softmax over more than its keys")
        error = (softmax(scores[n]) - patterns[n]).abs().max().item()
        if not error <= TOLERANCE[model.dtype]:
            raise _unknown(model, f"softmax(scores) is not the pattern in layer {n}, error {error:.1e}")


def _unknown(model: Model, what: str) -> RelpError:
    return RelpError(
        f"model {model.name} ({model.family.name}): its attention scores cannot be read ({what}); "
        "atp_star works with qk_fix=false"
    )


def softmax(scores: Tensor) -> Tensor:
    """In float32 at least, as models do."""
    return wide(scores).softmax(-1)


def scores_with(model: Model, tokens: Tensor, queries_and_keys: Activations) -> list[Tensor]:
    """Scores of one forward pass in which every layer has these queries and keys, so that no layer sees another's change."""
    hooks: list[tuple[str, Hook]] = [
        (NODE_KINDS[kind].point(layer), lambda _, v=value: v)  # type: ignore[misc]
        for kind, layers in queries_and_keys.items()
        for layer, value in enumerate(layers)
    ]
    with torch.no_grad(), model.hooks(hooks), attention_scores(model) as seen:
        model.logits(tokens)
    return seen


def with_one(model: Model, kind: NodeKind, run: list[Tensor], source: list[Tensor], unit: int) -> list[Tensor]:
    """The run's values with one head's from the source, per layer."""
    out = []
    for mine, other in zip(run, source, strict=True):
        parts = split(model, kind, mine).clone()
        parts[..., unit, :] = split(model, kind, other)[..., unit, :]
        out.append(parts.flatten(-2))
    return out


_coupled: WeakKeyDictionary[Model, dict[str, bool]] = WeakKeyDictionary()


def heads_are_coupled(model: Model, kind: NodeKind) -> bool:
    """Whether one head's query (key) moves the scores of heads that it does not serve, as under a norm over all heads
    (OLMo-2). Measured, once per model and kind in a process.
    """
    known = _coupled.setdefault(model, {})
    if kind.name not in known:
        known[kind.name] = units(model, kind) > 1 and _one_moves_others(model, kind)
    return known[kind.name]


def _one_moves_others(model: Model, kind: NodeKind) -> bool:
    tokens = torch.arange(4, device=model.device)[None] % model.shape.vocab
    with torch.no_grad(), capture(model, QUERIES_AND_KEYS) as run, attention_scores(model) as before:
        model.logits(tokens)
    values = run[kind.name]
    run[kind.name] = with_one(model, kind, values, [100 * v + 1 for v in values], 0)
    served = model.shape.n_heads // units(model, kind)
    for old, new in zip(before, scores_with(model, tokens, run), strict=True):
        seen = old[:, served:] > torch.finfo(old.dtype).min / 4  # not masked
        others, moved = old[:, served:][seen], new[:, served:][seen]
        if (moved - others).abs().max() > TOLERANCE[model.dtype] * others.abs().max():
            return True
    return False
