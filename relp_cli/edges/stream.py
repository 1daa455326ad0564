"""The residual stream of a run: what each writer adds to it. The only code of `edges/` that knows hook names.

1. Heads are kept as z, before W_O, in one tensor per layer; `Written.heads_out` forms a layer's outputs z·W_O when they
   are read, so nothing of size heads × d_model × layers is held by a forward pass.
2. Under post-norms (Gemma-2) a head's share is z·W_O times the weight and *the run's own* scale of the post-norm, so that
   heads and bias share sum to attn_out in every run.
3. Grouped-query attention runs with each query head's own copy of its key and value (`ungrouped`), so that a copy's
   gradient is that head's share, and a copy can be given an input of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from relp_cli.edges.reads import Norm
from relp_cli.errors import RelpError
from relp_cli.lrp.sites import linear_parameters, numerator
from relp_cli.methods.means import label_means
from relp_cli.models.model import Hook, Model
from relp_cli.precision import wide


@dataclass(frozen=True)
class Written:
    """What the writers of one run add to the residual stream, or a difference or mean of such.

    input: Float[batch, pos, d_model], the token embedding without positional embeddings.
    heads: per layer Float[batch, pos, heads·d_head], z (over the post-norm's scale, where there is one).
    mlps:  per layer Float[batch, pos, d_model].
    """

    input: Float[Tensor, "*batch pos d_model"]
    heads: tuple[Float[Tensor, "*batch pos width"], ...]
    mlps: tuple[Float[Tensor, "*batch pos d_model"], ...]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Written:
        return Written(fn(self.input), tuple(map(fn, self.heads)), tuple(map(fn, self.mlps)))

    def zip(self, fn: Callable[[Tensor, Tensor], Tensor], other: Written) -> Written:
        pairs = (zip(getattr(self, part), getattr(other, part), strict=True) for part in ("heads", "mlps"))
        heads, mlps = (tuple(fn(a, b) for a, b in layers) for layers in pairs)
        return Written(fn(self.input, other.input), heads, mlps)

    def __sub__(self, other: Written) -> Written:
        return self.zip(lambda a, b: wide(a) - wide(b), other)

    def heads_out(
        self, model: Model, layer: int, rows: slice = slice(None), out: Tensor | None = None
    ) -> Float[Tensor, "head batch pos d_model"]:
        """A layer's heads as they are added to the residual stream; out: a contiguous tensor to write into."""
        return heads_out(model, layer, self.heads[layer][rows], out)


def heads_out(
    model: Model, layer: int, z: Float[Tensor, "*batch pos width"], out: Tensor | None = None
) -> Float[Tensor, "head batch pos d_model"]:
    """z·W_O per head, through the post-norm's weight."""
    heads = model.shape.n_heads
    weight, _ = linear_parameters(model, f"blocks.{layer}.attn.o", z.shape[-1], model.shape.d_model)
    by_head = z.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3).flatten(1, 2)
    flat = None if out is None else out.flatten(1, 2)
    made = torch.bmm(by_head, weight.T.to(z.dtype).unflatten(0, (heads, -1)), out=flat).unflatten(1, z.shape[:2])
    if model.shape.residual_multiplier != 1:
        made.mul_(model.shape.residual_multiplier)
    if not model.shape.post_norm:
        return made
    weighed = numerator(model.component(f"blocks.{layer}.ln1_post"), made)
    return weighed if out is None else out.copy_(weighed)


class Recorder:
    """Hooks that record what the writers write in the forward passes that run under them.

    graph: with the graph that leads to it; else what is read off is detached.
    """

    def __init__(self, model: Model, graph: bool = False) -> None:
        self.model, self.graph = model, graph
        self.seen: dict[str, Tensor] = {}
        self._reads = "hook_in" if graph else "hook_scale"  # a scale has no graph; it is made anew

    def _at(self, name: str) -> Tensor:
        return self.seen[name] if self.graph else self.seen[name].detach()

    def hooks(self) -> list[tuple[str, Hook]]:
        layers = range(self.model.shape.n_layers)
        names = ["blocks.0.hook_in", *(["pos_embed.hook_out"] if "pos_embed.hook_out" in self.model.points else [])]
        for layer in layers:
            names += [f"blocks.{layer}.attn.o.hook_in", f"blocks.{layer}.hook_mlp_out"]
            names += [f"blocks.{layer}.ln1_post.{self._reads}"] if self.model.shape.post_norm else []
        return [(name, self._keep(name)) for name in names]

    def _keep(self, name: str) -> Hook:
        def hook(value: Tensor) -> None:
            if value.ndim != 3:
                raise RelpError(
                    f"model {self.model.name} ({self.model.family.name}): {name} has no axes for batch and position"
                )
            self.seen[name] = value

        return hook

    @property
    def input(self) -> Tensor:
        value = self._at("blocks.0.hook_in")
        return value - self._at("pos_embed.hook_out") if "pos_embed.hook_out" in self.seen else value

    def heads(self, layer: int) -> Tensor:
        z = self._at(f"blocks.{layer}.attn.o.hook_in")
        if not self.model.shape.post_norm:
            return z
        return (z / self._scale(layer)).to(z.dtype)

    def _scale(self, layer: int) -> Tensor | float:
        """What the post-norm divides by: Float[batch, pos, 1]."""
        name = f"blocks.{layer}.ln1_post"
        value, norm = self._at(f"{name}.{self._reads}"), Norm(name, self.model.component(name))
        return norm.sigma(norm.centre(value)) if self.graph else value

    def constant(self, layer: int, bias: Float[Tensor, " d_model"]) -> Float[Tensor, "... d_model"]:
        """What the output projection's bias adds to the stream: no writer's."""
        if not self.model.shape.post_norm:
            return bias
        share = bias / self._scale(layer)
        return numerator(self.model.component(f"blocks.{layer}.ln1_post"), share)

    def mlp(self, layer: int) -> Tensor:
        return self._at(f"blocks.{layer}.hook_mlp_out")

    def written(self) -> Written:
        layers = range(self.model.shape.n_layers)
        return Written(self.input, tuple(map(self.heads, layers)), tuple(map(self.mlp, layers)))


@contextmanager
def keeping(model: Model, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the values at hook points during the forward passes inside the block."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        return lambda value: seen.__setitem__(name, value)

    with model.hooks([(name, keep(name)) for name in names]):
        yield seen


def written(model: Model, tokens: Tensor) -> tuple[Written, Float[Tensor, "batch vocab"]]:
    """What every writer writes in one plain forward pass, and its logits."""
    recorder = Recorder(model)
    with torch.no_grad(), model.hooks(recorder.hooks()):
        logits = model.logits(tokens)
    return recorder.written(), logits


@contextmanager
def ungrouped(model: Model) -> Iterator[None]:
    """Inside, the values at `k.hook_out` and `v.hook_out` hold one key and value per *query* head (unchanged without
    grouped-query attention). Enter it outside any `lrp` block. `edges.check` verifies that logits stay the same.
    """
    shape = model.shape
    size = shape.n_heads // shape.n_kv_heads
    if size == 1:
        yield
        return

    def repeat(value: Tensor) -> Tensor:
        return value.unflatten(-1, (shape.n_kv_heads, -1)).repeat_interleave(size, dim=-2).flatten(-2)

    layers = range(shape.n_layers)
    points: list[tuple[str, Hook]] = [(f"blocks.{n}.attn.{part}.hook_out", repeat) for n in layers for part in "kv"]
    with ExitStack() as stack:
        for n in layers:
            bridge = model.component(f"blocks.{n}.attn")
            for owner, name, value in _grouping(bridge, shape.n_kv_heads, size, shape.n_heads):
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
        stack.enter_context(model.hooks(points))
        yield


def _grouping(bridge: Any, n_kv: int, size: int, n_heads: int) -> Iterator[tuple[Any, str, Any]]:
    """(owner, attribute, value without groups): where an attention says how many heads a key serves, and its key norm."""
    if hasattr(bridge.original_component, "num_key_value_groups"):
        yield bridge.original_component, "num_key_value_groups", 1
    if getattr(bridge.config, "n_key_value_heads", None) == n_kv:
        yield bridge.config, "n_key_value_heads", n_heads
    norm: Any = getattr(getattr(bridge, "k_norm", None), "original_component", None)
    if isinstance(getattr(norm, "norms", None), nn.ModuleList):  # StableLM: one norm per head
        yield norm, "norms", nn.ModuleList(n for n in norm.norms for _ in range(size))
    for name in ("weight", "bias"):
        p = getattr(norm, name, None)
        if isinstance(p, nn.Parameter) and p.numel() % n_kv == 0 and p.numel() > bridge_width(bridge, n_kv):
            repeated = p.reshape(n_kv, -1).repeat_interleave(size, dim=0).reshape(-1, *p.shape[1:])
            yield norm, name, nn.Parameter(repeated, requires_grad=False)


def bridge_width(bridge: Any, n_kv: int) -> int:
    """d_head of an attention's keys."""
    return int(bridge.k.original_component.weight.numel() // bridge.k.original_component.in_features // n_kv)


def mean_written(runs: Iterable[tuple[Written, Int[Tensor, " pos"]]], n_labels: int) -> Written:
    """Mean per position label over prompts, accumulated in float64: fields Float[label, width]. runs: what a batch of
    prompts writes, and the label of each of its positions.
    """
    first, *rest = label_means((((w.input, *w.heads, *w.mlps), index) for w, index in runs), n_labels)
    half = len(rest) // 2
    return Written(first, tuple(rest[:half]), tuple(rest[half:]))
