"""The estimators as rows.

Every signed score estimates c(n), the change of the metric when the unit is patched. An estimator is one function, of one of
three sorts (`by`), for every space (`space.py`) that it serves:
points  (on, params) → the points at which gradients are taken; the space multiplies them with its differences
batch   (on, params) → Result, the scores of one batch of pairs
all     (batches, params) → one Result per batch, for what depends on all pairs
`on` is a `space.Batch`. Adding an estimator touches its file and one row; `METHODS.add` takes rows from other packages.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from relp_cli.registry import Registry
from relp_cli.spaces.table import SPACES

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Result:
    """Scores per example of one batch, by the space's own keys, what was done to get them (rules applied → layers), and
    what else their metadata should say (it may override what the row says: `signed`).
    """

    scores: Mapping[str, Tensor]
    applied: dict[str, int] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class Params(BaseModel):
    """Base of every method's parameters: unknown names are errors, values are validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Workload(NamedTuple):
    """What the gradients that a method takes depend on, besides its parameters.

    sites: what paths of activations are taken at (0: not told).
    """

    layers: int
    sites: int


NODES, EDGES = ("nodes",), ("edges",)


@dataclass(frozen=True)
class Method:
    """One row of `relp ls methods`. `where` is `module:function:params class`, imported when the method is used.

    spaces:    the spaces that it serves (none: all). signed: whether scores have a sign. rules: whether it takes LRP rules.
    baselines: those it is defined for (None: what the space allows). each: one forward pass per unit. additive: the scores of a
    sum of metrics are the sum of their scores, so that parts of L can be scored apart (`tasks.parts`); points always are.
    gradients: how many forward and backward passes over every pair its steps take (0: not told); None where it has no steps.
    patches: the share of the nodes that it patches exactly, where that depends on its parameters.
    defaults, fixed: of an alias (`alias_of`), parameters that start or stay at another value than the method's own.
    """

    name: str
    where: str
    estimates: str
    cost: str
    addresses: str
    source: str
    spaces: tuple[str, ...] = ()
    by: Literal["points", "batch", "all"] = "points"
    signed: bool = True
    rules: bool = False
    baselines: tuple[str, ...] | None = None
    each: bool = False
    whole: bool = False
    additive: bool = False
    gradients: Callable[[Any, Workload], float] | None = None
    patches: Callable[[Any], float] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    alias_of: str = ""

    @property
    def graph(self) -> bool:
        """Whether its batches are as small as graphs need."""
        return not (self.each or self.whole)

    @property
    def recomputes(self) -> bool:
        """Whether it takes gradients batch by batch, so that layers can be computed again for them where memory is short."""
        return self.by == "points" or (self.by == "batch" and self.gradients is not None)

    @property
    def serves(self) -> tuple[str, ...]:
        return self.spaces or tuple(SPACES)

    def load(self) -> tuple[Callable[..., Any], type[Params]]:
        module, function, params = self.where.split(":")
        loaded: Any = importlib.import_module(module)
        return getattr(loaded, function), getattr(loaded, params) if params else Params

    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that can be given."""
        return tuple(name for name in self.load()[1].model_fields if name not in self.fixed)


def _steps(params: Any, _: Workload) -> float:
    return params.steps


METHODS: Registry[Method] = Registry("method")
POINTS, BASELINES = "relp_cli.methods.points", "relp_cli.methods.baselines"
LEARNED = "relp_cli.methods.learned"
ALONG = "steps × (forward + backward) + 2 forward"
FLAT = "zero-gradient regions, saturation"
for _row in (
    Method("act_patch", "relp_cli.methods.act_patch:act_patch:ActPatchParams", "c(n), exactly", "1 forward per unit", "—",
           "RelP eq. 1; edges: path patching, Goldowsky-Dill et al. 2023", by="batch", each=True, additive=True),
    Method("atp", f"{POINTS}:atp:", "c(n), linearised at the run", "2 forward + 1 backward", "cost",
           "RelP eq. 2; Nanda 2022; edges: Syed et al. 2023"),
    Method("relp", f"{POINTS}:relp:RelpParams", "c(n), with LRP coefficients for the gradient", "2 forward + 1 backward",
           "noisy gradients of norms, activations and gates", "RelP eq. 3", rules=True),
    Method("ig_inputs", f"{POINTS}:ig_inputs:PathParams",
           "c(n), gradient averaged over embeddings between run and source", ALONG, FLAT,
           "Sundararajan et al. 2017; Hanna et al. 2024", gradients=_steps),
    Method("expected_gradients", f"{POINTS}:expected_gradients:ExpectedParams",
           "c(n), gradient at random points between the embeddings of run and source",
           "samples × (forward + backward) + 2 forward", FLAT, "Erion et al. 2021", gradients=lambda params, _: params.samples),
    Method("relp_ig", f"{POINTS}:relp_ig:RelpIgParams", "c(n), LRP coefficients averaged over the same path", ALONG,
           "as relp and ig_inputs", "relp (docs/methods.md)", rules=True, gradients=_steps),
    Method("ig_activations", f"{POINTS}:ig_activations:IgActivationsParams",
           "c(n), gradient averaged while the unit's site moves from run to source",
           "steps × (forward + backward) per site (layer and kind) + 2 forward", FLAT,
           "Marks et al. 2025; IG blog (IGact); edges: Hanna et al. 2024 (code)",
           gradients=lambda params, on: 0 if getattr(params, "exact", ()) else params.steps * on.sites),
    Method("conductance", "relp_cli.methods.conductance:conductance:ConductanceParams",
           "the unit's share of L(source) − L(run) along the path of embeddings",
           "(steps + 1) × (forward + backward) + 2 forward", "zero-gradient regions", "Dhamdhere et al. 2018", by="batch",
           additive=True, gradients=lambda params, _: params.steps + 1),
    Method("atp_star", "relp_cli.methods.atp_star:atp_star:AtpStarParams",
           "|c(n)|, averaged over dropped layers (grad_drop=false: c(n), exact up to the pattern for queries and keys)",
           "2 forward + 1 backward per layer; QK fix: + 2 forward",
           "attention saturation (QK fix), cancellation (GradDrop)",
           "Kramár et al. 2024", NODES, "batch", signed=False, gradients=lambda _, on: 1 + on.layers * 2 / 3),
    Method("screened", "relp_cli.methods.screened:screened:ScreenedParams",
           "c(n), exactly for the budget's share of nodes that estimates call large; scaled estimates for the rest",
           "atp + relp + relp+secant + 1 forward per node of the budget", "what estimates miss", "relp (docs/rules.md)",
           NODES, "all", baselines=("patch",), patches=lambda params: params.budget * (1 + params.audit)),
    Method("learned", f"{LEARNED}:learned:LearnedParams",
           "the place in a ranking whose circuits of every size keep L, unsigned: larger is needed more",
           "steps × (forward + backward) of one batch + 2 forward", "what units do together", "MAttr; relp (docs/learned.md)",
           by="all", signed=False, whole=True),
    Method("hard_concrete", f"{LEARNED}:hard_concrete:HardConcreteParams",
           "log α of gates that are pruned to one size at the least loss of L, unsigned",
           "steps × (forward + backward) of one batch + 2 forward", "baseline", "Louizos et al. 2018; Wang et al. 2020",
           by="all", signed=False, whole=True),
    Method("eap_gp", "relp_cli.edges.eap_gp:eap_gp:EapGpParams",
           "c(u→v), gradient averaged along a path that follows the gradients",
           "steps × (2 forward + 4 backward) + 5 forward", "saturation along the straight path", "Zhang et al. 2025",
           EDGES, "all", baselines=("patch",)),
    Method("acdc", "relp_cli.edges.acdc:acdc:AcdcParams",
           "change of L when the edge is cut in turn, greedily from the logits",
           "1 forward per edge", "baseline", "Conmy et al. 2023", EDGES, "all", each=True),
    Method("information_flow", "relp_cli.edges.flow:information_flow:",
           "share of the reader's input that the writer makes up, unsigned",
           "1 forward", "baseline", "Ferrando & Voita 2024", EDGES, "batch", signed=False),
    Method("delta", f"{BASELINES}:delta:", "‖n(source) − n(run)‖, unsigned", "2 forward", "baseline", "—", NODES, "batch",
           signed=False),
    Method("random", f"{BASELINES}:random:RandomParams", "nothing: seeded noise", "none", "baseline", "—", NODES, "batch",
           signed=False),
):  # fmt: skip
    METHODS.add(_row.name, _row)


def alias(name: str, of: str, space: str, **more: Any) -> Method:
    """Another name for a method on one space; more: fields of the row that differ. Returns the row, registered."""
    given = {**more.get("defaults", {}), **more.get("fixed", {})}
    estimates = ", ".join([f"{of} on {space}", *(f"{k}={v}" for k, v in given.items() if v != ())])
    return METHODS.add(name, replace(METHODS[of], name=name, spaces=(space,), estimates=estimates, alias_of=of, **more))


JOINT = {"exact": ()}  # a parameter for nodes
alias("edge_patch", "act_patch", "edges")
alias("eap", "atp", "edges")
alias("relp_edges", "relp", "edges")
alias("eap_ig", "ig_inputs", "edges", defaults={"steps": 5})
alias("relp_edges_ig", "relp_ig", "edges", defaults={"steps": 5})
alias("eap_ig_activations", "ig_activations", "edges", defaults={"steps": 5}, fixed=JOINT)
alias("clean_corrupted", "ig_inputs", "edges", fixed={"steps": 1, "rule": "trapezoid"}, baselines=("patch",),
      cost="4 forward + 2 backward")  # fmt: skip


def row_of(method: str) -> Method:
    """The row of a method that rules may be added to (`relp+ah`). Raises RelpError for an unknown one."""
    return METHODS[method.partition("+")[0] if isinstance(method, str) else method]


def same_method(one: str, other: str) -> bool:
    """Whether two names are of one method: the same, or one an alias without parameters of its own of the other."""
    plain = [METHODS[name] for name in (one, other) if "+" not in name]
    return one == other or (
        len(plain) == 2 and len({row.alias_of or row.name for row in plain}) == 1 and not any(r.fixed for r in plain)
    )


def default_nodes(method: str, nodes: tuple[str, ...]) -> tuple[str, ...]:
    """What a method scores by default: `nodes`, or what its space is asked for by where it serves no nodes (`eap`: edges)."""
    row = row_of(method)
    return nodes if "nodes" in row.serves else SPACES[row.serves[0]].kinds[:1]


def methods_for(space: str) -> list[str]:
    """Names of the estimators that serve a space."""
    return [name for name, row in METHODS.items() if space in row.serves]
