"""What `relp circuit` selects from: a run's scores, without units of unstable sign, averaged with other runs' by rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relp_cli.errors import RelpError
from relp_cli.runs.scoring import open_run
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.refine import DRAWS, only_stable, rank_average
from relp_cli.spaces.scores import Scores


@dataclass(frozen=True)
class Refined:
    """scores: to select from. own: the run's, which a circuit is said to be of. sign, aggregate: to select with. about: what a
    circuit's record says besides. notes: for people.
    """

    scores: Scores
    own: Scores
    sign: str
    aggregate: str
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def recorded(self, circuit: Circuit) -> Circuit:
        """A circuit that was selected from `scores`, as one of the run's own."""
        if not self.about:
            return circuit
        selection = {**circuit.meta["selection"], **self.about}
        return replace(circuit, meta={**circuit.meta, "scores": self.own.hash, "selection": selection})


def refined(
    own: Scores,
    kinds: Sequence[str],
    sign: str,
    aggregate: str,
    stable: float | None,
    others: Sequence[Path],
    seed: int,
) -> Refined:
    """own: the run's scores of `kinds`. stable: the confidence of signs (None: all units). others: runs to average with.

    Raises: RelpError for runs that cannot be averaged, and scores whose signs cannot be told.
    """
    if not others and stable is None:
        return Refined(own, own, sign, aggregate)
    parts, names, notes = [own], list[str](), list[str]()
    for path in others:
        scores = open_run(path)[2]
        parts.append(scores.only(kinds))
        names.append(str(path))
    about: dict[str, Any] = {}
    if stable is not None:
        kept = [only_stable(part, stable, aggregate, seed=seed) for part in parts]
        for name, part, (_, left) in zip(["", *names], parts, kept, strict=True):
            where = f"{name}: " if name else ""
            notes.append(
                f"{where}{left} of {len(part.mean)} scores have the same sign in at least {stable:.0%} of {DRAWS} bootstrap "
                "resamples of the pairs; the others are left out"
            )
        parts = [part for part, _ in kept]
        about |= {"stable_signs": stable, "resamples": DRAWS}
    if not others:
        return Refined(parts[0], own, sign, aggregate, about, tuple(notes))
    averaged = rank_average(parts, sign, aggregate)
    count = int(averaged.mean.isfinite().sum())
    if not count:
        raise RelpError("no unit has a score in all of these runs")
    notes.append(f"{averaged.meta['method']}: {count} units are ranked in all of the {len(parts)} runs")
    about |= {"averaged_with": names, "sign": sign, "aggregate": aggregate}
    return Refined(averaged, own, "absolute", "none", about, tuple(notes))
