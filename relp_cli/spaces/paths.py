"""Random paths from the input to the logits, over the units of a space (Shi et al. 2024 inflate circuits with them)."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from relp_cli.spaces.graph import Graph
from relp_cli.spaces.units import Units

Path = list[tuple[int, int]]  # (position, unit), from the logits back


def below(n: int, generator: torch.Generator) -> int:
    """A number from 0 to n − 1."""
    return int(torch.randint(n, (1,), generator=generator))


def layer_path(units: Units, among: Bool[Tensor, "pos unit"], generator: torch.Generator) -> Path:
    """A chain of `among`'s units through the residual stream, from the last position back: each the uniform choice of all
    units in lower layers at the same or an earlier position, and of the input, where it ends. Empty where the last position
    has none.
    """
    path: Path = []
    layer, allowed = units.layer, among.clone()
    allowed[:-1] = False  # what is read in the end
    while True:
        cells = allowed.nonzero()
        if not len(cells):
            return path
        drawn = below(len(cells) + bool(path), generator)
        if drawn == len(cells):
            return path
        position, unit = cells[drawn].tolist()
        path.append((position, unit))
        allowed = among & (layer < layer[unit])
        allowed[position + 1 :] = False


def graph_path(units: Units, among: Bool[Tensor, "pos edge"], generator: torch.Generator) -> Path:
    """Edges from the logits at the last position back to the input, each the uniform choice of the writers that the reader has,
    then of the writer's own readers; a head's keys and values are read at the same or an earlier position.
    """
    graph: Graph = units.structure
    number = graph.dense(torch.arange(graph.n_edges))
    path: Path = []
    position, reader = len(among) - 1, len(graph.readers) - 1
    while True:
        writers = graph.mask[:, reader].nonzero()[:, 0]
        writer = int(writers[below(len(writers), generator)])
        path.append((position, int(number[writer, reader])))
        if writer == 0:
            return path
        readers = graph.nodes[writer]
        reader = readers[below(len(readers), generator)]
        if graph.readers[reader].endswith(("<k>", "<v>")):
            position = below(position + 1, generator)
