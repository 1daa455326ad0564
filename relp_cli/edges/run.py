"""Running an edge circuit: every reader's input is the run's own stream plus, over its excluded edges, what the writer
would have written minus what it writes in this very run: x_v = x + Σ_{u excluded} (u(ablated) − u(running)).

1. As the forward pass goes, each layer's writers are recorded and their differences formed, Float[writer, batch, pos, d].
2. At a layer's attention norm, one product [readers × writers]·[writers × batch·pos·d] gives every head reader's input;
   queries, keys and values of heads with excluded edges are computed anew from these, norm included.
3. At the MLP's norm and the final norm, the same sum is added to the norm's input.
An edge may be excluded in part: by a share of the difference. Shares that need a gradient have one (`stack`); the inputs of
attention's readers, the largest of what is made, are then made again in the backward pass rather than kept.
Under LayerNorm, which ignores a stream's mean, differences are centred; nothing is subtracted that nearly cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from relp_cli.edges.reads import Norm, project, projections, reads
from relp_cli.edges.stack import Stack
from relp_cli.edges.stream import Recorder, Written, heads_out, ungrouped
from relp_cli.models.model import Hook, Model
from relp_cli.spaces.graph import QKV, Graph

Excluded = Bool[Tensor, "#pos writer reader"] | Float[Tensor, "#pos writer reader"]


@contextmanager
def edges_ablated(model: Model, graph: Graph, excluded: Excluded, ablated: Written) -> Iterator[None]:
    """Forward passes inside run with these edges carrying `ablated` instead of what their writer writes.

    excluded: Bool or Float[#pos, writer, reader], True or 1 for the edges that are cut, per position, or with one position for
    all of them; one that requires a gradient gets it.
    """
    hooks = _Hooks(model, graph, excluded * graph.mask.to(excluded.device), ablated)
    with (
        torch.set_grad_enabled(excluded.requires_grad),
        ungrouped(model),
        model.hooks([*hooks.recorder.hooks(), *hooks.hooks()]),
    ):
        yield


def edge_logits(
    model: Model, graph: Graph, tokens: Tensor, excluded: Excluded, ablated: Written
) -> Float[Tensor, "batch *read vocab"]:
    """The logits at the last position of one such pass."""
    with edges_ablated(model, graph, excluded, ablated):
        return model.logits(tokens)


class _Hooks:
    def __init__(self, model: Model, graph: Graph, excluded: Tensor, ablated: Written) -> None:
        self.model, self.graph, self.excluded, self.ablated = model, graph, excluded, ablated
        self.cut = (excluded != 0).any(0).any(0).tolist()  # per reader
        self.recorder = Recorder(model, excluded.requires_grad)
        self.stack: Stack | None = None  # in place of `rows` and `out`, where there are gradients
        self.tokens: list[tuple[int, Tensor]] = []  # of what is written to it, and how many have written by then
        self.reads = [reads(model, n) for n in range(graph.n_layers)]
        self.centre = self.reads[0].norm.centre  # one sort of norm in a model
        self.rows = torch.empty(0)  # row 0: a reader's stream, then the writers' differences
        self.out = torch.empty(0)
        self.kept = torch.empty(0)  # the stream at a norm that attention and MLP share
        self.formed = 0
        self.new: dict[str, Tensor] = {}

    def hooks(self) -> list[tuple[str, Hook]]:
        hooks: list[tuple[str, Hook]] = [("blocks.0.hook_in", self._begin)]
        for layer in range(self.graph.n_layers):
            block, readers = f"blocks.{layer}", self.graph.readers_of(layer)
            read = self.reads[layer]
            mlp, shared = self.cut[readers.stop - 1], read.shared
            if any(self.cut[readers.start : readers.stop - 1]):
                hooks.append((read.stream, self._heads(layer)))
                hooks += [(f"{block}.attn.{part}.hook_out", self._new(part)) for part in QKV]
            if mlp and shared:
                hooks.append((read.stream, self._keep))
            if mlp:
                own = self._stream(readers.stop - 1, layer, "mlp")
                hooks.append((read.mlp, (lambda _, own=own, norm=read.norm: norm(own(self.kept))) if shared else own))  # type: ignore[misc]
        if self.cut[-1]:
            final = self._stream(len(self.graph.readers) - 1, self.graph.n_layers, "logits")
            hooks.append(("ln_final.hook_in", final))
        return hooks

    def _begin(self, value: Tensor) -> None:
        batch, pos, d = value.shape  # positions first, so that each has its own mask as one product
        self.formed, self.tokens = 0, []
        if self.excluded.requires_grad:
            self.stack = Stack(value.new_empty(len(self.graph.writers), pos, batch, d))
            return
        self.rows = value.new_empty(1 + len(self.graph.writers), pos, batch, d)
        self.out = value.new_empty(self.graph.n_heads, pos, batch, d)

    def _form(self, upto: int) -> None:
        """Form the differences of the first `upto` writers, which have all written by now."""
        while self.formed < upto:
            layer, within = divmod(self.formed - 1, self.graph.n_heads + 1)
            rows = slice(self.formed, self.formed + 1)
            if self.formed == 0:
                change = self.centre(self.ablated.input - self.recorder.input).transpose(0, 1)[None]
            elif within == 0:
                rows = self.graph.heads_of(layer)
                of_heads = (self.ablated.heads[layer] - self.recorder.heads(layer)).transpose(0, 1)
                change = heads_out(self.model, layer, of_heads, None if self.stack else self.rows[1:][rows])
                if self.reads[0].norm.centres:
                    change = change.sub_(change.mean(-1, keepdim=True))
            else:
                change = self.centre(self.ablated.mlps[layer] - self.recorder.mlp(layer)).transpose(0, 1)[None]
            if self.stack:
                self.tokens.append((rows.stop, self.stack.write(rows, change)))
            elif within or not self.formed:  # heads are there already
                self.rows[1:][rows] = change
            self.formed = rows.stop

    def _changes(self, readers: slice, upto: int, x: Tensor) -> Float[Tensor, "reader pos batch d_model"]:
        """x plus the changes at some readers' inputs, valid until the next call."""
        self._form(upto)
        cut = self.excluded[:, :upto, readers].to(x.dtype)
        if self.stack:
            return x + self.stack.read(cut, self._written(upto))
        self.rows[0] = x
        rows, out = self.rows[: 1 + upto], self.out[: readers.stop - readers.start]
        weights = torch.cat([torch.ones_like(cut[:, :1]), cut], 1)
        if len(weights) == 1:
            torch.mm(weights[0].T, rows.flatten(1), out=out.flatten(1))
            return out
        each = torch.bmm(weights.transpose(1, 2), rows.flatten(2).transpose(0, 1))
        return out.copy_(each.unflatten(-1, x.shape[1:]).transpose(0, 1))

    def _written(self, upto: int) -> list[Tensor]:
        """The tokens of the first `upto` writers."""
        return [token for stop, token in self.tokens if stop <= upto]

    def _heads(self, layer: int) -> Hook:
        readers, heads = self.graph.readers_of(layer), self.graph.n_heads
        norm, upto = self.reads[layer].norm, self.graph.written_before(layer, "attention")

        def hook(value: Tensor) -> None:
            self.new = {}
            for i, (part, (projection, bias)) in enumerate(zip(QKV, projections(self.model, layer), strict=True)):
                columns = slice(readers.start + i * heads, readers.start + (i + 1) * heads)
                if not any(self.cut[columns]):
                    continue
                x = norm.centre(value).transpose(0, 1)
                if self.stack:
                    self._form(upto)
                    cut = self.excluded[:, :upto, columns].to(x.dtype)
                    parts = (norm, x, self.stack, cut, self._written(upto), projection, bias)
                    out = checkpoint(_projected, *parts, use_reentrant=False, preserve_rng_state=False)
                else:
                    out = project(norm, self._changes(columns, upto, x), projection, bias)
                self.new[part] = out.permute(2, 1, 0, 3).flatten(2)

        return hook

    def _keep(self, value: Tensor) -> None:
        self.kept = value

    def _new(self, part: str) -> Hook:
        return lambda _: self.new.get(part)

    def _stream(self, reader: int, layer: int, what: str) -> Hook:
        upto = self.graph.written_before(layer, what)
        only = slice(reader, reader + 1)

        def hook(value: Tensor) -> Tensor:
            changed = self._changes(only, upto, value.transpose(0, 1))[0].transpose(0, 1)
            return changed.clone(memory_format=torch.contiguous_format)

        return hook


def _projected(
    norm: Norm, x: Tensor, stack: Stack, cut: Tensor, tokens: list[Tensor], projection: Tensor, bias: Tensor | None
) -> Tensor:
    """Queries, keys or values from what their readers read. It holds nothing that leads to what it makes (see `Stack`)."""
    return project(norm, x + stack.read(cut, tokens), projection, bias)
