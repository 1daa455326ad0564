"""Information-flow routes (Ferrando & Voita 2024), as a baseline: how much of a reader's input each writer makes up.

Per position, with y the reader's input and z_u what u wrote to it: proximity(u) = max(0, ‖y‖₁ − ‖z_u − y‖₁), divided by the
sum over all writers. An edge's score is the mean over positions (the last one only for the logits). Unsigned, one forward
pass over the original; no patch prompt, no metric. The paper's routes are `select(…, greedy=True, threshold=τ)`.
A head's q, k and v read the same stream and score alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relp_cli.edges.gradients import Products
from relp_cli.edges.reads import reads
from relp_cli.edges.space import EdgeBatch
from relp_cli.edges.stream import keeping
from relp_cli.methods.table import Params, Result
from relp_cli.precision import wide


def information_flow(on: EdgeBatch, _: Params) -> Result:
    """1 forward pass for all edges."""
    graph, batch = on.graph, on.setup.batch
    layers = range(graph.n_layers)
    read = [reads(on.model, n) for n in layers]
    streams_of_mlps = [at.stream if at.shared else at.mlp for at in read]
    names = dict.fromkeys([*(at.stream for at in read), *streams_of_mlps, "ln_final.hook_in"])
    with keeping(on.model, names) as streams:
        run = on.run.map(wide)
    out = run.input.new_zeros(len(on), batch.n_pos, *graph.mask.shape)
    products = Products(on.model, graph, run)
    for rows in products.parts:
        outputs = products.deltas(rows)
        for layer in layers:
            columns = graph.readers_of(layer)
            heads = _shares(outputs[: graph.written_before(layer, "attention")], streams[read[layer].stream][rows])
            out[rows, :, : heads.shape[-1], columns.start : columns.stop - 1] = heads[..., None]
            mlp = _shares(outputs[: graph.written_before(layer, "mlp")], streams[streams_of_mlps[layer]][rows])
            out[rows, :, : mlp.shape[-1], columns.stop - 1] = mlp
        out[rows, -1, :, -1] = _shares(outputs, streams["ln_final.hook_in"][rows])[:, -1]
    if on.positions:
        return on.result(out)
    mean = out.mean(1)
    mean[..., -1] = out[:, -1, :, -1]
    return on.result(mean)


def _shares(outputs: Tensor, stream: Tensor) -> Tensor:
    """Float[batch, pos, writer]: normalised proximities."""
    stream = wide(stream)
    whole = stream.abs().sum(-1)
    near = torch.stack([(whole - (z - stream).abs().sum(-1)).clamp(min=0) for z in outputs], -1)
    return near / near.sum(-1, keepdim=True).clamp_min(torch.finfo(near.dtype).tiny)
