"""What fills the heads and MLPs that a program does not use: they read what the circuit reads and writes, write more loudly
than it, and nothing on the way to the logits reads what they write.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

from relp_cli.known.program import ONE, Coordinate, Copy, Head, Match, Mlp, Neuron, Program

NOISE = "noise"
LOUD, ECHO = (
    (6.0, 14.0),
    0.4,
)  # copies of tokens and of the circuit's features; of noise, which would grow with every layer
NEURONS = 8


def cluttered(program: Program, seed: int) -> Program:
    """The program with a distractor in every free head and MLP. It has a feature `noise`, as wide as `token`."""
    rng = random.Random(seed)
    taken = {head.name for head in program.heads} | {mlp.name for mlp in program.mlps}
    heads = [
        _head(program, layer, head, rng)
        for layer in range(program.n_layers)
        for head in range(program.n_heads)
        if f"a{layer}.h{head}" not in taken
    ]
    mlps = [_mlp(program, layer, rng) for layer in range(program.n_layers) if f"m{layer}" not in taken]
    return replace(program, heads=(*program.heads, *heads), mlps=(*program.mlps, *mlps))


def _head(program: Program, layer: int, head: int, rng: random.Random) -> Head:
    """Attends by one feature matched with another of its width, and copies one of `noise`'s width."""
    names = [name for name in program.features if layer or name != NOISE]
    query = rng.choice(names)
    key = rng.choice([name for name in names if program.features[name] == program.features[query]])
    weak = ECHO / 4 if NOISE in (query, key) else 1.0  # noise is loud
    source = rng.choice([name for name in names if program.features[name] == program.features[NOISE]])
    scale = ECHO if source == NOISE else rng.uniform(*LOUD)
    match = Match(query, key, rng.choice((-1, 1)) * rng.uniform(1, 4) * weak)
    return Head(layer, head, (match,), (Copy(source, NOISE, rng.choice((-1, 1)) * scale),))


def _mlp(program: Program, layer: int, rng: random.Random) -> Mlp:
    return Mlp(layer, tuple(_neuron(program, layer, rng) for _ in range(NEURONS)))


def _neuron(program: Program, layer: int, rng: random.Random) -> Neuron:
    def some(count: int, scale: float) -> dict[Coordinate, float]:
        names = [rng.choice(list(program.features)) for _ in range(count)]
        places = [(name, rng.randrange(program.features[name])) for name in names]
        return {at: rng.uniform(-2, 2) * (scale if at[0] == NOISE else 1) for at in places if layer or at[0] != NOISE}

    noise = rng.sample(range(program.features[NOISE]), 2)
    writes = {(NOISE, i): rng.choice((-1, 1)) * rng.uniform(2, 5) for i in noise}
    return Neuron(some(3, 0.05), writes, rng.uniform(-1, 1), some(2, 0.05), 1.0)


def one_hot(feature: str, i: int, value: float = 1.0) -> Mapping[Coordinate, float]:
    """The i-th dimension of a feature."""
    return {(feature, i): value}


def constant(value: float) -> Mapping[Coordinate, float]:
    """The same at every position of every prompt."""
    return {(ONE, 0): value}
