"""Exact patching, for every space and question: part of a run is replaced, all downstream is computed again, and L compared.

`effects` is the one place where that is done; a space says what its hooks put where. Nothing is computed that a patch cannot
change: passes start at its block and its position (`models.resume`), and nodes that are the same in source and run have effect 0
without one. Nodes are put by `patch_sets` (sets of nodes, of any kinds and layers, at once) and `patch_nodes` (each on its own).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relp_cli.methods.room import Room, fitting
from relp_cli.methods.setup import Setup
from relp_cli.methods.unfinished import Cost, Steps, UnfinishedBatch
from relp_cli.models.model import Hook
from relp_cli.models.resume import Rows, putting
from relp_cli.nodes.access import Activations, split, units
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind

At = tuple[str, int]  # node kind, layer


def effects(setup: Setup, hooks: Iterable[tuple[str, Hook]], example: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """L(run under the hooks) − L(run): row r of the one pass is the run's prompt example[r]. Rows count as forward passes."""
    return _effects(setup, [Rows(list(hooks), example.flatten())]).view(example.shape)


def _effects(setup: Setup, groups: Sequence[Rows], first: int = 0) -> Float[Tensor, " rows"]:
    """The same of several groups of rows, whose hooks see the positions from `first` on."""
    trace, _ = setup.traced
    rows = torch.cat([group.example for group in groups])
    logits, computed = trace.logits(groups, first)
    setup.passes.patched += len(rows)
    setup.passes.computed += computed
    found = setup.value(logits, rows) - setup.prompt_value("run")[rows]
    setup.passes.no_effect += int((found == 0).sum())
    return found


def every_pair(setup: Setup, n: int) -> Int[Tensor, "n pairs"]:
    """Numbers of the batch's pairs, n times: what `n` patches are tried on."""
    return torch.arange(len(setup.batch), device=setup.model.device).expand(n, -1)


def patch_sets(
    setup: Setup,
    source: Activations,
    masks: Mapping[At, Bool[Tensor, "sets pos units"]],
    example: Int[Tensor, "sets pairs"],
) -> Float[Tensor, "sets pairs"]:
    """L(run | n ← n(source) for all n of a set) − L(run), in one pass; masks: (node kind, layer) → which nodes a set has."""
    hooks = [
        (NODE_KINDS[kind].point(layer), _put_sets(setup, NODE_KINDS[kind], mask, source[kind][layer], example))
        for (kind, layer), mask in masks.items()
    ]
    return effects(setup, hooks, example)


def patch_nodes(
    setup: Setup,
    source: Activations,
    wanted: Mapping[At, Bool[Tensor, "pairs slots units"] | None],
    chunk_tokens: int | None = None,
    tick: Callable[[int, int, str], None] | None = None,
    unfinished: UnfinishedBatch | None = None,
) -> dict[At, Float[Tensor, "pairs slots units"]]:
    """L(run | n ← n(source)) − L(run) of every node on its own, for each pair; 0 where it is not wanted (None: all are).

    Positions that share a slot are patched jointly. Rows of a pass are nodes of one slot, each on one pair, of at most
    `chunk_tokens` tokens together (None: `Room`); they go from the first layer to the last. unfinished: what an interrupted call
    left of this one, and where this one leaves what it knows.
    """
    value, passes, n_slots = setup.prompt_value("run"), setup.passes, len(setup.labels)
    todo = {at: _moved(setup, source, at) for at in sorted(wanted, key=lambda at: at[1])}
    todo = {at: moved if (mask := wanted[at]) is None else moved & mask.to(moved.device) for at, moved in todo.items()}
    out = {at: value.new_zeros(len(value), n_slots, units(setup.model, NODE_KINDS[at[0]])) for at in wanted}
    rows = fitting(setup.batch.n_pos, chunk_tokens or Room.on(setup.model.device).patched)
    total = sum(int(mask.sum()) for mask in todo.values())
    n_parts = -(-sum(int(mask.any(1).sum()) for mask in todo.values()) // rows)
    known = {step: piece for piece in (unfinished.pieces(rows) if unfinished else []) for step in piece.cost}
    walk = _Walk(setup, source, out, known)
    computed, done = passes.computed, 0
    for number, part in enumerate(_parts(todo, rows)):
        if unfinished and unfinished.shard and not unfinished.shard.has(unfinished.number * n_parts + number):
            continue
        for patched, anew in walk.steps_of(part, number * n_slots):
            done += patched
            if tick and anew:
                tick(done, total, "patched runs")
            if unfinished and unfinished.store.due():
                unfinished.keep_piece(walk.done, rows, total)
    passes.computed = computed + sum(cost.computed for cost in walk.done.cost.values())
    if unfinished and unfinished.shard:
        unfinished.keep_piece(walk.done, rows, total)
    return out


class _Walk:
    """The steps of exact patching, each one pass: the nodes of one part at one slot. Steps that are `known` (number → what an
    earlier walk left of it) are copied, with what they took then. Effects go into `out`; `done` has all steps so far.
    """

    def __init__(self, setup: Setup, source: Activations, out: Mapping[At, Tensor], known: Mapping[int, Steps]) -> None:
        self.setup, self.source, self.out, self.known = setup, source, out, known
        self.done = Steps({f"{kind}.{layer}": effect for (kind, layer), effect in out.items()})

    def steps_of(self, part: Sequence[Cells], first: int) -> Iterator[tuple[int, bool]]:
        """The steps of one part, whose slot 0 is step `first`: how many patched runs each is, and whether it was taken anew."""
        passes = self.setup.passes
        slots = [i for i in range(len(self.setup.labels)) if any(cells.slots[:, i].any() for cells in part)]
        left = {slot for slot in slots if first + slot not in self.known}
        passes.computed = 0.0
        if left:
            part = _written(self.setup, self.source, part)
        if len(left) < len(slots):
            passes.computed = 0.0  # what the part's layers write was counted with its first slot
        for slot in slots:
            at_slot = [cells.of(cells.slots[:, slot]) for cells in part if cells.slots[:, slot].any()]
            n = sum(len(cells.pair) for cells in at_slot)
            (self._take if slot in left else self._copy)(first + slot, slot, at_slot, n)
            passes.computed = 0.0
            yield n, slot in left

    def _take(self, step: int, slot: int, part: Sequence[Cells], n: int) -> None:
        passes, started = self.setup.passes, time.perf_counter()
        before = passes.no_effect
        _patch_slot(self.setup, self.source, slot, part, self.out)
        self.done.cost[step] = Cost(n, passes.computed, passes.no_effect - before, time.perf_counter() - started)

    def _copy(self, step: int, slot: int, part: Sequence[Cells], n: int) -> None:
        passes, earlier = self.setup.passes, self.known[step]
        for cells in part:
            out, at = self.out[cells.at], (cells.pair, slot, cells.unit)
            out[at] = earlier.effects[f"{cells.at[0]}.{cells.at[1]}"].to(out.device)[at]
        cost = self.done.cost[step] = earlier.cost[step]
        passes.patched += n
        passes.no_effect += cost.no_effect
        passes.seconds += cost.seconds


def _patch_slot(setup: Setup, source: Activations, slot: int, cells: Sequence[Cells], out: Mapping[At, Tensor]) -> None:
    """One pass: the nodes of `cells`, put where the positions of a slot are; their effects go into `out`."""
    positions = (setup.slots == slot).nonzero()[:, 0]
    first = setup.traced[0].first(int(positions[0]))
    found = _effects(setup, [_rows(setup, source, c, positions, first) for c in cells], first)
    for c, effect in zip(cells, found.split([len(c.pair) for c in cells]), strict=True):
        out[c.at][c.pair, slot, c.unit] = effect


@dataclass(frozen=True)
class Cells:
    """Nodes of one kind and layer, each on one pair, at the `slots` where they are wanted. written: what their layer writes where
    they are put, Float[rows, pos, d_model].
    """

    at: At
    pair: Int[Tensor, " rows"]
    unit: Int[Tensor, " rows"]
    slots: Bool[Tensor, "rows slots"]
    written: Tensor | None = None

    def of(self, rows: slice | Tensor) -> Cells:
        """Some of them."""
        written = None if self.written is None else self.written[rows]
        return Cells(self.at, self.pair[rows], self.unit[rows], self.slots[rows], written)


def _moved(setup: Setup, source: Activations, at: At) -> Bool[Tensor, "pairs slots units"]:
    """Where a patch can change the metric: the node differs between source and run, at a position that something reads.

    Before the first token that differs nothing does, though two passes may round differently there.
    """
    kind, layer = NODE_KINDS[at[0]], at[1]
    differs = source[kind.name][layer] != setup.traced[1][kind.name][layer]
    differs = differs.unflatten(-1, (units(setup.model, kind), -1)).any(-1)
    if setup.baseline == "patch":
        differs &= (setup.run != setup.source).cumsum(1).gt(0)[..., None]
    if layer == setup.model.shape.n_layers - 1 and not kind.attended:
        differs[:, : -setup.batch.read] = False  # no other position's logits are read
    return torch.stack([differs[:, setup.slots == slot].any(1) for slot in range(len(setup.labels))], 1)


def _parts(todo: Mapping[At, Tensor], size: int) -> Iterator[list[Cells]]:
    """All cells in order, at most `size` rows of them at a time."""
    part: list[Cells] = []
    room = size
    for at, mask in todo.items():
        pair, unit = mask.any(1).nonzero().unbind(1)
        cells = Cells(at, pair, unit, mask[pair, :, unit])
        begin = 0
        while begin < len(pair):
            part.append(cells.of(slice(begin, begin + room)))
            begin, room = begin + room, room - len(part[-1].pair)
            if not room:
                yield part
                part, room = [], size
    if part:
        yield part


def _written(setup: Setup, source: Activations, part: Sequence[Cells]) -> list[Cells]:
    """The cells, and of nodes that their layer reads at their own position alone, what it writes: one row has all positions,
    which saves work where more than two are wanted.
    """
    trace, every, out = setup.traced[0], torch.arange(setup.batch.n_pos, device=setup.model.device), list(part)
    within = [
        i
        for i, cells in enumerate(part)
        if trace.way.blocks
        and not NODE_KINDS[cells.at[0]].attended
        and cells.at[1] < setup.model.shape.n_layers - 1
        and cells.slots.sum() > 2 * len(cells.slots)
    ]
    if within:
        streams, computed = trace.through([_rows(setup, source, part[i], every, 0) for i in within])
        setup.passes.computed += computed
        for i, stream in zip(within, streams, strict=True):
            out[i] = replace(part[i], written=stream)
    return out


def _rows(setup: Setup, source: Activations, cells: Cells, positions: Tensor, first: int) -> Rows:
    """Rows in which the nodes of `cells` are put at these positions, or what their layer then writes there."""
    kind, layer = NODE_KINDS[cells.at[0]], cells.at[1]
    pair, unit = cells.pair, cells.unit
    if cells.written is not None:
        return setup.traced[0].beginning(layer + 1, putting(cells.written, positions, first), pair)
    new = split(setup.model, kind, source[kind.name][layer])[pair[:, None], positions, unit[:, None]]

    def hook(value: Tensor) -> Tensor:
        nodes = split(setup.model, kind, value).clone()
        nodes[torch.arange(len(pair), device=pair.device)[:, None], positions - first, unit[:, None]] = new
        return nodes.flatten(-2)

    return Rows([(kind.point(layer), hook)], pair)


def _put_sets(setup: Setup, kind: NodeKind, mask: Tensor, source: Tensor, example: Tensor) -> Hook:
    def hook(value: Tensor) -> Tensor:
        current = split(setup.model, kind, value).unflatten(0, example.shape)
        new = split(setup.model, kind, source[example])
        return torch.where(mask[:, None, :, :, None], new, current).reshape(value.shape)

    return hook
