"""The methods as rows. A method is one function `(setup, params) → Result`; adding one touches its file and one row here.

Every signed score estimates c(n), the change of the metric when the node is patched (METHODS.md).
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
    """Per-example scores on the slot axis, and what was done to get them (rules applied → layers)."""

    scores: PerExample
    applied: dict[str, int] = field(default_factory=dict)


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
        loaded: Any = importlib.import_module(f"relp_cli.methods.{module}")
        return getattr(loaded, function), getattr(loaded, params) if params else Params


METHODS: Registry[Method] = Registry("method")
for _row in (
    Method("act_patch", "act_patch:act_patch:ActPatchParams", "c(n), exactly", "1 forward per node", "—",
           "RelP eq. 1"),
    Method("atp", "atp:atp:", "c(n), linearised at the run", "2 forward + 1 backward", "cost", "RelP eq. 2; Nanda 2022"),
    Method("relp", "relp:relp:RelpParams", "c(n), with LRP coefficients for the gradient", "2 forward + 1 backward",
           "noisy gradients of norms, activations and gates", "RelP eq. 3", rules=True),
    Method("delta", "baselines:delta:", "‖n(source) − n(run)‖, unsigned", "2 forward", "baseline", "—", signed=False),
    Method("random", "baselines:random:RandomParams", "nothing: seeded noise", "none", "baseline", "—", signed=False),
):  # fmt: skip
    METHODS.add(_row.name, _row)
