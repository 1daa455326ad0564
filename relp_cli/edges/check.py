"""What edges assume of an architecture, verified on the model itself, once per model in a process.

1. A key and value of its own for every query head leaves the logits as they are.
2. Every reader's value follows from its stream: norm, projection and bias of queries, keys and values; a shared norm's output.
3. What the heads write, and the output's bias, sum to what attention adds to the stream.
4. The readers' pulled-back gradients sum to autograd's own at the norm's input.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakSet

import torch
from torch import Tensor

from relp_cli.edges.gradients import Readers, pull_back, reader_gradients
from relp_cli.edges.reads import project, projections, reads
from relp_cli.edges.stream import Recorder, heads_out, ungrouped
from relp_cli.errors import RelpError
from relp_cli.lrp.sites import linear_layer
from relp_cli.methods.setup import Setup
from relp_cli.models.checks import TOLERANCE
from relp_cli.models.model import Hook, Model
from relp_cli.precision import wide
from relp_cli.spaces.graph import QKV
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.pairs import PairBatch

_checked: WeakSet[Model] = WeakSet()


def check_once(model: Model, batch: PairBatch) -> None:
    """Run the checks on one prompt (their passes are not counted to a method).

    Raises: RelpError for an architecture of which an assumption does not hold.
    """
    if model in _checked:
        return
    one = batch.rows(slice(0, 1))
    one = replace(one, patch=None, answer=one.answer[:, :1], foil=one.foil[:, :1], read=1, pair=None)
    one = one.to(model.device)
    _values(model, one.original)
    (at,) = reader_gradients(Setup(model, one, METRICS["logit_diff"], (), baseline="zero"))
    _gradients(model, at)
    _checked.add(model)


def _values(model: Model, tokens: Tensor) -> None:
    recorder, seen, layers = Recorder(model), dict[str, Tensor](), range(model.shape.n_layers)

    def keep(name: str) -> tuple[str, Hook]:
        return name, lambda value: seen.__setitem__(name, value)

    names = [point for n in layers for point in (reads(model, n).stream, reads(model, n).mlp)]
    names += [f"blocks.{n}.{part}" for n in layers for part in (*(f"attn.{p}.hook_out" for p in QKV), "hook_attn_out")]
    with torch.no_grad():
        plain = model.logits(tokens)
        with ungrouped(model), model.hooks([*recorder.hooks(), *map(keep, dict.fromkeys(names))]):
            alone = model.logits(tokens)
        _equal(model, "the model with a key and value per query head", alone, plain)
        for n in layers:
            _layer(model, n, seen, recorder)


def _layer(model: Model, layer: int, seen: dict[str, Tensor], recorder: Recorder) -> None:
    read, heads, block = reads(model, layer), model.shape.n_heads, f"blocks.{layer}"
    stream = seen[read.stream]
    centred = read.norm.centre(stream).expand(heads, *stream.shape)
    for part, (weight, bias) in zip(QKV, projections(model, layer), strict=True):
        got = project(read.norm, centred, weight, bias).permute(1, 2, 0, 3).flatten(2)
        _equal(
            model, f"how layer {layer}'s {part} reads the residual stream", got, seen[f"{block}.attn.{part}.hook_out"]
        )
    if read.shared:
        _equal(model, f"how layer {layer}'s MLP reads the residual stream", read.norm(stream), seen[read.mlp])
    total = heads_out(model, layer, recorder.heads(layer)).sum(0)
    _, bias = linear_layer(model, f"{block}.attn.o")
    if bias is not None:
        total = total + recorder.constant(layer, bias)
    _equal(model, f"what layer {layer}'s heads write", total, seen[f"{block}.hook_attn_out"])


def _gradients(model: Model, at: Readers) -> None:
    for layer, want in enumerate(at.attention):
        out = wide(want).new_empty(3 * model.shape.n_heads + 1, 1, *want.shape[1:])
        pull_back(model, at, layer, slice(0, 1), out)
        through_norm = out if reads(model, layer).shared else out[:-1]
        error = ((through_norm.sum(0) - want[:1]).abs().max() / out.abs().max().clamp_min(1e-30)).item()
        _must_be_small(model, f"how gradients reach the residual stream before layer {layer}", error)


def _equal(model: Model, what: str, got: Tensor, want: Tensor) -> None:
    _must_be_small(model, what, ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item())


def _must_be_small(model: Model, what: str, error: float) -> None:
    if not error <= TOLERANCE[model.dtype]:
        raise RelpError(
            f"model {model.name} ({model.family.name}): edges do not know {what} "
            f"(relative error {error:.1e} > {TOLERANCE[model.dtype]:.0e})"
        )
