"""A GPT-2's forward pass with edges put in from another run, in a form that gradients go through quickly.

Writers and readers are those of `spaces.graph`. What a reader reads is the stream plus Σ over edges of
share·(the writer in a source run − the writer in this run), each example with shares of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GPT2LMHeadModel

from relp_cli.spaces.graph import Graph


@dataclass(frozen=True)
class Run:
    """logits: Float[batch, vocab] at the last position. writers: Float[writer, batch, pos, d], in the graph's order."""

    logits: Float[Tensor, "batch vocab"]
    writers: Float[Tensor, "writer batch pos d"]


def interchanged(
    model: GPT2LMHeadModel,
    tokens: Int[Tensor, "batch pos"],
    exchanges: Sequence[tuple[Tensor, Tensor]] = (),
) -> Run:
    """exchanges: (`writers` of a source run, Float[batch, writer, reader]: 1 where an edge comes from it, 0 elsewhere)."""
    body, config = model.transformer, model.config
    heads, graph = config.n_head, Graph(config.n_layer, config.n_head)
    d_head = config.n_embd // heads
    writers = [body.wte(tokens)]
    constant = body.wpe(torch.arange(tokens.shape[1]))  # positions and biases of attention: of no writer

    def read(readers: slice) -> Float[Tensor, "reader batch pos d"]:
        n, now = len(writers), torch.stack(writers)
        stream = (now.sum(0) + constant)[None]
        for source, share in exchanges:
            stream = stream + torch.einsum("bwr,wbpd->rbpd", share[:, :n, readers], source[:n] - now)
        return stream

    causal = torch.full((tokens.shape[1],) * 2, -math.inf).triu(1)
    blocks: Any = body.h
    for layer, block in enumerate(blocks):
        own = graph.readers_of(layer)
        inputs = read(slice(own.start, own.stop - 1))
        inputs = block.ln_1(inputs.expand(3 * heads, *inputs.shape[1:])).unflatten(0, (3, heads))
        weight = block.attn.c_attn.weight.unflatten(1, (3, heads, d_head))
        bias = block.attn.c_attn.bias.unflatten(0, (3, heads, d_head))[:, :, None, None]
        q, k, v = torch.einsum("shbpd,dshe->shbpe", inputs, weight) + bias
        pattern = (q @ k.transpose(-1, -2) / math.sqrt(d_head) + causal).softmax(-1)
        out = torch.einsum("hbpe,hed->hbpd", pattern @ v, block.attn.c_proj.weight.unflatten(0, (heads, d_head)))
        writers += out.unbind(0)
        constant = constant + block.attn.c_proj.bias
        writers.append(block.mlp(block.ln_2(read(slice(own.stop - 1, own.stop))[0])))
    stream = read(slice(-1, None))[0]
    return Run(F.linear(body.ln_f(stream[:, -1]), model.lm_head.weight), torch.stack(writers))
