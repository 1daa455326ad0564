"""`Model`: a frozen, hookable transformer and the facts about its shape that the rest of the package reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from relp_cli.errors import RelpError, visible
from relp_cli.models.families import ACTIVATIONS, Activation, Family
from relp_cli.models.offload import forgetting

Hook = Callable[[Tensor], "Tensor | None"]


@dataclass(frozen=True)
class Shape:
    """Sizes, and what the blocks are made of.

    clip_qkv: queries, keys and values are clipped to ± that. positions: how many the model was made for; learned_positions:
    it has no more of them. residual_multiplier: what contributions are scaled by before they are added (Granite). moe: every
    MLP is a mixture of (gated) experts of d_mlp hidden units each.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab: int
    gated: bool
    moe: bool
    parallel: bool
    post_norm: bool
    attn_softcap: float | None
    final_softcap: float | None
    activation: str
    clip_qkv: float | None = None
    positions: int | None = None
    learned_positions: bool = False
    residual_multiplier: float = 1.0


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A causal language model in eval mode with frozen parameters.

    hf:        the Hugging Face model whose modules the TransformerLens bridge has wrapped; calling it fires every hook.
    bridge:    that wrapper, whose components (`blocks.0.ln1`) know their weights' conventions.
    points:    hook point name (`blocks.0.hook_in`) → module, and `logits`, through which the final logits pass.
    tokenizer: Hugging Face fast tokenizer, or None (token-id pairs only).
    bos:       the token id that prompts start with, or None.
    flat:      hook points where the model has one row per token, [batch·pos, width]; hooks see [batch, pos, width] there.
    unscaled_norms: paths of norms inside the blocks at which no hook shows a scale, so that no rule can act on them.
    device:    where token ids and logits are, and every value that hooks see.
    device_map: what it was loaded by (`placement.written`), or None.
    fetches:   weights are elsewhere between the calls of their modules (`offload`).
    spread:    modules run on several devices.
    batch:     how many prompts the running forward pass has.
    reads:     how many last positions `logits` is asked for (`reading`).
    bos_asked: whether that was asked for at loading; otherwise it is TransformerLens's default for the architecture.
    """

    name: str
    hf: nn.Module
    bridge: Any
    points: Mapping[str, nn.Module]
    tokenizer: Any
    bos: int | None
    family: Family
    shape: Shape
    revision: str
    dtype: torch.dtype
    device: torch.device
    device_map: str | None = None
    fetches: bool = False
    spread: bool = False
    bos_asked: bool = False
    flat: frozenset[str] = frozenset()
    unscaled_norms: tuple[str, ...] = ()
    batch: list[int] = field(default_factory=lambda: [0])
    reads: int = 1
    _views: dict[int, Model] = field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        s, dtype = self.shape, str(self.dtype).removeprefix("torch.")
        sizes = f"{s.n_layers} layers, {s.n_heads} heads, d_model {s.d_model}, d_mlp {s.d_mlp}, {s.vocab} tokens"
        return f"Model({visible(self.name)}: {self.family.name}, {sizes}, {dtype} on {self.device})"

    def reading(self, n: int) -> Model:
        """The same model, whose `logits` are those of the last n positions."""
        if n == self.reads:
            return self
        if n not in self._views:
            self._views[n] = replace(self, reads=n)
        return self._views[n]

    def point(self, name: str) -> nn.Module:
        """The hook point of that name. Raises RelpError where the architecture has none."""
        if name not in self.points:
            raise RelpError(f"model {self.name} ({self.family.name}) has no hook point '{name}'")
        return self.points[name]

    def component(self, name: str) -> Any:
        """The bridge component of that name (`blocks.0.ln1`, `blocks.0.attn.q`)."""
        component = self.bridge
        for part in name.split("."):
            component = component[int(part)] if part.isdigit() else getattr(component, part)
        return component

    def with_bos(self, ids: list[int]) -> list[int]:
        """Token ids of a text with this model's BOS in front, unless it has none or they start with it already."""
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    @property
    def activation(self) -> Activation:
        return ACTIVATIONS[self.shape.activation]

    @contextmanager
    def hooks(self, hooks: Mapping[str, Hook] | list[tuple[str, Hook]]) -> Iterator[None]:
        """Run `fn(value)` at each named hook point; a returned tensor replaces the value. Removed on exit, always."""
        items = list(hooks.items()) if isinstance(hooks, Mapping) else hooks
        with ExitStack() as stack:
            for name, fn in items:
                seen = self._by_prompt(name, fn) if name in self.flat else fn
                seen = self._on_one_device(name, seen) if self.spread else seen
                handle = self.point(name).register_forward_hook(_as_forward_hook(seen))
                stack.callback(handle.remove)
            yield

    def _by_prompt(self, name: str, fn: Hook) -> Hook:
        """A hook for a point with a row per token. What it sees is on the way of the gradient, but at a norm's scale, where no
        node is: a value that comes back there counts as an edit, for which TransformerLens computes the norm in another way.
        """

        def hook(value: Tensor) -> Tensor | None:
            shaped = value.unflatten(0, (self.batch[0], -1))
            new = fn(shaped)
            if new is None and name.endswith(".hook_scale"):
                return None
            return (shaped if new is None else new).flatten(0, 1)

        return hook

    def _on_one_device(self, name: str, fn: Hook) -> Hook:
        """A hook that sees its value on the model's `device`; like `_by_prompt`, it is on the way of the gradient."""

        def hook(value: Tensor) -> Tensor | None:
            moved = value.to(self.device)
            new = fn(moved)
            if moved is value or (new is None and name.endswith(".hook_scale")):
                return new
            return (moved if new is None else new).to(value.device)

        return hook

    def check_tokens(self, tokens: Tensor) -> None:
        """Raises RelpError for token ids, or positions, that the model does not have."""
        if self.shape.learned_positions and self.shape.positions and tokens.shape[1] > self.shape.positions:
            raise RelpError(
                f"a prompt of {tokens.shape[1]} tokens; model {self.name} has {self.shape.positions} positions"
            )
        largest, smallest = int(tokens.max()), int(tokens.min())
        if largest >= self.shape.vocab or smallest < 0:
            wrong = largest if largest >= self.shape.vocab else smallest
            raise RelpError(f"token id {wrong}: model {self.name} has ids 0 to {self.shape.vocab - 1}")

    def logits(self, tokens: Tensor, all_positions: bool = False, past: Any = None) -> Tensor:
        """Logits Float[batch, vocab] at the last position (Float[batch, pos, vocab] if `all_positions`); of a model that reads
        several (`reading`) Float[batch, reads, vocab].

        past: a Hugging Face cache of keys and values, of the positions before these tokens.
        The unembedding is computed only where it is read: slicing its input is exact and saves most of its cost.
        Raises: RelpError for token ids, or positions, that the model does not have.
        """
        self.check_tokens(tokens)
        self.batch[0] = len(tokens)
        given: dict[str, Any] = {"input_ids": tokens, "use_cache": past is not None}
        given |= {} if past is None else {"past_key_values": past}
        with forgetting() if self.fetches and torch.is_grad_enabled() else nullcontext():
            if all_positions:
                return self.point("logits")(self.hf(**given).logits)
            with self.hooks({"unembed.hook_in": lambda h: h[:, -self.reads :].contiguous()}):
                logits: Tensor = self.point("logits")(self.hf(**given).logits)
        return logits[:, 0] if self.reads == 1 else logits


def expect_model(model: Any) -> None:
    """Raises RelpError for what is no `Model`, and says how to make one."""
    if not isinstance(model, Model):
        hint = {str: ": relp.load_model(name)"}.get(type(model), "")
        if isinstance(model, nn.Module):
            hint = ": relp.load_model(model, tokenizer=...)"
        raise RelpError(f"expected a model that relp.load_model returned, got a {type(model).__name__}{hint}")


def _as_forward_hook(fn: Hook) -> Callable[..., Tensor | None]:
    return lambda _module, _args, output: fn(output)
