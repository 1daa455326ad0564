"""The methods as rows. A method is one function `(setup, params) → Result`; adding one touches its file and one row here.

Every signed score estimates c(n), the change of the metric when the node is patched (docs/methods.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from relp_cli.registry import Registry

if TYPE_CHECKING:
    from relp_cli.methods.core import PerExample


@dataclass(frozen=True)
class Result:
    """Per-example scores on the slot axis, what was done to get them (rules applied → layers), and what else the
    scores' metadata should say (it may override what the row says: `signed`).
    """

    scores: PerExample
    applied: dict[str, int] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class Params(BaseModel):
    """Base of every method's parameters: unknown names are errors, values are validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Method:
    """One row of `relp ls methods`. `where` is `module:function:params class`, imported when the method is used."""

    name: str
    where: str
    estimates: str
    cost: str
    addresses: str
    source: str
    signed: bool = True
    rules: bool = False
    scope: Literal["nodes", "edges"] = "nodes"

    def load(self) -> tuple[Callable[..., Result], type[Params]]:
        module, function, params = self.where.split(":")
        package = "edges" if self.scope == "edges" else "methods"
        loaded: Any = importlib.import_module(f"relp_cli.{package}.{module}")
        return getattr(loaded, function), getattr(loaded, params) if params else Params


METHODS: Registry[Method] = Registry("method")
for _row in (
    Method("act_patch", "act_patch:act_patch:ActPatchParams", "c(n), exactly", "1 forward per node", "—",
           "RelP eq. 1"),
    Method("atp", "atp:atp:", "c(n), linearised at the run", "2 forward + 1 backward", "cost", "RelP eq. 2; Nanda 2022"),
    Method("relp", "relp:relp:RelpParams", "c(n), with LRP coefficients for the gradient", "2 forward + 1 backward",
           "noisy gradients of norms, activations and gates", "RelP eq. 3", rules=True),
    Method("ig_inputs", "ig_inputs:ig_inputs:PathParams",
           "c(n), gradient averaged over embeddings between run and source",
           "steps × (forward + backward) + 2 forward", "zero-gradient regions, saturation",
           "Sundararajan et al. 2017; Hanna et al. 2024"),
    Method("relp_ig", "relp_ig:relp_ig:RelpIgParams", "c(n), LRP coefficients averaged over the same path",
           "steps × (forward + backward) + 2 forward", "as relp and ig_inputs", "relp (docs/methods.md)", rules=True),
    Method("ig_activations", "ig_activations:ig_activations:IgActivationsParams",
           "c(n), gradient averaged while a layer's site moves from run to source",
           "steps × (forward + backward) per layer and kind + 2 forward", "zero-gradient regions, saturation",
           "Marks et al. 2025; IG blog (IGact)"),
    Method("conductance", "conductance:conductance:ConductanceParams",
           "the node's share of L(source) − L(run) along the path of embeddings",
           "(steps + 1) × (forward + backward) + 2 forward", "zero-gradient regions", "Dhamdhere et al. 2018"),
    Method("atp_star", "atp_star:atp_star:AtpStarParams",
           "|c(n)|, averaged over dropped layers (grad_drop=false: c(n), exact up to the pattern for queries and keys)",
           "2 forward + 1 backward per layer; QK fix: + 2 forward",
           "attention saturation (QK fix), cancellation (GradDrop)",
           "Kramár et al. 2024", signed=False),
    Method("edge_patch", "edge_patch:edge_patch:EdgePatchParams", "c(u→v), exactly", "1 forward per edge", "—",
           "path patching: Goldowsky-Dill et al. 2023", scope="edges"),
    Method("eap", "eap:eap:", "c(u→v), linearised at the run", "2 forward + 1 backward", "cost", "Syed et al. 2023",
           scope="edges"),
    Method("relp_edges", "eap:relp_edges:RelpParams", "c(u→v), with LRP coefficients for the gradient",
           "2 forward + 1 backward", "noisy gradients of norms, activations and gates", "relp (docs/methods.md)", rules=True,
           scope="edges"),
    Method("eap_ig", "eap_ig:eap_ig:EapIgParams", "c(u→v), gradient averaged over embeddings between run and source",
           "steps × (forward + backward) + 2 forward", "zero-gradient regions, saturation", "Hanna et al. 2024",
           scope="edges"),
    Method("relp_edges_ig", "eap_ig:relp_edges_ig:RelpEdgesIgParams", "c(u→v), LRP coefficients averaged over eap_ig's path",
           "steps × (forward + backward) + 2 forward", "as relp_edges and eap_ig", "relp (docs/methods.md)", rules=True,
           scope="edges"),
    Method("eap_ig_activations", "eap_ig:eap_ig_activations:EapIgParams",
           "c(u→v), gradient averaged while u's site moves from run to source",
           "(2·layers + 1) × steps × (forward + backward) + 2 forward", "zero-gradient regions, saturation",
           "Hanna et al. 2024 (code)", scope="edges"),
    Method("eap_gp", "eap_gp:eap_gp:EapGpParams", "c(u→v), gradient averaged along a path that follows the gradients",
           "steps × (2 forward + 4 backward) + 5 forward", "saturation along the straight path", "Zhang et al. 2025",
           scope="edges"),
    Method("acdc", "acdc:acdc:AcdcParams", "change of L when the edge is cut in turn, greedily from the logits",
           "1 forward per edge", "baseline", "Conmy et al. 2023", scope="edges"),
    Method("information_flow", "flow:information_flow:", "share of the reader's input that the writer makes up, unsigned",
           "1 forward", "baseline", "Ferrando & Voita 2024", signed=False, scope="edges"),
    Method("clean_corrupted", "eap:clean_corrupted:", "c(u→v), mean of the gradients at both prompts",
           "2 forward + 2 backward", "zero-gradient regions", "Hanna et al. 2024 (code)", scope="edges"),
    Method("delta", "baselines:delta:", "‖n(source) − n(run)‖, unsigned", "2 forward", "baseline", "—", signed=False),
    Method("random", "baselines:random:RandomParams", "nothing: seeded noise", "none", "baseline", "—", signed=False),
):  # fmt: skip
    METHODS.add(_row.name, _row)
