"""The gradient at every reader's input, and the edge scores Σ_pos (u(source) − u(run))·∂L/∂(input of v) made of it.

1. One forward pass gives each reader of a whole stream its own view of it (MLPs, logits), so what arrives there in the
   backward pass is ∂L/∂ of that reader's input alone; for heads, ∂L/∂ of each head's query, key and value. Values are not held
   for it.
2. A query's gradient g becomes the gradient at its reader's input by hand, one small matrix product per head:
   (1/σ)·[Wᵀg − x̂·(x̂·Wᵀg)/d], with W the projection with the norm folded in (`projections`), x̂ the normalised stream.
   Under the LN-rule the second term is absent; σ is then what the rule says it is.
3. Per layer, one product [writers × pos·d]·[pos·d × readers] per example gives the scores of all its edges.
An MLP that shares the attention's norm is pulled back through it likewise. `edges.check` compares the sums with autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.edges.reads import Norm, projections, reads
from relp_cli.edges.stream import Recorder, Written, ungrouped
from relp_cli.errors import RelpError
from relp_cli.lrp.context import Recorded, lrp
from relp_cli.lrp.rules import ActiveRule, NormForm, parse_rules
from relp_cli.methods.core import must_reach, refuse_metric
from relp_cli.methods.setup import Setup
from relp_cli.methods.share import Streams, share_of
from relp_cli.methods.space import Part, Point, added, of_part, of_point, together
from relp_cli.models.model import Hook, Model
from relp_cli.models.recompute import again
from relp_cli.nodes.access import EMBEDDED, as_leaf, capture
from relp_cli.precision import wide
from relp_cli.spaces.graph import QKV, Graph

FINAL = "ln_final.hook_in"
CHUNK = 1 << 22  # numbers of writer differences formed at a time (16 MiB in float32)


@dataclass(frozen=True)
class Readers:
    """Gradients of one run; per layer, width = heads·d_head (one key and value per query head).

    heads[part][layer]: Float[batch, pos, width], ∂L/∂ of q, k, v; attention, mlps: Float[batch, pos, d_model], ∂L/∂ of the
    stream at attention's norm and of the MLP's own input (`reads`); logits: of the final norm's input. x, scale: the
    attention norm's input and denominator. values: what writers write (None where it was not asked for).
    norm: the active rule on norms, other: the patch run's values for two-point rules.
    """

    heads: Mapping[str, list[Tensor]]
    attention: list[Tensor]
    mlps: list[Tensor]
    logits: Tensor
    x: list[Tensor]
    scale: list[Tensor]
    values: Written | None
    applied: dict[str, int]
    norm: ActiveRule | None = None
    other: Recorded | None = None

    def of(self, rows: slice, other: Recorded | None) -> Readers:
        """Those of one point's rows."""
        return replace(
            self._each(lambda g: g[rows]),
            x=[v[rows] for v in self.x],
            scale=[v[rows] for v in self.scale],
            values=self.values and self.values.map(lambda v: v[rows]),
            other=other,
        )

    def weighed(self, point: Point) -> Readers:
        """With the gradients as a point weighs them."""
        return self._each(point.weigh)

    def _each(self, fn: Callable[[Tensor], Tensor]) -> Readers:
        return replace(
            self,
            heads={part: [fn(g) for g in layers] for part, layers in self.heads.items()},
            attention=[fn(g) for g in self.attention],
            mlps=[fn(g) for g in self.mlps],
            logits=fn(self.logits),
        )


class _Taps:
    """The hooks of step 1: `fork` outside the rules, `keep` downstream of them. grads: of what they saw, once a backward pass
    arrives there. seen: the attention norms' inputs and scales.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.seen: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        self.leaf = torch.empty(0)
        layers = range(model.shape.n_layers)
        self.reads = [reads(model, n) for n in layers]
        self.inputs = [point for at in self.reads for point in (at.stream, at.mlp)] + [FINAL]
        self.heads = [f"blocks.{n}.attn.{part}.hook_out" for n in layers for part in QKV]
        self.scales = [f"{at.norm.name}.hook_scale" for at in self.reads if at.norm.component is not None]

    def fork(self) -> list[tuple[str, Hook]]:
        streams = {at.stream for at in self.reads}
        return [(name, self._fork(name, name in streams)) for name in self.inputs]

    def keep(self) -> list[tuple[str, Hook]]:
        scales = [(name, self._keep(name)) for name in self.scales]
        return [*((name, lambda value, name=name: self._await(name, value)) for name in self.heads), *scales]

    def begin(self, value: Tensor) -> Tensor:
        """The leaf that a backward pass goes back to."""
        if not again():
            self.leaf = as_leaf(value)
        return self.leaf

    def _fork(self, name: str, seen: bool) -> Hook:
        def hook(value: Tensor) -> Tensor:
            view = value.view_as(value)
            self._await(name, view)
            if seen:
                self.seen[name] = value.detach()
            return view

        return hook

    def _keep(self, name: str) -> Hook:
        return lambda value: self.seen.__setitem__(name, value.detach())

    def _await(self, name: str, value: Tensor) -> None:
        if value.requires_grad:
            value.register_hook(partial(self.grads.__setitem__, name))


def reader_gradients(setup: Setup, points: Sequence[Point] = (Point(),), values: bool = True) -> list[Readers]:
    """∂L/∂ of every reader at every point, of one group (`Batch.gradients`): 1 forward + 1 backward.

    values: whether what writers write is recorded.
    Raises: RelpError for metrics without gradient (core.refuse_metric) and for rules on linear layers.
    """
    first, k = points[0], len(points)
    refuse_metric(setup, at_run=not first.moved)
    model, active = setup.model, parse_rules(list(first.rules))
    moved, other = together(points)
    if linear := next((a for a in active if a.rule.site == "linear"), None):
        raise RelpError(
            f"edges take no rule on linear layers ('{linear}'): their queries' gradients are pulled back plainly"
        )
    taps, recorder = _Taps(model), Recorder(model)
    with torch.enable_grad(), ungrouped(model), model.hooks([*added(moved), *taps.fork()]):
        with (
            lrp(model, first.rules, other) as applied,
            capture(model, (), {EMBEDDED: taps.begin}),
            model.hooks([*taps.keep(), *(recorder.hooks() if values else ())]),
        ):
            logits = model.logits(setup.run.repeat(k, 1))
        metric = setup.value(logits)
        torch.autograd.grad(metric.sum(), taps.leaf, allow_unused=True)
    if not moved:
        setup.seen["run"] = of_point(metric.detach(), 0, k)
    setup.passes.forward += k
    setup.passes.backward += k
    held = any(a.rule.name == "ah" for a in active)  # then no gradient reaches queries and keys: exactly 0
    whole = _readers(taps, held, recorder.written() if values else None, applied, active)
    size = len(setup.batch)
    return [whole.of(slice(i * size, (i + 1) * size), point.other) for i, point in enumerate(points)]


def _readers(
    taps: _Taps,
    held: bool,
    written: Written | None,
    applied: dict[str, int],
    active: Sequence[ActiveRule],
) -> Readers:
    layers, grads = range(taps.model.shape.n_layers), taps.grads

    def of(point: str, layer: int) -> Tensor:
        if held and point not in grads and point.endswith(("attn.q.hook_out", "attn.k.hook_out")):
            return torch.zeros_like(of(f"blocks.{layer}.attn.v.hook_out", layer))
        return must_reach(grads.get(point), point, layer, [str(a) for a in active])

    def scale(layer: int) -> Tensor:
        name = f"{taps.reads[layer].norm.name}.hook_scale"
        return taps.seen[name] if name in taps.seen else torch.ones_like(grads[FINAL][..., :1])

    return Readers(
        heads={part: [of(f"blocks.{n}.attn.{part}.hook_out", n) for n in layers] for part in QKV},
        attention=[of(taps.reads[n].stream, n) for n in layers],
        mlps=[of(taps.reads[n].mlp, n) for n in layers],
        logits=must_reach(grads.get(FINAL), "ln_final", taps.model.shape.n_layers, []),
        x=[taps.seen[taps.reads[n].stream] for n in layers],
        scale=[scale(n) for n in layers],
        values=written,
        applied=applied,
        norm=next((a for a in active if a.rule.site == "norm"), None),
    )


def pull_back(
    model: Model, at: Readers, layer: int, rows: slice, out: Float[Tensor, "reader batch pos d_model"]
) -> None:
    """∂L/∂(input) of each of a layer's readers, its 3·heads heads and its MLP, into `out`."""
    heads, read, x = model.shape.n_heads, reads(model, layer), at.x[layer][rows]
    norm, inverse = read.norm, 1 / at.scale[layer][rows]
    form = _form(at, rows, norm, x, inverse)
    for i, (part, (projection, _)) in enumerate(zip(QKV, projections(model, layer, transposed=True), strict=True)):
        g = (wide(at.heads[part][layer][rows]) * form.scale).to(out.dtype).unflatten(-1, (heads, -1))
        torch.bmm(
            g.permute(2, 0, 1, 3).flatten(1, 2),
            projection.to(out.dtype),
            out=out[i * heads : (i + 1) * heads].flatten(1, 2),
        )
    mlp = wide(at.mlps[layer][rows])
    out[-1] = norm.centre(norm.weighted(mlp * form.scale)) if read.shared else mlp
    if form.direction is not None and form.coefficient is not None:  # of gradients that are scaled already
        normed = out if read.shared else out[:-1]
        along = torch.einsum("rbpd,bpd->rbp", normed, form.direction.to(out.dtype))
        normed.addcmul_(along[..., None], (form.coefficient / form.scale * form.direction).to(out.dtype))


def _form(at: Readers, rows: slice, norm: Norm, x: Tensor, inverse: Tensor) -> NormForm:
    """What pulls a gradient back through a layer's attention norm: its rule's form, or, where it has none, its Jacobian's."""
    if norm.component is None:
        return NormForm(torch.ones_like(inverse))
    centred = norm.centre(wide(x))
    if at.norm is None:  # 1/σ moves with the stream
        return NormForm(inverse, centred * inverse, -inverse / x.shape[-1])
    theirs = at.other[norm.name] if at.norm.rule.two_point and at.other else None
    return at.norm.rule.fn(
        centred, inverse, *((theirs["x"][rows], theirs["inverse"][rows]) if theirs else (None, None))
    )


class Products:
    """Σ_pos δu·∂L/∂(input of v) for one batch's δu and as many gradients as one has (the points of a path).

    The writers' differences are formed per part of the batch (at most `CHUNK` numbers); a batch of one part keeps them.
    """

    def __init__(self, model: Model, graph: Graph, delta: Written, positions: bool = False) -> None:
        self.model, self.graph, self.delta, self.positions = model, graph, delta, positions
        batch, pos, d = delta.input.shape
        size = max(1, CHUNK // (len(graph.writers) * pos * d))
        self.parts = [slice(i, min(i + size, batch)) for i in range(0, batch, size)]
        self._kept: Tensor | None = None

    def deltas(self, rows: slice) -> Float[Tensor, "writer batch pos d_model"]:
        """u(source) − u(run) of every writer."""
        if self._kept is not None:
            return self._kept
        graph, first = self.graph, self.delta.input[rows]
        values = first.new_empty(len(graph.writers), *first.shape)
        values[0] = first
        for layer in range(graph.n_layers):
            heads = graph.heads_of(layer)
            self.delta.heads_out(self.model, layer, rows, out=values[heads])
            values[heads.stop] = self.delta.mlps[layer][rows]
        if len(self.parts) == 1:
            self._kept = values
        return values

    def scores(
        self, at: Readers, writers: slice = slice(None), part: Part = "whole", streams: Streams | None = None
    ) -> Tensor:
        """Float[batch, writer, reader], or per position Float[batch, pos, writer, reader]; only rows `writers`, others 0.

        part: of a blend, by each writer's share of the change of what its reader reads (`streams`).
        """
        graph, (batch, pos) = self.graph, self.delta.input.shape[:2]
        first, stop, _ = writers.indices(len(graph.writers))
        out = self.delta.input.new_zeros(batch, *([pos] if self.positions else []), *graph.mask.shape)
        for rows in self.parts:
            deltas = self.deltas(rows)
            grads = deltas.new_empty(3 * graph.n_heads + 1, *deltas.shape[1:])
            for layer in range(graph.n_layers):
                last = min(graph.written_before(layer, "mlp"), stop)
                if last > first:
                    pull_back(self.model, at, layer, rows, grads)
                    heads, mlp = graph.readers_of(layer), graph.readers_of(layer).stop - 1
                    if streams is None:
                        _dot(out, deltas, grads, rows, slice(first, last), heads)
                        continue
                    of_heads, of_mlp = (_of_part(deltas, streams.at(p)[rows], part) for p in inputs(self.model, layer))
                    _dot(out, of_heads, grads[:-1], rows, slice(first, last), slice(heads.start, mlp))
                    _dot(out, of_mlp, grads[-1:], rows, slice(first, last), slice(mlp, mlp + 1))
            last_reader = slice(len(graph.readers) - 1, len(graph.readers))
            if streams is not None:
                deltas = _of_part(deltas, streams.at(FINAL)[rows], part)
            _dot(out, deltas, at.logits[rows][None].to(deltas.dtype), rows, slice(first, stop), last_reader)
        return out.mul_(graph.mask.to(out.device))


def inputs(model: Model, layer: int) -> tuple[str, str]:
    """Where the stream stands that a layer's heads read, and its MLP."""
    read = reads(model, layer)
    return read.stream, read.stream if read.shared else read.mlp


def _of_part(deltas: Tensor, change: Tensor, part: Part) -> Tensor:
    """Writers' differences Float[writer, batch, pos, d_model], as far as each is a share of what a reader's input changes by."""
    share = share_of(torch.einsum("wbpd,bpd->wbp", deltas, change.to(deltas.dtype)), change.square().sum(-1))
    return deltas * of_part(part, share)[..., None]


def _dot(out: Tensor, deltas: Tensor, grads: Tensor, rows: slice, writers: slice, readers: slice) -> None:
    for i, row in enumerate(range(rows.start, rows.stop)):
        d, g = deltas[writers, i], grads[:, i]
        if out.ndim == 4:
            out[row, :, writers, readers] = torch.bmm(d.transpose(0, 1), g.permute(1, 2, 0))
        else:
            out[row, writers, readers] = d.flatten(1) @ g.flatten(1).T
