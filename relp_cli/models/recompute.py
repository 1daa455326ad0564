"""Layers that are computed again in the backward pass, so that a graph keeps what each block was given and not what was computed
of it (activation checkpointing; Chen et al. 2016, "Training deep nets with sublinear memory cost").

1. While `recomputing(model)` is open, what autograd would save inside a block is left out of the graph.
2. When a backward pass asks for the first of it, the block is called again with what it was given, under the hooks that stood
   then, whichever stand now. What autograd saves this time is the same, to the bit, in the same order.
3. It is handed out, and let go with the graph's nodes. Nothing leads a gradient through the second call.
Hooks therefore see a block's values twice; those that collect ask `again` whether it is the second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from relp_cli.models.model import Model
from relp_cli.models.offload import held, restored

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_again = [False]


def again() -> bool:
    """Whether the running hook sees its value a second time, in a backward pass."""
    return _again[0]


@contextmanager
def recomputing(model: Model, wanted: bool = True) -> Iterator[None]:
    """Forward passes inside, and their backward passes, keep each block's input and one block's activations, if `wanted`.

    One graph can stand at a time: the next forward pass with gradients, or the end of the context, ends that of the last.
    Raises: RuntimeError, in a backward pass, for a graph that has ended, and for a block that the second time was not computed as
    the first time.
    """
    calls: dict[int, _Call] = {}
    with ExitStack() as stack:
        stack.callback(_end, calls)
        for layer in range(model.shape.n_layers if wanted else 0):
            block = model.component(f"blocks.{layer}")
            stack.enter_context(standing_in(block, _forgetful(model, block, calls, layer)))
        yield


@contextmanager
def standing_in(block: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """A block's `forward` is another one inside."""
    before = vars(block).get("forward")
    vars(block)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(block)["forward"]
        else:
            vars(block)["forward"] = before


def _forgetful(model: Model, block: Any, calls: dict[int, _Call], layer: int) -> Callable[..., Any]:
    plain, modules = block.forward, list(block.modules())

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        if layer == 0:
            _end(calls)
        calls[layer] = call = _Call(model, layer, modules, lambda: plain(*args, **kwargs), (*args, *kwargs.values()))
        with saved_tensors_hooks(call.leave_out, call.handed_out):
            return plain(*args, **kwargs)

    return forward


def _end(calls: dict[int, _Call]) -> None:
    """Hooks hold values, whose graph holds the calls and so the hooks: nothing would ever free them."""
    for call in calls.values():
        call.end()
    calls.clear()


class _Saved:
    """What stands in a graph for a tensor: nothing, or, from the second call until it is asked for, the tensor as `held`."""

    __slots__ = ("__weakref__", "call", "shape", "there", "value")

    def __init__(self, call: _Call, shape: torch.Size) -> None:
        self.call, self.shape, self.there, self.value = call, shape, False, None


class _Call:
    """One call of a block, which can be made again."""

    def __init__(
        self, model: Model, layer: int, modules: Sequence[nn.Module], make: Callable[[], Any], given: Sequence[Any]
    ) -> None:
        self.model, self.layer, self.modules, self.batch = model, layer, modules, model.batch[0]
        self.make: Callable[[], Any] | None = make
        self.given = [(value, value._version) for value in given if isinstance(value, Tensor)]
        self.hooks = [{name: vars(module)[name].copy() for name in HOOKS} for module in modules]
        self.saved: list[ref[_Saved]] = []

    def end(self) -> None:
        self.make, self.given, self.hooks = None, [], []

    def leave_out(self, value: Tensor) -> _Saved:
        """What a graph keeps of a tensor in the first call."""
        saved = _Saved(self, value.shape)
        self.saved.append(ref(saved))
        return saved

    def handed_out(self, saved: _Saved) -> Tensor:
        """The tensor. A second backward pass through the same graph makes the call once more."""
        if not saved.there:
            self._make_again()
        value, saved.value, saved.there = saved.value, None, False
        return restored(value)

    def _make_again(self) -> None:
        if self.make is None:
            raise RuntimeError(f"the graph of layer {self.layer} has ended: one stands at a time (recomputing)")
        if any(value._version != version for value, version in self.given):
            raise RuntimeError(f"layer {self.layer} cannot be computed again: what it was given was written over")
        count = 0

        def fill(value: Tensor) -> None:
            nonlocal count
            saved = self.saved[count]() if count < len(self.saved) else None
            count += 1
            if saved is not None:  # otherwise its node is gone
                if saved.shape != value.shape:
                    raise self._other(f"{tuple(value.shape)} in place of {tuple(saved.shape)}")
                saved.value, saved.there = held(value), True

        with self._as_it_was(), torch.enable_grad(), saved_tensors_hooks(fill, _of_no_graph):
            self.make()
        if count != len(self.saved):
            raise self._other(f"{count} tensors were saved, not {len(self.saved)}")

    def _other(self, how: str) -> RuntimeError:
        return RuntimeError(f"layer {self.layer} was not computed the second time as the first time: {how}")

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """The hooks and the batch of the first call, whose own hooks come back as they were: handles know their dictionaries."""
        now = [{name: vars(module)[name] for name in HOOKS} for module in self.modules], self.model.batch[0]
        try:
            self._put(self.hooks, self.batch)
            _again[0] = True
            yield
        finally:
            _again[0] = False
            self._put(*now)

    def _put(self, hooks: Sequence[dict[str, Any]], batch: int) -> None:
        for module, of_module in zip(self.modules, hooks, strict=True):
            vars(module).update(of_module)
        self.model.batch[0] = batch


def _of_no_graph(_: None) -> Tensor:
    raise RuntimeError("a gradient was led through the second call of a layer")
