"""How features are seen, filed and selected: the space's part of `spaces.table.Space`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.models.model import Model
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.feature_graph import EdgeColumns
from relp_cli.spaces.features import (
    ERROR,
    KIND,
    FeatureScores,
    Sites,
    feature_circuit,
    feature_masks,
    feature_nodes,
    must_count,
    sites_of,
    with_errors,
)
from relp_cli.spaces.files import expect, finite, validated
from relp_cli.spaces.paths import layer_path
from relp_cli.spaces.scores import KindScores, Scores
from relp_cli.spaces.select import choose, circuit_of
from relp_cli.spaces.sites import Site, parse_site
from relp_cli.spaces.table import Entries
from relp_cli.spaces.totals import KEEP_LIMIT
from relp_cli.spaces.units import Units


class _Features:
    file_keys = frozenset({"errors", "n_nodes", "sites", "edges"})
    count = "n_nodes"
    sparse = True
    path = staticmethod(layer_path)

    def keys(self, units: Units) -> tuple[str, ...]:
        return (KIND,)

    def view(self, scores: Scores, key: str) -> FeatureScores:
        return FeatureScores(scores)

    def table(self, scores: Scores, key: str) -> KindScores:
        def layer(values: Tensor) -> Tensor:
            return scores.dense(values).unsqueeze(-3)

        fits = scores.examples is not None and len(scores.examples) * scores.n_nodes <= KEEP_LIMIT
        return KindScores(
            key, layer(scores.mean), layer(scores.variance), scores.n, scores.labels, scores.axis,
            layer(scores.examples) if fits else None, scores.present if fits else None, scores.meta,  # type: ignore[arg-type]
        )  # fmt: skip

    def masks(self, circuit: Circuit) -> dict[str, Tensor]:
        """Every site is a kind of one layer, and its error terms another of one unit."""
        masks = feature_masks(circuit)
        features = {site.name: f[None] for site, (f, _) in masks.items()}
        return features | {f"{site.name}/error": e[None, :, None] for site, (_, e) in masks.items()}

    def names(self, units: Units, which: Sequence[int]) -> list[str]:
        blocks = [units.block_of(unit) for unit in which]
        return [f"{b.name}/{'error' if b.kind == ERROR else number}" for b, number in blocks]

    def columns(self, circuit: Circuit) -> dict[str, Any]:
        sites = {}
        for site, (mask, errors) in feature_masks(circuit).items():
            pos, unit = mask.nonzero().T.tolist()
            kept = errors.nonzero()[:, 0].tolist()
            sites[site.name] = {"n_features": mask.shape[1], "pos": pos, "feature": unit, "error_pos": kept}
        content = {"errors": sites_of(circuit.units).removed, "n_nodes": circuit.n_nodes, "sites": sites}
        return content if circuit.edges is None else {**content, "edges": finite(circuit.edges.columns())}

    def read(self, content: Mapping[str, Any], labels: tuple[str, ...], meta: Mapping[str, Any]) -> Circuit:
        masks: dict[Site, tuple[Tensor, Tensor]] = {}
        for name, columns in content["sites"].items():
            site = parse_site(name)
            if site is None or site in masks:
                raise RelpError(f"sites: '{name}' is {'no site' if site is None else 'there twice'}")
            masks[site] = validated(_SiteFile, columns, "sites", name).masks(name, len(labels))
        features, errors = ({s: pair[i] for s, pair in masks.items()} for i in (0, 1))
        circuit = feature_circuit(features, errors, labels, content["errors"], meta)
        if content.get("edges") is None:
            return circuit
        return replace(circuit, edges=validated(EdgeColumns, content["edges"], "edges").edges(feature_nodes(circuit)))

    def tensors(self, scores: Scores, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Features as (site, pos, feature) of what is not 0, error terms as tables; single examples likewise."""
        sites, units = sites_of(scores.units), scores.units
        pos, unit = scores.positions, scores.cells % len(units)
        site = torch.searchsorted(torch.tensor(units.starts), unit.contiguous(), right=True) - 1
        rows = torch.stack([site, pos, unit - torch.tensor(units.starts)[site]], 1)
        order = units.rank(pos, unit, len(scores.labels)).argsort()
        order = order[site[order] < len(sites.sites)]  # error terms stand in tables of their own
        view = FeatureScores(scores)
        tensors = {
            "index": rows[order], "mean": scores.mean[order], "variance": scores.variance[order],
            "error_mean": view.error_mean, "error_variance": view.error_variance, "n": scores.n,
        }  # fmt: skip
        if scores.examples is not None and scores.present is not None:
            examples = scores.examples[:, order]
            at = examples.nonzero()
            dense = torch.stack([scores.dense(e)[:, units.span(ERROR)].T for e in scores.examples])
            tensors |= {
                "example_index": at, "example_values": examples[tuple(at.T)], "example_errors": dense,
                "example_present": scores.present,
            }  # fmt: skip
        header = {"labels": list(scores.labels), "axis": scores.axis, "sites": [s.name for s in sites.sites],
                  "sizes": list(sites.sizes)}  # fmt: skip
        return tensors, header

    def from_tensors(self, entries: Entries, meta: Mapping[str, Any]) -> Scores:
        ((tensors, header),) = entries.values()
        nodes, at = len(tensors["index"]), (len(header["sites"]), len(header["labels"]))
        kept = tensors.get("example_values", tensors["mean"]).shape[0]
        expect(tensors, index=(None, 3), mean=(nodes,), variance=(nodes,), n=at[1:], error_mean=at, error_variance=at,
               example_index=(kept, 2), example_values=(kept,), example_errors=(None, *at),
               example_present=(None, at[1]))  # fmt: skip
        parsed = [parse_site(name) for name in header["sites"]]
        units = Sites(tuple(s for s in parsed if s), tuple(header["sizes"])).units()
        labels, starts, span = tuple(header["labels"]), torch.tensor(units.starts), units.span(ERROR)
        site, pos, feature = tensors["index"].unbind(1)
        of_features = pos * len(units) + starts[site] + feature
        of_errors = (torch.arange(len(labels)) * len(units) + torch.arange(span.start, span.stop)[:, None]).flatten()
        columns, order = torch.cat([of_features, of_errors]).sort()

        def joined(name: str) -> Tensor:
            return torch.cat([tensors[name], tensors[f"error_{name}"].flatten()])[order]

        examples = None
        if "example_values" in tensors:
            rows = tensors["example_values"].new_zeros(len(tensors["example_present"]), len(of_features))
            rows[tuple(tensors["example_index"].T)] = tensors["example_values"]
            examples = torch.cat([rows, tensors["example_errors"].flatten(1)], 1)[:, order]
        return Scores(
            units, labels, header["axis"], tensors["n"], joined("mean"), joined("variance"), columns, examples,
            tensors.get("example_present"), meta,
        )  # fmt: skip

    def hashed(self, scores: Scores) -> list[Tensor]:
        tensors, _ = self.tensors(replace(scores, examples=None), KIND)
        return [tensors[name] for name in ("index", "mean", "error_mean")]

    def select(
        self, scores: Scores, how: Mapping[str, float], options: Mapping[str, Any], errors: str = "all", **more: Any
    ) -> Circuit:
        """errors: which error terms are units (a row of ERRORS)."""
        if more:
            raise RelpError(f"--{next(iter(more))} is for edge circuits")
        must_count(sites_of(scores.units).sites, options["from_layer"])
        fewer = with_errors(scores, errors)
        circuit = circuit_of(fewer, choose(fewer, how, **options), how, **options, errors=errors)
        return replace(circuit, meta={**circuit.meta, "scores": scores.hash})

    def row(self, units: Units, unit: int, position: str) -> dict[str, Any]:
        block, number = units.block_of(unit)
        feature = None if block.kind == ERROR else number
        return {"kind": block.kind, "layer": block.name, "position": position, "unit": feature}

    def scored(self, scores: Scores, from_layer: int, errors: str = "all") -> int:
        """Most features are active in no prompt; those that are not 0."""
        fewer = with_errors(scores, errors)
        return int((fewer.dense(fewer.mean)[:, fewer.units.counted(from_layer)] != 0).sum())

    def note(self, circuit: Circuit, ablation: str) -> str:
        return ""

    def about(self, circuits: Sequence[Circuit]) -> dict[str, list[Any]]:
        return {"errors": [sites_of(c.units).removed for c in circuits]}

    def counts(self, circuit: Circuit) -> dict[str, tuple[Tensor, int]]:
        """Per kind of site, error terms counted with the features."""
        found: dict[str, list[tuple[Tensor, int]]] = {}
        sites = sites_of(circuit.units)
        for site, (features, errors) in feature_masks(circuit).items():
            possible = features.numel() + sites.has_error(site) * len(circuit.labels)
            found.setdefault(site.kind, []).append((features.sum(1) + errors, possible))
        return {kind: (torch.stack([n for n, _ in rows]), sum(p for _, p in rows)) for kind, rows in found.items()}

    def check(self, model: Model, circuit: Circuit) -> None:
        """The dictionaries are checked where they are loaded."""


class _SiteFile(BaseModel):
    """One site in a file: the kept features as columns (position, feature), and the kept errors' positions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    n_features: PositiveInt
    pos: list[NonNegativeInt]
    feature: list[NonNegativeInt]
    error_pos: list[NonNegativeInt]

    def masks(self, name: str, n_pos: int) -> tuple[Tensor, Tensor]:
        if len(self.pos) != len(self.feature):
            raise RelpError(f"sites.{name}: {len(self.pos)} positions for {len(self.feature)} features")
        if max((*self.pos, *self.error_pos), default=0) >= n_pos or max(self.feature, default=0) >= self.n_features:
            raise RelpError(f"sites.{name}: expected positions below {n_pos} and features below {self.n_features}")
        features = torch.zeros(n_pos, self.n_features, dtype=torch.bool)
        features[torch.tensor(self.pos, dtype=torch.long), torch.tensor(self.feature, dtype=torch.long)] = True
        errors = torch.zeros(n_pos, dtype=torch.bool)
        errors[torch.tensor(self.error_pos, dtype=torch.long)] = True
        return features, errors


FEATURES = _Features()
