"""The writers' differences of one masked run, in one tensor that readers' inputs are made of, with gradients.

Autograd would keep a copy of all differences for every reader. They are written once and never changed, so one tensor serves
all readers, and a second one of its size takes up their gradients:
_Write  puts a writer's differences in; backward: what the readers have left for them.
_Read   makes readers' changes, weights·differences; backward: gradients of the weights, and its share left for the writers.
Every read takes the tokens of the writes before it, so that backward passes reach a write when all its reads are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class Stack:
    """rows: Float[writer, pos, batch, d_model], the differences written so far; grads: the same of their gradients.

    It knows nothing of the graph, whose nodes hold it: a circle through them would never be freed.
    """

    def __init__(self, rows: Float[Tensor, "writer pos batch d_model"]) -> None:
        self.rows = rows
        self.grads = torch.empty(0)

    def write(self, rows: slice, change: Float[Tensor, "some pos batch d_model"]) -> Tensor:
        """The differences of some writers. Returns their token."""
        token: Tensor = _Write.apply(change, self, rows)
        return token

    def read(
        self, weights: Float[Tensor, "#pos upto reader"], tokens: Sequence[Tensor]
    ) -> Float[Tensor, "reader pos batch d_model"]:
        """Σ over the first `upto` writers, whose tokens these are, of weight · difference."""
        found: Tensor = _Read.apply(weights, self, *tokens)
        return found


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, change: Tensor, stack: Stack, rows: slice) -> Tensor:
        ctx.stack, ctx.rows = stack, rows
        stack.rows[rows] = change.detach()
        return change.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        return ctx.stack.grads[ctx.rows], None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, stack: Stack, *tokens: Tensor) -> Tensor:
        ctx.stack, ctx.tokens = stack, len(tokens)
        ctx.save_for_backward(weights)
        rows = stack.rows[: weights.shape[1]]
        if len(weights) == 1:
            return (weights[0].T @ rows.flatten(1)).unflatten(1, rows.shape[1:])
        each = torch.bmm(weights.transpose(1, 2), rows.flatten(2).transpose(0, 1))
        return each.transpose(0, 1).unflatten(2, rows.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (weights,) = ctx.saved_tensors
        stack, upto = ctx.stack, weights.shape[1]
        if not len(stack.grads):
            stack.grads = torch.zeros_like(stack.rows)
        rows, grads = stack.rows[:upto], stack.grads[:upto]
        if len(weights) == 1:
            of_weights = (rows.flatten(1) @ grad.flatten(1).T)[None]
            grads.flatten(1).addmm_(weights[0], grad.flatten(1))
        else:
            at = grad.flatten(2).transpose(0, 1)  # [pos, reader, batch·d]
            of_weights = torch.bmm(rows.flatten(2).transpose(0, 1), at.transpose(1, 2))
            grads += torch.bmm(weights, at).transpose(0, 1).unflatten(2, rows.shape[2:])
        return of_weights, None, *(grad.new_zeros(()) for _ in range(ctx.tokens))
