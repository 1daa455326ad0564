"""Compiled cases in which heads read what earlier heads and MLPs wrote: by their queries, keys and values."""

from __future__ import annotations

import random
from collections.abc import Mapping

from relp_cli.known.clutter import NOISE, one_hot
from relp_cli.known.program import ONE, Coordinate, Copy, Head, Match, Mlp, Neuron, Pair, Program

N_PAIRS = 32
STEEP = (
    20.0  # what inputs of neurons are multiplied by, so that GELU is a ReLU: gelu(20·x)/20 = x for x ≥ ½, 0 for x ≤ −½
)
SHARP = 12.0  # attends to what matches, all but 1e-5 for each other key
FIXED = 40.0  # the same, exactly in double precision: where nothing that prompts change decides


def induction(rng: random.Random, strength: float = 5.0, name: str = "induction") -> Program:
    """a b c d e b → c: the previous token's head is read by a later head's keys."""
    letters, length = 8, 6
    pairs: list[Pair] = []
    while len(pairs) < N_PAIRS:
        text = rng.sample(range(letters), 5)
        asked, other = rng.sample((1, 2, 3), 2)
        original = (*text, text[asked])
        if len(pairs) % 2:
            patch, foil = (*text, text[other]), text[other + 1]
        else:  # the asked letter stands elsewhere: its follower is another
            moved = list(text)
            moved[asked], moved[other] = moved[other], moved[asked]
            patch, foil = (*moved, text[asked]), moved[other + 1]
        if foil != text[asked + 1]:
            pairs.append(Pair(original, patch, text[asked + 1], foil))
    return Program(
        name,
        f"induction; the second head attends with a margin of {strength:g}",
        "gpt2",
        {"token": letters, "here": length, "after": length, "previous": letters, "answer": letters, NOISE: letters},
        tuple(one_hot("token", t) for t in range(letters)),
        {t: one_hot("answer", t, 6.0) for t in range(letters)},
        (
            Head(0, 1, (Match("here", "after", FIXED),), (Copy("token", "previous"),)),
            Head(1, 2, (Match("token", "previous", strength),), (Copy("token", "answer"),)),
        ),
        (),
        tuple(pairs),
        tuple({("here", i): 1.0, ("after", (i + 1) % length): float(i + 1 < length)} for i in range(length)),
    )


def saturated(rng: random.Random) -> Program:
    """Induction whose second head is so sure that its softmax has no gradient."""
    return induction(rng, 25.0, "saturated")


def two_hops(rng: random.Random) -> Program:
    """x→y y→z …, asked x: z. Tokens are a key and a value. The first hop's result is the second's query.

    Every key of the second hop also reads what a head writes alike at all positions: it shifts all scores.
    """
    names = 4
    width = {"token": 4, "value": 4, "ask": 4, "marker": 1, "mood": 1, "tone": 1, "pointer": 4, "answer": 4, NOISE: 4}
    tokens: list[Mapping[Coordinate, float]] = [
        {("token", k): 1.0, ("value", v): 1.0} for k in range(names) for v in range(names)
    ]
    asking, moods = len(tokens), len(tokens) + names
    tokens += [one_hot("ask", k) for k in range(names)]
    tokens += [{("marker", 0): 1.0, ("mood", 0): mood} for mood in (-1.0, 1.0)]

    def prompt(links: Mapping[int, int], order: list[int], asked: int, mood: int) -> tuple[int, ...]:
        return (moods + mood, *(k * names + links[k] for k in order), asking + asked)

    pairs: list[Pair] = []
    while len(pairs) < N_PAIRS:
        cycles = [
            dict(zip(ks, (*ks[1:], ks[0]), strict=True)) for ks in (rng.sample(range(names), names) for _ in "ab")
        ]
        orders, mood = [rng.sample(range(names), names) for _ in "ab"], rng.randrange(2)
        asked, other = rng.sample(range(names), 2)
        if len(pairs) % 2:  # other links, in another order
            links, order, asks = cycles[1], orders[1], asked
        else:
            links, order, asks = cycles[0], orders[0], other
        answer, foil = cycles[0][cycles[0][asked]], links[links[asks]]
        if answer != foil:
            both = (prompt(cycles[0], orders[0], asked, mood), prompt(links, order, asks, 1 - mood))
            pairs.append(Pair(*both, answer, foil))
    return Program(
        "two_hops",
        "a pointer followed twice; the second head's query is the first's result; its keys are all shifted alike",
        "llama",
        width,
        tuple(tokens),
        {t: one_hot("answer", t, 6.0) for t in range(names)},
        (
            Head(0, 0, (Match("ask", "token", 9.0),), (Copy("value", "pointer"),)),
            Head(0, 3, (Match(ONE, "marker", FIXED),), (Copy("mood", "tone", 3.0),)),
            Head(
                1, 1, (Match("pointer", "token", 6.0), Match(ONE, "tone", 2.0, without_effect="k")),
                (Copy("value", "answer"),),
            ),
        ),
        (),
        tuple(pairs),
    )  # fmt: skip


def carried(rng: random.Random) -> Program:
    """up/down letters… place → the letter after (before) the one at that place: an MLP's result is a later head's value."""
    letters, places = 6, 4
    width = {"token": letters, "mode": 2, "way": 2, "place": places, "asked": places, "first": 1, "next": letters,
             "answer": letters, NOISE: letters}  # fmt: skip
    tokens: list[Mapping[Coordinate, float]] = [one_hot("token", t) for t in range(letters)]
    tokens += [one_hot("mode", i) for i in range(2)] + [one_hot("asked", i) for i in range(places)]
    steps = (1, -1)
    lookup = tuple(
        Neuron(
            {("token", t): STEEP, ("way", i): STEEP}, one_hot("next", (t + steps[i]) % letters, 2 / STEEP), -1.5 * STEEP
        )
        for t in range(letters)
        for i in range(2)
    )
    pairs: list[Pair] = []
    while len(pairs) < N_PAIRS:
        text, (mode, place) = rng.sample(range(letters), places), (rng.randrange(2), rng.randrange(places))
        then, new_mode, new_place = list(text), mode, place
        match len(pairs) % 3:
            case 0:
                new_mode = 1 - mode
            case 1:
                new_place = rng.choice([p for p in range(places) if p != place])
            case _:
                then = rng.sample(range(letters), places)
        answer, foil = (text[place] + steps[mode]) % letters, (then[new_place] + steps[new_mode]) % letters
        if answer != foil:
            original = (letters + mode, *text, letters + 2 + place)
            pairs.append(Pair(original, (letters + new_mode, *then, letters + 2 + new_place), answer, foil))
    positions = [one_hot("first", 0), *(one_hot("place", i) for i in range(places)), {}]
    return Program(
        "carried",
        "a head's result decides what an MLP looks up; a later head's values carry it to the end",
        "gpt2",
        width,
        tuple(tokens),
        {t: one_hot("answer", t, 6.0) for t in range(letters)},
        (
            Head(0, 2, (Match(ONE, "first", FIXED),), (Copy("mode", "way"),)),
            Head(1, 0, (Match("asked", "place", 7.0),), (Copy("next", "answer"),)),
        ),
        (Mlp(0, lookup),),
        tuple(pairs),
        tuple(positions),
    )
