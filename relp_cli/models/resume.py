"""Runs that differ from a known run start in the middle of it: at the first changed block and the first changed position.

1. `record` runs the prompts once and keeps what every block reads, and every block's keys and values.
2. `Trace.logits` calls the model as it stands on one prompt, from the first changed position on. Blocks that no row is in yet
   are passed over; where rows begin, the known run's stream comes in, a row per change.
3. So rows join at their own block, and each block is called once for all rows that go through it. Masks and position
   embeddings are those of the one prompt: the same for all, for prompts are never padded.
4. Once per model and prompt length in a process, changed runs are compared with whole ones (`way_of`); where they are not the
   same, less is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from relp_cli.models.checks import TOLERANCE
from relp_cli.models.model import Hook, Model
from relp_cli.models.recompute import standing_in


@dataclass(frozen=True)
class Way:
    """How much of a run is passed over.

    blocks, positions: those before the first change. together: rows of several blocks share a pass, and one prompt's masks;
    ALiBi in Bloom and Falcon, and GPT-BigCode, make theirs for a number of rows.
    """

    blocks: bool = True
    positions: bool = True
    together: bool = True
    last: bool = True


WHOLE = Way(blocks=False, positions=False, together=False, last=False)
WAYS = (
    Way(),
    Way(last=False),
    Way(together=False),
    Way(together=False, last=False),
    Way(positions=False, together=False, last=False),
    WHOLE,
)


@dataclass(frozen=True)
class Rows:
    """Rows of a pass that differ from the known run by `hooks`, (hook point, function of these rows' values, which begin with
    the pass's first position); example: which of the known prompts each row is.
    """

    hooks: Sequence[tuple[str, Hook]]
    example: Int[Tensor, " rows"]

    def layer(self, n_layers: int) -> int:
        """The first block that the hooks change; n_layers for what comes after the blocks."""
        return min(_layer(name, n_layers) for name, _ in self.hooks)


def _layer(point: str, n_layers: int) -> int:
    block = re.match(r"blocks\.(\d+)\.", point)
    if not block and not point.startswith(("ln_final.", "unembed.", "logits")):
        raise ValueError(f"{point} is neither in a block nor behind them")
    return int(block[1]) if block else n_layers


@dataclass(frozen=True, eq=False)
class Trace:
    """A known run. streams: what block l reads, and at the end what the last one writes, Float[batch, pos, d_model];
    keys, values: of block l, Float[batch, kv_head, pos, d_head]; widths: how many things block l returns (0: a tensor alone).
    """

    model: Model
    tokens: Int[Tensor, "batch pos"]
    way: Way
    streams: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    widths: list[int]

    def first(self, position: int) -> int:
        """Where a pass starts whose rows change at `position` and later."""
        return min(position, self.tokens.shape[1] - self.model.reads) if self.way.positions else 0

    @torch.no_grad()
    def logits(self, groups: Sequence[Rows], first: int = 0) -> tuple[Float[Tensor, "rows *read vocab"], float]:
        """Logits at the last position of every row, group after group, and what was computed for them, in whole runs.

        first: the position that the pass starts at, as `first` says.
        """
        if len(groups) > 1 and not self.way.together:
            parts = [self.logits([group], first) for group in groups]
            return torch.cat([logits for logits, _ in parts]), sum(share for _, share in parts)
        if not self.way.blocks:
            with self.model.hooks(list(groups[0].hooks)):
                return self.model.logits(self.tokens[groups[0].example]), float(len(groups[0].example))
        joining, hooks, where = self._placed(groups)
        prompts = self._prompts(groups)
        with self._joined(joining, first), self.model.hooks([*hooks, *self._of_last(hooks)]):
            past = self._past(joining, first) if first else None
            logits = self.model.logits(prompts[:, first:], past=past)
        n, n_pos = self.model.shape.n_layers, self.tokens.shape[1]
        computed = sum(len(rows) * (n - layer) for layer, rows in enumerate(joining)) / n * (1 - first / n_pos)
        return torch.cat([logits[rows] for rows in where]), computed

    @torch.no_grad()
    def through(self, groups: Sequence[Rows]) -> tuple[list[Float[Tensor, "rows pos d_model"]], float]:
        """What each row's own block writes, and what was computed for that, in whole runs: every block is called on the rows that
        begin there. Where a change is of values that no other position of the block reads, one row holds all positions' changes.
        """
        if len(groups) > 1 and not self.way.together:
            found = [self.through([group]) for group in groups]
            return [streams for (streams,), _ in found], sum(computed for _, computed in found)
        n, seen = self.model.shape.n_layers, dict[int, Tensor]()
        joining, hooks, where = self._placed(groups, growing=False)
        prompts, layers = self._prompts(groups), [group.layer(n) for group in groups]
        hooks += [(f"blocks.{layer}.hook_out", partial(seen.__setitem__, layer)) for layer in set(layers)]
        hooks.append(("ln_final.hook_in", lambda value: value[: len(prompts)]))  # nobody reads these logits
        with self._joined(joining, 0, growing=False), self.model.hooks(hooks):
            self.model.logits(prompts)
        return [seen[layer][rows] for layer, rows in zip(layers, where, strict=True)], sum(map(len, joining)) / n

    def beginning(self, layer: int, put: Hook, example: Tensor) -> Rows:
        """Rows that differ in what block `layer` reads, or what is read behind the last."""
        inside = layer < self.model.shape.n_layers
        return Rows([(f"blocks.{layer}.hook_in" if inside else "ln_final.hook_in", put)], example)

    def _of_last(self, hooks: Sequence[tuple[str, Hook]]) -> list[tuple[str, Hook]]:
        """The last block's MLP reads the last position alone, unless some hook is there; what it adds to others is not read."""
        block = f"blocks.{self.model.shape.n_layers - 1}."
        free = all(
            not name.startswith(block) or name.startswith((f"{block}hook_in", f"{block}attn.")) for name, _ in hooks
        )
        free &= self.way.last and self.model.reads == 1  # one position is added to all; several have no such shape
        return [(f"{block}mlp.hook_in", lambda value: value[:, -1:])] if free else []

    def _prompts(self, groups: Sequence[Rows]) -> Tensor:
        """What the model is called on: one prompt for all, or each row's own."""
        return self.tokens[:1] if self.way.together else self.tokens[groups[0].example]

    def _placed(
        self, groups: Sequence[Rows], growing: bool = True
    ) -> tuple[list[Tensor], list[tuple[str, Hook]], list[slice]]:
        """Per layer the examples of the rows that begin there, the hooks on rows of a pass, and which rows each group is.

        growing: rows stay in the pass; otherwise every block has its own alone.
        """
        n = self.model.shape.n_layers
        layers = [group.layer(n) for group in groups]
        joining: list[list[Tensor]] = [[] for _ in range(n + 1)]
        hooks: list[tuple[str, Hook]] = []
        where, begin = [slice(0)] * len(groups), 0
        for i in sorted(range(len(groups)), key=lambda i: layers[i]):
            if not growing and not joining[layers[i]]:
                begin = 0
            where[i] = slice(begin, begin := begin + len(groups[i].example))
            joining[layers[i]].append(groups[i].example)
            hooks += [(name, _of_rows(fn, where[i])) for name, fn in groups[i].hooks]
        return [torch.cat(rows) if rows else self.tokens.new_zeros(0) for rows in joining], hooks, where

    def _past(self, joining: Sequence[Tensor], first: int) -> Cache:
        """The known run's keys and values before `first`, of the rows that are in each block."""
        inside = [torch.cat(list(joining[: n + 1])) for n in range(len(joining) - 1)]
        of_layers = zip(self.keys, self.values, inside, strict=True)
        return Cache(layers=[_Earlier(k[:, :, :first], v[:, :, :first], rows) for k, v, rows in of_layers])

    @contextmanager
    def _joined(self, joining: Sequence[Tensor], first: int, growing: bool = True) -> Iterator[None]:
        """Blocks that no row is in are passed over, and rows come in before the block that they begin with."""
        inside, n = 0, len(joining) - 1
        with ExitStack() as stack:
            for layer in range(n):
                block = self.model.component(f"blocks.{layer}")
                inside = inside if growing else 0
                if len(joining[layer]):
                    join = _on_input(self._join(layer, inside, joining[layer], first))
                    stack.callback(block.register_forward_pre_hook(join, with_kwargs=True).remove)
                inside += len(joining[layer])
                if not inside:
                    stack.enter_context(_passed_over(block, self.widths[layer]))
                if layer == n - 1 and len(joining[n]):
                    join = _on_output(self._join(n, inside, joining[n], first))
                    stack.callback(block.register_forward_hook(join).remove)
            yield

    def _join(self, layer: int, inside: int, rows: Tensor, first: int) -> Callable[[Tensor], Tensor]:
        def join(stream: Tensor) -> Tensor:
            self.model.batch[0] = inside + len(rows)
            new = self.streams[layer][rows, first:]
            return torch.cat([stream, new.to(stream.device)]) if inside else new

        return join


class _Earlier(DynamicLayer):
    """Keys and values of earlier positions, for every row of a pass; what comes is not kept."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.rows = keys, values, rows

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        earlier: Any = (self.keys, self.values)
        keys, values = (
            torch.cat([x[self.rows.to(x.device)], new], -2)
            for x, new in zip(earlier, (key_states, value_states), strict=True)
        )
        return keys, values


def record(
    model: Model, tokens: Int[Tensor, "batch pos"], way: Way
) -> tuple[Trace, Float[Tensor, "batch *read vocab"]]:
    """One plain run, kept as far as `way` needs it, and its logits at the last position."""
    n, cache = model.shape.n_layers, DynamicCache() if way.positions else None
    streams: list[Tensor] = []
    widths: list[int] = []
    hooks: list[tuple[str, Hook]] = [(f"blocks.{layer}.hook_in", streams.append) for layer in range(n)]
    hooks.append((f"blocks.{n - 1}.hook_out", streams.append))

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        widths.append(len(output) if isinstance(output, tuple) else 0)

    with ExitStack() as stack, torch.no_grad(), model.hooks(hooks if way.blocks else []):
        for layer in range(n):
            stack.callback(model.component(f"blocks.{layer}").register_forward_hook(look).remove)
        logits = model.logits(tokens, past=cache)
    keys, values = ([getattr(at, what) for at in cache.layers] if cache else [] for what in ("keys", "values"))
    return Trace(model, tokens, way, streams, keys, values, widths), logits


_found: WeakKeyDictionary[Model, dict[int, Way]] = WeakKeyDictionary()


def way_of(model: Model, tokens: Int[Tensor, "batch pos"]) -> Way:
    """The first of `WAYS` by which changed runs are the same as whole ones; tried once per model and prompt length."""
    known = _found.setdefault(model, {})
    if tokens.shape[1] not in known:
        known[tokens.shape[1]] = next(way for way in WAYS if way == WHOLE or _stands(model, tokens[:2], way))
    return known[tokens.shape[1]]


@torch.no_grad()
def _stands(model: Model, tokens: Tensor, way: Way) -> bool:
    """Whether two prompts, their streams changed in the second half from early blocks on, end in the whole run's logits."""
    try:
        trace, logits = record(model, tokens, way)
        half, rows = tokens.shape[1] // 2, torch.arange(len(tokens), device=tokens.device)
        got, want, groups, first = [logits], [model.logits(tokens)], [], trace.first(half)
        for layer in {min(1, model.shape.n_layers - 1), model.shape.n_layers - 1}:
            noise = _noise(trace.streams[layer], half)
            at_one = noise.clone()
            at_one[:, half + 1 :] = 0
            before = max(0, layer - 1)
            read, written = f"blocks.{layer}.hook_in", f"blocks.{before}.hook_mlp_out"
            (streams,), _ = trace.through([Rows([(written, _adding(noise))], rows)])
            groups.append(Rows([(read, _adding(noise[:, first:]))], rows))
            groups.append(trace.beginning(before + 1, putting(streams, torch.tensor([half]), first), rows))
            for point, change in ((read, noise), (written, at_one)):
                with model.hooks({point: _adding(change)}):
                    want.append(model.logits(tokens))
        got.append(trace.logits(groups, first)[0])
        return _agree(torch.cat(got), torch.cat(want))
    except Exception:  # whatever a model's own code trips over when it is given rows that it does not expect
        return False


def _noise(stream: Tensor, half: int) -> Tensor:
    """As large as the stream, from position `half` on."""
    noise = (
        torch.randn(stream.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * stream.std().item()
    )
    noise[:, :half] = 0
    return noise.to(stream)


def _adding(change: Tensor) -> Hook:
    return lambda value: value + change


def putting(stream: Float[Tensor, "rows pos d_model"], positions: Int[Tensor, " at"], first: int) -> Hook:
    """The stream at these positions in place of a value's, which begins with position `first`."""

    def hook(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, positions - first] = stream[:, positions]
        return value

    return hook


def _agree(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() <= TOLERANCE[got.dtype] * want.abs().max())


def _passed_over(block: Any, width: int) -> AbstractContextManager[None]:
    """The block returns what it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream, *[None] * (width - 1)) if width else stream

    return standing_in(block, forward)


def _on_input(fn: Callable[[Tensor], Tensor]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (fn(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": fn(kwargs["hidden_states"])}

    return hook


def _on_output(fn: Callable[[Tensor], Tensor]) -> Any:
    return lambda _m, _a, out: (fn(out[0]), *out[1:]) if isinstance(out, tuple) else fn(out)


def _of_rows(fn: Hook, rows: slice) -> Hook:
    """The hook on some of the rows; others stay as they are."""

    def hook(value: Tensor) -> Tensor | None:
        new = fn(value[rows])
        if new is None or len(new) == len(value):
            return new
        return torch.cat([value[: rows.start], new, value[rows.stop :]])

    return hook
