"""Compiled cases with decoys: parts that no prompt of a pair makes move the logits, but that a gradient, at the run or on the way
to the source, says do. Each also has a head that is in the circuit and moves the logits only a little.
"""

from __future__ import annotations

import random
from dataclasses import replace

from relp_cli.known.clutter import NOISE, constant, one_hot
from relp_cli.known.compositions import FIXED, N_PAIRS, STEEP
from relp_cli.known.program import ONE, Coordinate, Copy, Head, Match, Mlp, Neuron, Pair, Program

PLAIN, LENGTH = 4, 6
QUIET = 0.1  # what the small head adds, of what the large one does

# Of `tent` and `ghost`: tokens 4 to 7 say a, b, both or neither at position 1; 8 and 9 are a bait's two values at position 0.
YES, NO = 10, 11
WIDTH = {"token": 8, "is_a": 1, "is_b": 1, "bait": 1, "first": 1, "second": 1, "a": 1, "hooked": 1, "ghost": 1, "lure": 1,
         "verdict": 1, NOISE: 8}  # fmt: skip


def _decoyed(
    name: str,
    about: str,
    rng: random.Random,
    heads: tuple[Head, ...],
    mlps: tuple[Mlp, ...],
    baits: tuple[float, float],
) -> Program:
    """verdict = a + QUIET·b, of the evidence at position 1; the bait at position 0 changes in every pair."""
    tokens: list[dict[Coordinate, float]] = [dict(one_hot("token", t)) for t in range(PLAIN)]
    evidence = [(a, b) for a in (1.0, 0.0) for b in (1.0, 0.0)]
    tokens += [{("token", PLAIN + i): 1.0, ("is_a", 0): a, ("is_b", 0): b} for i, (a, b) in enumerate(evidence)]
    tokens += [{("bait", 0): value} for value in baits]
    pairs = []
    for i in range(N_PAIRS):
        given, other = ((0, 3), (0, 1), (0, 2), (1, 2))[i % 4]
        bait = rng.randrange(2)
        original, patch = (
            (8 + which, PLAIN + what, *(rng.randrange(PLAIN) for _ in range(LENGTH - 2)))
            for which, what in ((bait, given), (1 - bait, other))
        )
        pairs.append(Pair(original, patch, YES, NO))
    positions: list[dict[Coordinate, float]] = [{} for _ in range(LENGTH)]
    positions[0], positions[1] = {("first", 0): 1.0}, {("second", 0): 1.0}
    circuit = (
        Head(0, 1, (Match(ONE, "second", FIXED),), (Copy("is_a", "a"),)),
        Head(1, 3, (Match(ONE, "second", FIXED),), (Copy("is_b", "verdict", QUIET),)),
    )
    unembed = {YES: one_hot("verdict", 0, 6.0), NO: constant(3.0)}
    return Program(
        name, about, "gpt2", WIDTH, (*tokens, {}, {}), unembed, (*circuit, *heads), mlps, tuple(pairs), tuple(positions)
    )


RELAY = Neuron(one_hot("a", 0, STEEP), one_hot("verdict", 0, 1 / STEEP))  # a, where it is no less than 0


def tent(rng: random.Random) -> Program:
    """An MLP's neurons make a tent of what a decoy writes: ½ and 3/2 are equally high on it, its slopes there opposite."""
    decoy = Head(0, 2, (Match(ONE, "first", FIXED),), (Copy("bait", "hooked"),))
    sides = (
        Neuron(one_hot("hooked", 0, STEEP), one_hot("verdict", 0, 4 / STEEP), without_effect=True),
        Neuron(one_hot("hooked", 0, STEEP), one_hot("verdict", 0, -8 / STEEP), -STEEP, without_effect=True),
    )
    program = _decoyed(
        "tent",
        "a decoy moves an MLP from one side of a peak to the other: a slope, and no effect",
        rng,
        (decoy,),
        (Mlp(0, (RELAY, *sides)),),
        (0.5, 1.5),
    )
    low = {NO: constant(3.0 + 6 * 4 * 0.5)}  # what the tent gives at either side
    return replace(program, unembed={**program.unembed, **low})


def ghost(rng: random.Random) -> Program:
    """Halfway between the prompts, where no prompt is, an MLP writes a feature; another reads a second decoy only then."""
    decoys = (
        Head(0, 0, (Match(ONE, "first", FIXED),), (Copy("bait", "hooked"),)),
        Head(0, 3, (Match(ONE, "first", FIXED),), (Copy("bait", "lure", 0.5),)),
    )
    bump = tuple(
        Neuron(one_hot("hooked", 0, STEEP), one_hot("ghost", 0, height / STEEP), at * STEEP)
        for at, height in ((0.5, 2.0), (0.0, -4.0), (-0.5, 2.0))
    )
    both = Neuron(
        {("ghost", 0): 2 * STEEP, ("lure", 0): STEEP},
        one_hot("verdict", 0, 20 / STEEP),
        -1.7 * STEEP,
        without_effect=True,
    )
    return _decoyed(
        "ghost",
        "decoys that an MLP would see halfway between the two prompts, where no prompt is",
        rng,
        decoys,
        (Mlp(0, bump), Mlp(1, (RELAY, both))),
        (-1.0, 1.0),
    )


def twins(rng: random.Random) -> Program:
    """A decoy decides which of two places a head attends to; both have the same token. a _ a at 1 and 3, asked by no one: a."""
    letters = 8
    width = {
        "token": letters,
        "hint": 2,
        "side": 2,
        "place": 2,
        "first": 1,
        "fourth": 1,
        "answer": letters,
        NOISE: letters,
    }
    tokens = [one_hot("token", t) for t in range(letters)] + [one_hot("hint", i) for i in range(2)]
    pairs: list[Pair] = []
    while len(pairs) < N_PAIRS:
        (one, other), hint = rng.sample(range(letters), 2), rng.randrange(2)
        plain = [t for t in range(letters) if t not in (one, other)]
        prompts = []
        for letter, last, which in ((one, one, hint), (other if len(pairs) % 4 else one, other, 1 - hint)):
            prompts.append((letters + which, letter, rng.choice(plain), letter, last, rng.choice(plain)))
        pairs.append(Pair(prompts[0], prompts[1], one, other))
    positions: list[dict[Coordinate, float]] = [{} for _ in range(LENGTH)]
    positions[0], positions[1], positions[3], positions[4] = (
        {("first", 0): 1.0}, {("place", 0): 1.0}, {("place", 1): 1.0}, {("fourth", 0): 1.0}
    )  # fmt: skip
    return Program(
        "twins",
        "a decoy turns a head's attention from one token to another that is the same",
        "gpt2",
        width,
        tuple(tokens),
        {t: one_hot("answer", t, 6.0) for t in range(letters)},
        (
            Head(0, 2, (Match(ONE, "first", FIXED),), (Copy("hint", "side"),)),
            Head(1, 0, (Match("side", "place", 2.5, without_effect="q"),), (Copy("token", "answer"),)),
            Head(1, 2, (Match(ONE, "fourth", FIXED),), (Copy("token", "answer", QUIET / 2),)),
        ),
        (),
        tuple(pairs),
        tuple(positions),
    )
