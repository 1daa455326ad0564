"""`Scores`: what every method returns for units of any space, and its file (safetensors with a JSON header)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relp_cli.errors import unknown
from relp_cli.spaces.clusters import of_clusters
from relp_cli.spaces.files import SIGN, load_scores, save_scores, tensor_hash
from relp_cli.spaces.shown import Shown, ShownView
from relp_cli.spaces.table import SPACES, space_of
from relp_cli.spaces.units import ANY_POSITION, Units
from relp_cli.tasks.counted import distinct
from relp_cli.tasks.shared import PROMPT_OF

__all__ = ["SIGN", "KindScores", "Scores"]


def shared_prompts(meta: Mapping[str, Any]) -> Int[np.ndarray, " example"] | None:
    """Which original prompt each example is of, where some share one (`tasks.shared`); None: each has its own."""
    return np.array(meta[PROMPT_OF]) if PROMPT_OF in meta else None


def support_sign(meta: Mapping[str, Any]) -> int:
    """What scores are multiplied by so that support of the behaviour is positive: −1 for signed noising scores."""
    return -1 if meta.get("signed", True) and meta.get("direction", "noising") == "noising" else 1


@dataclass(frozen=True, repr=False)
class KindScores(ShownView):
    """Scores of one kind as a table.

    mean, variance: Float[layer, pos, *unit] over examples (variance as in Scores).
    n:              Int[pos], examples that have this position (roles may differ between templates).
    labels:         one label per position; `axis` is "position" (all pairs share one token length and its roles) or
                    "role" (pairs of several lengths, aligned by role).
    examples:       Float[example, layer, pos, *unit] or None; `present`: Bool[example, pos] says where it is defined.
    """

    kind: str
    mean: Float[Tensor, "layer pos *unit"]
    variance: Float[Tensor, "layer pos *unit"]
    n: Int[Tensor, " pos"]
    labels: tuple[str, ...]
    axis: str
    examples: Float[Tensor, "example layer pos *unit"] | None = None
    present: Bool[Tensor, "example pos"] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_nodes(self) -> int:
        return self.mean.numel()

    @property
    def prompts(self) -> Int[np.ndarray, " example"] | None:
        return shared_prompts(self.meta)

    @property
    def whole(self) -> Scores:
        """The same numbers as scores of units."""
        return whole_of({self.kind: self}, self.meta)


@dataclass(frozen=True, repr=False)
class Scores(Shown, Mapping[str, Any]):
    """Scores of units at positions. A *cell* is one unit at one position: number position · len(units) + unit.

    units:          what was scored. labels, axis, n: the positions, as in KindScores (edges without positions: "*", "all").
    mean, variance: Float[column] over examples (variance unbiased, NaN where n = 1; where examples share prompts the one whose
                    n-th part is the squared standard error of the mean, robust to that: `clusters`).
    columns:        Int[column], the cells that are not 0 in every example; None: all of them.
    examples:       Float[example, column], what `mean` averages, or None where it was not kept.
    present:        Bool[example, pos], which examples have which positions.

    As a mapping: the space's own views of the same numbers, by kind (`scores["mlp_out"].mean`).
    """

    units: Units
    labels: tuple[str, ...]
    axis: str
    n: Int[Tensor, " pos"]
    mean: Float[Tensor, " column"]
    variance: Float[Tensor, " column"]
    columns: Int[Tensor, " column"] | None = None
    examples: Float[Tensor, "example column"] | None = None
    present: Bool[Tensor, "example pos"] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, kind: str) -> Any:
        if kind not in self:
            raise unknown("node kind in these scores", kind, list(self))
        return space_of(self.units).view(self, kind)

    def __contains__(self, kind: object) -> bool:
        return kind in space_of(self.units).keys(self.units)

    def __iter__(self) -> Iterator[str]:
        return iter(space_of(self.units).keys(self.units))

    def __len__(self) -> int:
        return len(space_of(self.units).keys(self.units))

    @property
    def prompts(self) -> Int[np.ndarray, " example"] | None:
        """The original prompt of each example, where some share one; None: each has its own."""
        return shared_prompts(self.meta)

    @property
    def whole(self) -> Scores:
        """Itself: what a view leads back to."""
        return self

    @property
    def n_nodes(self) -> int:
        return len(self.labels) * len(self.units)

    @property
    def cells(self) -> Int[Tensor, " column"]:
        """Every column's cell."""
        return torch.arange(self.n_nodes) if self.columns is None else self.columns

    @property
    def positions(self) -> Int[Tensor, " column"]:
        """Every column's position."""
        return self.cells // len(self.units)

    def dense(self, values: Float[Tensor, "*example column"]) -> Float[Tensor, "*example pos unit"]:
        """One number per cell from one per column, 0 elsewhere."""
        shape = (len(self.labels), len(self.units))
        if self.columns is None:
            return values.unflatten(-1, shape)
        out = values.new_zeros(*values.shape[:-1], self.n_nodes)
        out[..., self.columns] = values
        return out.unflatten(-1, shape)

    @property
    def shares(self) -> Float[Tensor, " pos"]:
        """The share of the pairs that has each position, float64: what a mean there counts for in a sum over positions."""
        if self.labels == ANY_POSITION:
            return torch.ones(1, dtype=torch.float64)
        return self.n.double() / int(self.meta.get("n_pairs", self.n.max()))

    def summed(self, values: Float[Tensor, " column"]) -> Float[Tensor, " unit"]:
        """Means → per unit the mean over pairs of the sum over their positions, float64: pairs need not have the same ones."""
        return (self.dense(values.double()) * self.shares[:, None]).sum(0)

    def table(self, kind: str) -> KindScores:
        """One kind as a table for what ranks and correlates; edges and features as the units of one layer."""
        return space_of(self.units).table(self, kind)

    def restricted(self, units: Units, kept: Bool[Tensor, " unit"]) -> Scores:
        """The scores of some units, which are `units`."""
        position, unit = self.positions, self.cells % len(self.units)
        chosen = kept[unit]
        columns = None
        if self.columns is not None:
            columns = (position * len(units) + kept.cumsum(0)[unit] - 1)[chosen]
        examples = None if self.examples is None else self.examples[:, chosen]
        return replace(
            self,
            units=units,
            mean=self.mean[chosen],
            variance=self.variance[chosen],
            columns=columns,
            examples=examples,
        )

    def only(self, kinds: Sequence[str]) -> Scores:
        """The scores of some of the kinds that they are looked up by."""
        for kind in kinds:
            if kind not in self:
                raise unknown("node kind in these scores", kind, list(self))
        if set(kinds) == set(self):
            return self
        kept = torch.zeros(len(self.units), dtype=torch.bool)
        for kind in kinds:
            kept[self.units.span(kind)] = True
        return self.restricted(self.units.only(kinds), kept)

    def weighed(self, weights: Float[Tensor, " example"]) -> Scores:
        """With each example counted `weights` times, without variances: one draw of a bootstrap. Needs single examples."""
        assert self.examples is not None
        assert self.present is not None
        count = (weights[:, None] * self.present).sum(0)
        mean = (weights.to(self.examples.dtype) @ self.examples / count.clamp(min=1)[self.positions]).double()
        drawn = weights > 0  # what a union over examples looks at
        meta = {**self.meta, "n_pairs": int(weights @ self.present.any(1).to(weights))}
        return replace(
            self, mean=mean, n=count.long(), examples=self.examples[drawn], present=self.present[drawn], meta=meta
        )

    def among(self, rows: Bool[Tensor, " example"]) -> Scores:
        """Over some of the examples; 0 at positions that none of them has. Needs single examples."""
        assert self.examples is not None
        assert self.present is not None
        examples, present = self.examples[rows], self.present[rows]
        n, at = present.sum(0), self.positions
        values = examples.double()
        mean = values.sum(0) / n[at].clamp(min=1)
        variance = ((values - mean).square() * present[:, at]).sum(0) / (n[at] - 1).clamp(min=0)
        meta = {**self.meta, "n_pairs": int(present.any(1).sum())}
        if (prompts := self.prompts) is not None:
            prompts = np.unique(prompts[rows.numpy()], return_inverse=True)[1]
            meta = {**{k: v for k, v in meta.items() if k != PROMPT_OF}, "n_prompts": distinct(prompts)}
            if distinct(prompts) < len(prompts):
                meta[PROMPT_OF] = prompts.tolist()
                variance = torch.maximum(variance, of_clusters(values, present, at, prompts))
        return replace(self, mean=mean, variance=variance, n=n, examples=examples, present=present, meta=meta)

    @property
    def hash(self) -> str:
        """What ties a circuit to the scores that it was selected from."""
        return tensor_hash(*space_of(self.units).hashed(self))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically. Tensors are named `kind/mean`; the header is `metadata()['relp']`."""
        save_scores(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote. Raises RunFailed for a file that is missing, truncated or of another schema."""
        return load_scores(path)


def whole_of(views: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> Scores:
    """One Scores from views of one space: a view of edges or features alone, or tables of several node kinds.

    Raises: RelpError for tables of different position axes.
    """
    first = next(iter(views.values()))
    if len(views) == 1 and not hasattr(first, "kind"):
        return first.whole
    nodes: Any = SPACES["nodes"].load()
    scores: Scores = nodes.joined(views, first.meta if meta is None else meta)
    return scores
