"""Which method finds a circuit that is known: scores of components against what is in the circuit and what is not.

1. A component's score is that of patching it at all positions together (cases label all positions alike), as ACDC, EAP and MIB
   score components; of pairs, |mean score| ("signed", what circuits are selected by) or mean |score| ("absolute").
   Where a circuit's edges are known by whole heads (InterpBench), the score of one is the largest of its q, k and v.
2. Scores below `NOTHING` of the largest are 0: a known circuit's other parts have effects of rounding errors only.
3. AUROC: the chance that a component of the circuit has a larger score than one outside it, a tie counting ½.
4. As many components as the circuit has are taken, those of the largest scores, none with score 0, ties in proportion. Precision:
   the share of them that is in the circuit (0 where none is taken). Recall: the share of the circuit that is among them.
5. Intervals: pairs are resampled, and for the mean over cases also cases.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from relp_cli.errors import RelpError, unknown
from relp_cli.known.case import Case
from relp_cli.known.program import node_of
from relp_cli.methods.request import Progress
from relp_cli.methods.score import resolve_method, shared_params
from relp_cli.methods.table import row_of
from relp_cli.models.load import load_model
from relp_cli.models.model import Model
from relp_cli.scoring import score
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import SPACES
from relp_cli.statistics import interval, resample_counts, resample_picks
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.task import load_task

NOTHING = 1e-6
KINDS: dict[str, tuple[str, ...]] = {"nodes": ("head", "mlp_out"), "edges": ("edges",)}
OVER_PAIRS = ("signed", "absolute")
MEASURES = ("auroc", "precision", "recall")
ALL = "mean of cases"


@dataclass(frozen=True)
class Question:
    """What is asked. methods: rows of `METHODS`, with `+rule`. spaces: of nodes, edges. params: of the methods and spaces."""

    methods: tuple[str, ...]
    spaces: tuple[str, ...] = tuple(KINDS)
    direction: str = "noising"
    over_pairs: str = "signed"
    params: Mapping[str, Any] | None = None
    dtype: str = "float64"
    batch_size: int = 32
    bootstrap: int = 1000
    seed: int = 0

    def asked(self) -> list[tuple[str, str]]:
        """(space, method) of what can be scored.

        Raises: RelpError for unknown names and parameters, and for a method that serves none of the spaces.
        """
        if self.over_pairs not in OVER_PAIRS:
            raise unknown("way to take scores over pairs", self.over_pairs, OVER_PAIRS)
        for space in self.spaces:
            if space not in KINDS:
                raise unknown("sort of components", space, KINDS)
        asked = []
        for space in self.spaces:
            served = [m for m in self.methods if space in row_of(m).serves]
            given = shared_params(served, {}, SPACES[space])
            asked += [(space, method) for method in given]
        for method in self.methods:
            if method not in [m for _, m in asked]:
                resolve_method(method, {}, self.spaces[0])  # says what it serves
        for space, method in asked:
            resolve_method(method, dict(self.params_of(method, space)), space)
        return asked

    def params_of(self, method: str, space: str) -> Mapping[str, Any]:
        """The parameters that are the method's, or the space's."""
        given = shared_params(self.methods, self.params or {}, SPACES[space])[method]
        return {k: v for k, v in given.items() if k not in SPACES[space].options}


def judge(cases: Sequence[Case], question: Question, progress: Progress | None = None) -> pd.DataFrame:
    """One row per space, method and case, and per space and method one of the mean over cases (case `ALL`).

    Columns: space, method, case, n_units, n_circuit, n_pairs, auroc, precision, recall, their `_lo` and `_hi` (95 % bootstrap),
    forwards_per_pair, backwards_per_pair, seconds, note. Cases whose edges are not known have no rows of edges.
    Raises: RelpError as `Question.asked`, and for a circuit that names what its model does not have.
    """
    asked = question.asked()
    rows: list[dict[str, Any]] = []
    draws: dict[tuple[str, str], list[np.ndarray]] = {}
    for number, case in enumerate(cases):
        model = load_model(str(case.folder), dtype=question.dtype)
        pairs = load_task(case.pairs).pairs(model, None, split="all")
        for space, method in asked:
            if space == "edges" and case.edges is None:
                continue
            row, drawn = _judge_one(case, model, pairs, space, method, question)
            rows.append(row)
            draws.setdefault((space, method), []).append(drawn)
        if progress:
            progress(number + 1, len(cases), "cases")
    table = pd.DataFrame(rows)
    means = [_mean(table, key, np.stack(drawn), question) for key, drawn in draws.items()]
    return pd.concat([table, pd.DataFrame(means)], ignore_index=True)


def _judge_one(
    case: Case, model: Model, pairs: Sequence[PairBatch], space: str, method: str, question: Question
) -> tuple[dict[str, Any], np.ndarray]:
    scores = score(
        model, pairs, method, KINDS[space], case.metric, question.direction, batch_size=question.batch_size,
        keep_examples=True, **question.params_of(method, space),
    )  # fmt: skip
    names = component_names(scores)
    whole = space == "edges" and not any("<" in edge for edge in case.edges or ())
    parts = by_heads(names) if whole else {name: [i] for i, name in enumerate(names)}
    truth = in_circuit(case, space, list(parts))
    examples = component_scores(scores).numpy()
    if question.over_pairs == "absolute":
        examples = np.abs(examples)
    counts = resample_counts(len(examples), question.bootstrap, question.seed, scores.prompts)
    point = measures(largest(np.abs(examples.mean(0))[None], parts), truth)[0]
    drawn = measures(largest(np.abs(counts @ examples) / len(examples), parts), truth)
    one_sided = truth.all() or not truth.any()
    meta = scores.meta
    row: dict[str, Any] = {"space": space, "method": method, "case": case.name, "kind": case.kind}
    row |= {
        "n_units": len(truth),
        "n_circuit": int(truth.sum()),
        "n_pairs": len(examples),
        "direction": question.direction,
    }
    row |= _with_intervals(point, drawn)
    row |= {name: meta[name] for name in ("forwards_per_pair", "backwards_per_pair", "seconds")}
    return row | {"note": "every component is in the circuit: no AUROC" if one_sided else ""}, drawn


def _mean(table: pd.DataFrame, key: tuple[str, str], drawn: np.ndarray, question: Question) -> dict[str, Any]:
    """The mean over cases; drawn: Float[case, draw, measure]. Each draw takes as many cases as there are, with repetition."""
    space, method = key
    own = table[(table.space == space) & (table.method == method)]
    n, draws = drawn.shape[:2]
    picks = resample_picks(n, draws, question.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of no number
        means = np.nanmean(drawn[picks, np.arange(draws)[:, None]], axis=1)
        point = np.nanmean(own[list(MEASURES)].to_numpy(float), axis=0)
    row: dict[str, Any] = {"space": space, "method": method, "case": ALL, "kind": "", "direction": question.direction}
    row |= {name: int(own[name].sum()) for name in ("n_units", "n_circuit", "n_pairs")}
    row |= _with_intervals(point, means)
    row |= {name: float(own[name].mean()) for name in ("forwards_per_pair", "backwards_per_pair")}
    return row | {"seconds": float(own.seconds.sum()), "note": f"{own.auroc.notna().sum()} cases"}


def _with_intervals(point: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    out: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an AUROC that no draw has
        ends = interval(drawn)
    for i, name in enumerate(MEASURES):
        out |= {name: float(point[i]), f"{name}_lo": float(ends[0, i]), f"{name}_hi": float(ends[1, i])}
    return out


def component_scores(scores: Scores) -> Float[Tensor, "example unit"]:
    """Per pair, a component's score summed over positions (of known circuits there is one position: all of them)."""
    assert scores.examples is not None
    return scores.dense(scores.examples).double().sum(1)


def component_names(scores: Scores) -> list[str]:
    """The names of components in the order of `component_scores`: `a0.h3`, `m1`; of edges `a0.h3->m1`."""
    if isinstance(scores.units.structure, Graph):
        return scores.units.structure.edge_names()
    return [
        f"a{block.layer}.h{i}" if block.kind == "head" else f"m{block.layer}"
        for block in scores.units.blocks
        for i in range(block.size)
    ]


def by_heads(names: Sequence[str]) -> dict[str, list[int]]:
    """Edges into whole heads, `a0.h1->a1.h2`, and which edges they are made of: those into its q, k and v."""
    parts: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        parts.setdefault(node_of(name), []).append(i)
    return parts


def largest(
    values: Float[np.ndarray, "draw edge"], parts: Mapping[str, Sequence[int]]
) -> Float[np.ndarray, "draw unit"]:
    """The largest value of each one's parts."""
    return np.stack([values[:, which].max(1) for which in map(list, parts.values())], axis=1)


def in_circuit(case: Case, space: str, names: Sequence[str]) -> Bool[np.ndarray, " unit"]:
    """Which components are in a case's circuit. Raises RelpError for one that its model does not have."""
    circuit = case.nodes if space == "nodes" else case.edges or ()
    for name in circuit:
        if name not in names:
            raise unknown(space.removesuffix("s"), name, names, f"case {case.name}: {space}: ")
    return np.isin(np.array(names), np.array(circuit))


def measures(values: Float[np.ndarray, "draw unit"], truth: Bool[np.ndarray, " unit"]) -> Float[np.ndarray, "draw 3"]:
    """AUROC (NaN where the circuit is everything or nothing), precision and recall of |scores|, for each draw."""
    values = np.where(values < NOTHING * values.max(1, keepdims=True), 0.0, values)
    inside, outside = values[:, truth], values[:, ~truth]
    auroc = np.full(len(values), np.nan)
    if inside.size and outside.size:
        ranked = np.sort(outside, axis=1)
        for i, (row, own) in enumerate(zip(ranked, inside, strict=True)):
            below, up_to = np.searchsorted(row, own, "left"), np.searchsorted(row, own, "right")
            auroc[i] = (below + up_to).mean() / (2 * len(row))
    size = int(truth.sum())
    least = -np.sort(-values, axis=1)[:, size - 1 : size]
    above, tied = values > least, (values == least) & (values > 0)
    share = (size - above.sum(1)) / np.maximum(tied.sum(1), 1)
    hits = (above & truth).sum(1) + share * (tied & truth).sum(1)
    taken = np.minimum((values > 0).sum(1), size)
    return np.stack([auroc, hits / np.maximum(taken, 1), hits / size], axis=1)


def check_cases(cases: Sequence[Case]) -> None:
    """Raises RelpError for two cases of one name: their rows could not be told apart."""
    names = [case.name for case in cases]
    for name in names:
        if names.count(name) > 1:
            raise RelpError(f"two cases are named '{name}'; give one, or rename one in its case.json")
