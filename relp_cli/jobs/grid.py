"""Batch jobs: a YAML grid of tasks × models × methods × node kinds × directions × seeds, as content-hashed cells.

1. `cells` lists the grid. A *group* shares task, model, direction and seed: its pairs are drawn once.
2. Scores are run directories below JOB/scores, one per group and method for all node kinds, shared between cells.
3. Every cell writes JOB/cells/<hash>.json: its rows, or the error that it alone failed with.
4. The same command again computes only cells without rows; the summary is rebuilt from the cell files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from relp_cli import MOST_SEED
from relp_cli.config.load import load_config
from relp_cli.config.paths import find_config
from relp_cli.errors import RelpError
from relp_cli.features.kinds import FEATURE_KINDS, SCORED, scored_as
from relp_cli.files import read_json
from relp_cli.methods.table import METHODS
from relp_cli.runs.spec import Common, ScoreSpec

COSTS = ("forwards_per_pair", "backwards_per_pair", "seconds")  # of a cell's scores, beside every point of its curve


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EvaluateSpec(_Strict):
    """Faithfulness curves on held-out pairs. See `relp evaluate --help`."""

    sweep: str = "counts:log:15"
    ablation: str = "mean"
    exclude_layers: int | None = Field(default=None, ge=0)
    heldout: int = Field(default=100, ge=1)
    random_circuits: int = Field(default=3, ge=0)
    metric: str | None = None


class AgreementSpec(_Strict):
    """Agreement with a reference method over the scored pairs. See `relp compare --help`."""

    reference: str = "act_patch"
    top_k: int = Field(default=10, ge=1)


class JobSpec(Common):
    """A grid. At least one of `evaluate` and `agreement` says what is computed per cell.

    rules: of every method that takes rules and has none in `params`.
    """

    name: str
    description: str = ""
    tasks: tuple[str, ...]
    models: tuple[str, ...]
    methods: tuple[str, ...]
    kinds: tuple[str, ...]
    directions: tuple[Literal["noising", "denoising"], ...] = ("noising",)
    seeds: tuple[Annotated[int, Field(ge=0, le=MOST_SEED)], ...] = (0,)
    rules: tuple[str, ...] | Literal["auto"] | None = None
    params: dict[str, dict[str, Any]] = Field(default_factory=dict)
    evaluate: EvaluateSpec | None = None
    agreement: AgreementSpec | None = None
    exact_candidates: int | None = Field(default=None, ge=1)
    dictionary: str | None = None
    published: Literal["table5", "figure3"] | None = None

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.+-]{0,99}", name):
            raise ValueError(
                "expected a name of at most 100 letters, digits, '_', '-', '.', '+' (it names the job's folder)"
            )
        return name

    @model_validator(mode="after")
    def _something_to_do(self) -> JobSpec:
        if self.evaluate is None and self.agreement is None:
            raise ValueError("expected `evaluate:` or `agreement:`, or both")
        for axis in ("tasks", "models", "methods", "kinds", "directions", "seeds"):
            values = getattr(self, axis)
            if not values:
                raise ValueError(f"`{axis}` is empty: the grid has no cells")
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"`{axis}`: {twice[0]} is there twice")
        features = [kind for kind in self.kinds if kind in FEATURE_KINDS]
        if features and self.dictionary is None:
            raise ValueError(
                f"kind {features[0]} needs `dictionary:`, a folder of sparse autoencoders or a shipped name"
            )
        mixed = [kind for kind in self.kinds if "+" in kind]
        if mixed and (self.agreement or self.exact_candidates):
            raise ValueError(f"kind {mixed[0]} is of circuits; agreement and exact_candidates are per node kind")
        if features and self.agreement:
            raise ValueError(
                f"`agreement:` is not for {features[0]}; its exact patching is `relp score --method act_patch`"
            )
        return self


@dataclass(frozen=True)
class Group:
    """What cells share: the pairs, and the model's behaviour on them."""

    task: str
    model: str
    direction: Literal["noising", "denoising"]
    seed: int


@dataclass(frozen=True)
class Cell:
    """One method and node kind in one group."""

    group: Group
    method: str
    kind: str

    @property
    def label(self) -> str:
        g = self.group
        names = [g.task, g.model, self.method, self.kind, *([g.direction] if g.direction != "noising" else [])]
        return " / ".join(names) + (f" / seed {g.seed}" if g.seed else "")


def load_job(name_or_path: str, overrides: list[str]) -> JobSpec:
    """A shipped job ("table5_tiny") or a YAML path, with `key=value` overrides. Raises RelpError, naming file and key."""
    job = load_config(find_config("jobs", name_or_path), JobSpec, overrides)
    for method, kind in itertools.product(job.methods, job.kinds):
        ScoreSpec(task="x", method=method, nodes=nodes_of(kind))  # unknown names are found before anything runs
    unknown = sorted(set(job.params) - {m.partition("+")[0] for m in job.methods} - set(job.methods))
    if unknown:
        raise RelpError(f"{name_or_path}: params: '{unknown[0]}' is not among the job's methods {list(job.methods)}")
    return job


def cells(job: JobSpec) -> list[Cell]:
    """The grid, group by group."""
    groups = [Group(*g) for g in itertools.product(job.tasks, job.models, job.directions, job.seeds)]
    return [Cell(g, m, k) for g in groups for m in job.methods for k in job.kinds]


def groups_of(job: JobSpec) -> list[Group]:
    """The grid's groups, those of one model behind each other."""
    groups = dict.fromkeys(cell.group for cell in cells(job))
    return sorted(groups, key=lambda group: job.models.index(group.model))


def groups_of_shard(job: JobSpec, index: int, count: int) -> list[Group]:
    """Share `index` (from 0) of `count`: neighbours, so that a shard loads few models. Shards differ by one group at most;
    together they are the job."""
    groups = groups_of(job)
    return groups[index * len(groups) // count : (index + 1) * len(groups) // count]


def nodes_of(kind: str) -> tuple[str, ...]:
    """The node kinds that are scored for one of a job's kinds; `attn_dim+mlp_dim` is circuits of both, ranked together."""
    return tuple(scored_as(kind).split("+"))


def score_spec_of(job: JobSpec, group: Group, method: str, kind: str | None = None) -> ScoreSpec:
    """The scoring run of one method in one group: for all of the job's plain node kinds at once, or for one other kind."""
    plain = tuple(k for k in job.kinds if k not in FEATURE_KINDS and "+" not in k)
    nodes = plain if kind in plain or (kind is None and plain) else nodes_of(kind or job.kinds[0])
    name = method.partition("+")[0]
    params = job.params.get(method, job.params.get(name, {}))
    if job.rules is not None and METHODS[name].rules:
        params = {"rules": job.rules if job.rules == "auto" else list(job.rules), **params}
    return ScoreSpec(
        task=group.task, model=group.model, method=method, nodes=nodes, seed=group.seed, direction=group.direction,
        keep_examples=True if job.agreement else None, **{name: getattr(job, name) for name in Common.model_fields},
        params={**params, "dictionary": job.dictionary} if nodes == (SCORED,) else params,
    )  # fmt: skip


def cell_hash(job: JobSpec, cell: Cell, **identity: str) -> str:
    """Content hash: everything that can change a cell's numbers, and what its names stand for (`identity`)."""
    settings = job.model_dump(mode="json", include={"evaluate", "agreement", "exact_candidates"})
    related = sorted(job.methods) if job.exact_candidates else []  # candidates come from the job's cheap methods
    content = {
        "score": score_spec_of(job, cell.group, cell.method, cell.kind).model_dump(mode="json"),
        "kind": cell.kind,
        "settings": settings,
        "related": related,
        **identity,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def cell_file(job: JobSpec, cell: Cell, identity: dict[str, str]) -> str:
    """The name of a cell's file in JOB/cells."""
    return f"{cell_hash(job, cell, **identity)}.json"


def unloaded_file(job: JobSpec, cell: Cell) -> str:
    """That of a cell whose model or task does not load: it has no content hash, its error needs a file."""
    return f"unloaded-{cell_hash(job, cell)}.json"


def is_finished(path: Path) -> bool:
    """Whether a cell's file has rows."""
    return "rows" in (read_cell(path) or {})


def read_cell(path: Path) -> dict[str, Any] | None:
    """A cell file's content; None where there is none, or none that can be read (it is then redone)."""
    try:
        content = read_json(path)
    except RelpError:
        return None
    return content if isinstance(content, dict) and (_rows(content.get("rows")) or "error" in content) else None


def _rows(rows: Any) -> bool:
    """Whether these are a finished cell's rows: there is at least one, and each says what it is of."""
    return isinstance(rows, list) and bool(rows) and all(isinstance(r, dict) and "what" in r for r in rows)
