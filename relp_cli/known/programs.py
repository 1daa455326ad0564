"""The compiled cases by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from relp_cli.known.clutter import cluttered, constant
from relp_cli.known.compositions import carried, induction, saturated, two_hops
from relp_cli.known.gates import both, either, opposed, parity
from relp_cli.known.program import Program
from relp_cli.known.traps import ghost, tent, twins

SEED = 0
NEVER = -5.0  # the logit of tokens that are no answer
PROGRAMS: dict[str, Callable[[random.Random], Program]] = {
    make.__name__: make
    for make in (induction, saturated, two_hops, carried, both, either, opposed, parity, tent, ghost, twins)
}


def program(name: str, seed: int = SEED) -> Program:
    """A case's program with its distractors; pairs and distractors are drawn with the seed."""
    bare = PROGRAMS[name](random.Random(f"{name} {seed}"))
    others = {t: constant(NEVER) for t in range(len(bare.tokens)) if t not in bare.unembed}
    return cluttered(replace(bare, unembed={**bare.unembed, **others}), seed)
