"""Whether dry runs are right about memory: for every method and sort of units, the predicted peak and that of the run.

1. One process makes a model of random weights and pairs, and scores nothing.
2. Prediction and run are a process each, forked from it, so that neither finds memory that another let go.
3. A run that takes longer than `SECONDS` ends there: methods of many passes repeat what they did by then.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from relp_cli.costs.bench import fixture, one_thread
from relp_cli.costs.rehearsal import begun_for, expected_peak, peak
from relp_cli.errors import RelpError
from relp_cli.features.dictionary import Dictionary
from relp_cli.features.load import Dictionaries
from relp_cli.methods.request import Progress, Request
from relp_cli.methods.score import COMPONENTS
from relp_cli.methods.table import METHODS, row_of
from relp_cli.methods.unfinished import Unfinished
from relp_cli.models.model import Model
from relp_cli.runs.spec import ScoreSpec
from relp_cli.scoring import score
from relp_cli.spaces.sites import Site
from relp_cli.spaces.table import space_for
from relp_cli.tasks.pairs import PairBatch

UNITS: dict[str, tuple[str, ...]] = {
    "components": COMPONENTS, "heads": ("head",), "q/k/v": ("query", "key", "value"), "neurons": ("mlp_neuron",),
    "edges": ("edges",), "features": ("feature",),
}  # fmt: skip
SECANT = "relp+secant"  # holds what two endpoints recorded: the largest of the rule sets
LAYERS, PAIRS, POSITIONS = 4, 30, 16
FEATURES, ACTIVE = 4096, 32  # of a dictionary after every block
SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class Fixture:
    """What all cells of the table have in common."""

    model: Model
    batch: PairBatch
    dictionaries: Dictionaries

    @classmethod
    def make(cls) -> Fixture:
        """Few of GPT-2-small's layers, random weights, and dictionaries for what its blocks leave behind."""
        made = fixture(LAYERS, POSITIONS, PAIRS)
        width, draw = made.model.shape.d_model, torch.Generator().manual_seed(0)

        def dictionary() -> Dictionary:
            w_enc, w_dec = (torch.randn(s, generator=draw) / width**0.5 for s in ((width, FEATURES), (FEATURES, width)))
            zeros = torch.zeros(width)
            return Dictionary("topk", "TopK", w_enc, torch.zeros(FEATURES), w_dec, zeros, zeros, k=ACTIVE)

        by_site = {Site("resid", n): dictionary() for n in range(made.model.shape.n_layers)}
        return cls(made.model, made.batch, Dictionaries(by_site, "random", ""))


def methods() -> list[str]:
    """Every method once, and the largest of the rule sets."""
    names = [name for name, row in METHODS.items() if not row.alias_of]
    names.insert(names.index("relp") + 1, SECANT)
    return names


def cells_of(units: Sequence[str], only: str = "") -> list[tuple[str, str]]:
    """(method, sort of units), where defined. Raises RelpError for `only` that is in no method's name."""
    chosen = [name for name in methods() if only in name]
    served = [(name, sort) for sort in units for name in chosen if _serves(name, sort)]
    if not served:
        raise RelpError(
            f"--only: no method of {', '.join(units)} has '{only}' in its name; there are {', '.join(methods())}"
        )
    return served


def _serves(method: str, sort: str) -> bool:
    return space_for(UNITS[sort]).name in row_of(method).serves


def peaks(f: Fixture, cells: Sequence[tuple[str, str]], progress: Progress | None = None) -> pd.DataFrame:
    """A row per cell, in MiB: held (libraries, model), predicted and measured peak, predicted / measured, the same without what
    is held, and whether the run came to its end.

    Raises: RelpError where the system does not say what a process holds, and for what a process could not compute.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise RelpError("peaks of processes are read from Linux's /proc; this system has none")
    rows = []
    with one_thread():
        for done, (method, sort) in enumerate(cells):
            expected = _apart(_predicted, f, method, sort)
            held, above, whole = _apart(_measured, f, method, sort)
            measured = held + above
            rows.append(
                {
                    "method": method, "units": sort, "held": held, "predicted": expected.whole, "measured": measured,
                    "ratio": expected.whole / measured, "ratio above held": (expected.whole - expected.held) / above,
                    "ended": "yes" if whole else "begun",
                }
            )  # fmt: skip
            if progress:
                progress(done + 1, len(cells), "peaks")
    return pd.DataFrame(rows)


def _given(f: Fixture, sort: str) -> dict[str, Any]:
    return {"dictionary": f.dictionaries} if sort == "features" else {}


def _predicted(f: Fixture, method: str, sort: str) -> Any:
    """What a dry run says."""
    nodes = UNITS[sort]
    options = _given(f, sort)
    scorer = space_for(nodes).load_scorer()(f.model, [f.batch], nodes, Request(), options)
    spec = ScoreSpec(task="random", method=method, nodes=nodes)
    return expected_peak(f.model, [f.batch], spec, options, len(scorer.units) * len(scorer.labels), "logit_diff")


def _measured(f: Fixture, method: str, sort: str) -> tuple[float, float, bool]:
    """Held before the run and above that at its peak, scores written; and whether it came to its end."""
    whole = False
    with tempfile.TemporaryDirectory() as folder, peak(f.model.device) as found, begun_for(f.model, SECONDS):
        left = Unfinished(Path(folder) / "unfinished", method)
        scores = score(f.model, [f.batch], method, UNITS[sort], unfinished=left, **_given(f, sort))
        scores.save(Path(folder) / "scores.safetensors")
        whole = True
    return found.held, found.above, whole


def _apart(function: Callable[[Fixture, str, str], Any], *given: Any) -> Any:
    """What a function says in a process of its own. Raises RelpError for what it raises, and where it is ended."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, given))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = RelpError(f"{given[1]} on {given[2]}: its process ended")
    process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(to: Connection, function: Callable[..., Any], given: Sequence[Any]) -> None:
    try:
        answer = function(*given)
    except Exception as error:
        answer = RelpError(f"{given[1]} on {given[2]}: {error}")
    to.send(answer)


def sized() -> str:
    """What the table was measured on."""
    return f"MiB of a process, {LAYERS} layers of GPT-2-small's shape, {PAIRS} pairs of {POSITIONS} tokens, one thread"


def outside(table: pd.DataFrame, within: float = 0.25) -> Iterator[str]:
    """The cells whose prediction is further off."""
    for row in table[(table["ratio"] - 1).abs() > within].to_dict("records"):
        yield f"{row['method']}, {row['units']}: {row['ratio']:.2f}"
