"""Exact patching, for every space and question: part of a run is replaced, all downstream is computed again, and L compared.

`effects` is the one place where that is done; a space says what its hooks put where. Nothing is computed that a patch cannot
change: passes start at its block and its position (`models.resume`), and nodes that are the same in source and run have effect 0
without one. Nodes are put by `patch_sets` (sets of nodes, of any kinds and layers, at once) and `patch_nodes` (each on its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relp_cli.methods.setup import CHUNK_TOKENS, Setup, fitting
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
    chunk_tokens: int = CHUNK_TOKENS,
    tick: Callable[[int, int, str], None] | None = None,
) -> dict[At, Float[Tensor, "pairs slots units"]]:
    """L(run | n ← n(source)) − L(run) of every node on its own, for each pair; 0 where it is not wanted (None: all are).

    Positions that share a slot are patched jointly. Rows of a pass are nodes of one slot, each on one pair, of at most
    `chunk_tokens` tokens together.
    """
    trace, value = setup.traced[0], setup.prompt_value("run")
    todo = {at: _moved(setup, source, at) for at in sorted(wanted, key=lambda at: at[1])}
    todo = {at: moved if (mask := wanted[at]) is None else moved & mask.to(moved.device) for at, moved in todo.items()}
    out = {at: value.new_zeros(len(value), len(setup.labels), units(setup.model, NODE_KINDS[at[0]])) for at in wanted}
    done, total = 0, sum(int(mask.sum()) for mask in todo.values())
    for part in _parts([(at, mask.any(1).nonzero()) for at, mask in todo.items()], setup.batch.n_pos, chunk_tokens):
        written = _written(setup, source, part)
        for slot in range(len(setup.labels)):
            positions = (setup.slots == slot).nonzero()[:, 0]
            first, groups, cells = trace.first(int(positions[0])), [], []
            for at, of in part:
                here = todo[at][of[:, 0], slot, of[:, 1]]
                if not here.any():
                    continue
                cells.append((at, of[here]))
                if at in written:
                    put = putting(written[at][here], positions, first)
                    groups.append(trace.beginning(at[1] + 1, put, of[here, 0]))
                else:
                    groups.append(_rows(setup, source, at, of[here], positions, first))
            if not groups:
                continue
            found = _effects(setup, groups, first).split([len(of) for _, of in cells])
            for (at, of), effect in zip(cells, found, strict=True):
                out[at][of[:, 0], slot, of[:, 1]] = effect
                done += len(of)
            if tick:
                tick(done, total, "patched runs")
    return out


def _moved(setup: Setup, source: Activations, at: At) -> Bool[Tensor, "pairs slots units"]:
    """Where a patch can change the metric: the node differs between source and run, at a position that something reads."""
    kind, layer = NODE_KINDS[at[0]], at[1]
    differs = source[kind.name][layer] != setup.traced[1][kind.name][layer]
    differs = differs.unflatten(-1, (units(setup.model, kind), -1)).any(-1)
    if layer == setup.model.shape.n_layers - 1 and not kind.attended:
        differs[:, :-1] = False  # only the last position's logits are read
    return torch.stack([differs[:, setup.slots == slot].any(1) for slot in range(len(setup.labels))], 1)


def _written(setup: Setup, source: Activations, part: Sequence[tuple[At, Tensor]]) -> dict[At, Tensor]:
    """What a layer writes where a node is put whose own position alone reads it there: for these, all positions in one row."""
    trace, every = setup.traced[0], torch.arange(setup.batch.n_pos, device=setup.model.device)
    within = [(at, of) for at, of in part if not NODE_KINDS[at[0]].attended and at[1] < setup.model.shape.n_layers - 1]
    if not within or not trace.way.blocks:
        return {}
    streams, computed = trace.through([_rows(setup, source, at, of, every, 0) for at, of in within])
    setup.passes.computed += computed
    return {at: stream for (at, _), stream in zip(within, streams, strict=True)}


def _parts(cells: Sequence[tuple[At, Tensor]], n_pos: int, chunk_tokens: int) -> Iterator[list[tuple[At, Tensor]]]:
    """All (pair, unit) rows of `n_pos` positions in order, as many at a time as `chunk_tokens` allows."""
    part: list[tuple[At, Tensor]] = []
    room = size = fitting(n_pos, chunk_tokens)
    for at, rest in cells:
        while len(rest):
            part.append((at, rest[:room]))
            rest, room = rest[room:], room - len(rest[:room])
            if not room:
                yield part
                part, room = [], size
    if part:
        yield part


def _rows(setup: Setup, source: Activations, at: At, cells: Tensor, positions: Tensor, first: int) -> Rows:
    """Rows in which the nodes of `cells` Int[cell, (pair, unit)] are put, at these positions."""
    kind, layer = NODE_KINDS[at[0]], at[1]
    pair, unit = cells.unbind(1)
    where = (pair[:, None], positions[None], unit[:, None])
    new = split(setup.model, kind, source[kind.name][layer])[where]

    def hook(value: Tensor) -> Tensor:
        nodes = split(setup.model, kind, value).clone()
        nodes[torch.arange(len(pair), device=pair.device)[:, None], positions[None] - first, unit[:, None]] = new
        return nodes.flatten(-2)

    return Rows([(kind.point(layer), hook)], pair)


def _put_sets(setup: Setup, kind: NodeKind, mask: Tensor, source: Tensor, example: Tensor) -> Hook:
    def hook(value: Tensor) -> Tensor:
        current = split(setup.model, kind, value).unflatten(0, example.shape)
        new = split(setup.model, kind, source[example])
        return torch.where(mask[:, None, :, :, None], new, current).reshape(value.shape)

    return hook
