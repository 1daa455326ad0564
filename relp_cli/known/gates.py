"""Compiled cases in which two pieces of evidence decide, alone or together: AND, OR, a product, and a sum that is clipped."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from relp_cli.known.clutter import NOISE, constant, one_hot
from relp_cli.known.compositions import FIXED, N_PAIRS, SHARP, STEEP
from relp_cli.known.program import ONE, Coordinate, Copy, Head, Match, Mlp, Neuron, Pair, Program

PLAIN, A, B, NOT_A, NOT_B, YES, NO = 4, 4, 5, 6, 7, 8, 9  # tokens; below 4 they are plain
LENGTH = 6
WIDTH = {"token": 8, "is_a": 1, "is_b": 1, "sign_a": 1, "sign_b": 1, "at_a": 1, "at_b": 1, "a": 1, "b": 1,
         "verdict": 1, NOISE: 8}  # fmt: skip
PLACES = {"a": 1, "b": 3}  # what positions say of themselves
TOKENS = (
    *(one_hot("token", t) for t in range(PLAIN)),
    *(
        {("token", t): 1.0, (f"is_{kind}", 0): 1.0, (f"sign_{kind}", 0): sign}
        for t, kind, sign in ((A, "a", 1.0), (B, "b", 1.0), (NOT_A, "a", -1.0), (NOT_B, "b", -1.0))
    ),
    {},
    {},
)
Evidence = Sequence[int]


def _pairs(
    rng: random.Random,
    kinds: Sequence[tuple[Evidence, Evidence]],
    yes: Callable[[Evidence], bool],
    places: Sequence[int] = (),
) -> tuple[Pair, ...]:
    """(evidence in the original, in the patch prompt) by turns, at random places among random plain tokens (or at `places`)."""
    pairs: list[Pair] = []
    while len(pairs) < N_PAIRS:
        given = kinds[len(pairs) % len(kinds)]
        texts = [[rng.randrange(PLAIN) for _ in range(LENGTH)] for _ in given]
        for text, evidence in zip(texts, given, strict=True):
            for place, token in zip(places or rng.sample(range(LENGTH - 1), len(evidence)), evidence, strict=False):
                text[place] = token
        original, patch = map(tuple, texts)
        pairs.append(Pair(original, patch, *((YES, NO) if yes(given[0]) else (NO, YES))))
    return tuple(pairs)


def _detector(layer: int, head: int, kind: str, source: str, scale: float = 1.0) -> Head:
    """Attends to evidence of a kind and copies `source` from it. Without evidence it attends to all, where that is 0."""
    return Head(layer, head, (Match(ONE, f"is_{kind}", SHARP),), (Copy(source, kind, scale),))


def _gate(name: str, about: str, pairs: tuple[Pair, ...], heads: tuple[Head, ...], mlp: Mlp) -> Program:
    unembed = {YES: one_hot("verdict", 0, 6.0), NO: constant(3.0)}
    positions = [dict[Coordinate, float]() for _ in range(LENGTH)]
    for kind, place in PLACES.items():
        positions[place] = {(f"at_{kind}", 0): 1.0}
    return Program(name, about, "gpt2", WIDTH, TOKENS, unembed, heads, (mlp,), pairs, tuple(positions))


def both(rng: random.Random) -> Program:
    """AND. One neuron of the MLP reads what distractors write, and is off whatever they do."""
    gate = Neuron({("a", 0): STEEP, ("b", 0): STEEP}, one_hot("verdict", 0, 2 / STEEP), -1.5 * STEEP)
    off = Neuron(one_hot(NOISE, 0, 0.2), one_hot("verdict", 0, 5.0), -40.0, without_effect=True)
    kinds = [([A, B], [A]), ([A, B], [B]), ([A, B], []), ([A], [A, B]), ([B], [A, B])]
    return _gate(
        "both",
        "AND of two heads in an MLP, which also reads distractors with a neuron that is off",
        _pairs(rng, kinds, lambda evidence: {A, B} <= set(evidence)),
        (_detector(0, 0, "a", "is_a"), _detector(0, 3, "b", "is_b")),
        Mlp(0, (gate, off)),
    )


def either(rng: random.Random) -> Program:
    """OR: min(a + b, 1), of evidence at two places. Both are there or none is, so that either head can be spared."""
    reads = {("a", 0): STEEP, ("b", 0): STEEP}
    ramp = (
        Neuron(reads, one_hot("verdict", 0, 1 / STEEP)),
        Neuron(reads, one_hot("verdict", 0, -1 / STEEP), -STEEP),
    )
    return _gate(
        "either",
        "OR of two heads: the prompt has both, so that neither alone is needed",
        _pairs(rng, [([A, B], [])], bool, tuple(PLACES.values())),
        tuple(
            Head(layer, head, (Match(ONE, f"at_{kind}", FIXED),), (Copy(f"is_{kind}", kind),))
            for layer, head, kind in ((0, 1, "a"), (1, 2, "b"))
        ),
        Mlp(1, ramp),
    )


def opposed(rng: random.Random) -> Program:
    """a − max(a − 1, 0) of a = 2: what the MLP takes away has the slope of what the head gives directly."""
    above = Neuron(one_hot("a", 0, STEEP), one_hot("verdict", 0, -1 / STEEP), -STEEP)
    program = _gate(
        "opposed",
        "a head's direct effect and the one through an MLP have opposite slopes",
        _pairs(rng, [([A], []), ([A], [B])], bool),
        (_detector(0, 2, "a", "is_a", 2.0),),
        Mlp(1, (above,)),
    )
    return replace(program, unembed={YES: {("a", 0): 6.0, ("verdict", 0): 6.0}, NO: constant(3.0)})


def parity(rng: random.Random) -> Program:
    """A product of signs, a·b = (silu(sa) − silu(−sa))·b/s, in a gated MLP."""
    gate = tuple(
        Neuron(one_hot("a", 0, s), one_hot("verdict", 0, 1 / s), gated=one_hot("b", 0), gated_bias=0.0)
        for s in (4.0, -4.0)
    )
    kinds = [
        ([A, B], [NOT_A, B]), ([A, B], [A, NOT_B]), ([A, NOT_B], [NOT_A, NOT_B]), ([NOT_A, NOT_B], [NOT_A, B]),
        ([NOT_A, B], [A, B]), ([A, NOT_B], [A, B]),
    ]  # fmt: skip
    program = _gate(
        "parity",
        "the product of two heads' signs, in a gated MLP",
        _pairs(rng, kinds, lambda evidence: set(evidence) in ({A, B}, {NOT_A, NOT_B})),
        (_detector(0, 0, "a", "sign_a"), _detector(0, 1, "b", "sign_b")),
        Mlp(1, gate),
    )
    unembed = {YES: one_hot("verdict", 0, 3.0), NO: one_hot("verdict", 0, -3.0)}
    return replace(program, architecture="llama", unembed=unembed, positions=())
