"""The cells of the golden numbers: every method × space × family × direction, and every circuit evaluation, in float64.

A cell is a name and a function that computes named tensors through the public API. Each tensor is kept as a few numbers
(`fingerprint`), which a change of any of its entries moves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from features.folders import auto_encoder_state, write_learning
from oracles.make import exact_float64
from oracles.wrapped import case, double_by_default, pairs
from torch import Tensor

import relp_cli as relp
from relp_cli.features.load import Dictionaries, load_dictionaries

FAMILIES = ("gpt2", "pythia", "qwen2", "gemma2")
DIRECTIONS = ("noising", "denoising")
KINDS = [
    "resid_pre",
    "attn_out",
    "mlp_out",
    "head",
    "query",
    "key",
    "value",
    "mlp_neuron",
    "attn_dim",
    "mlp_dim",
    "resid_dim",
]
PATCHED = KINDS[:7]
ATTENDED = [k for k in KINDS if k not in ("query", "key")]
# method → (node kinds, parameters)
ON_NODES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "act_patch": (PATCHED, {}), "atp": (KINDS, {}), "relp": (KINDS, {}), "relp+ah": (ATTENDED, {}),
    "relp+two_point": (KINDS, {}), "ig_inputs": (KINDS, {"steps": 2}), "relp_ig": (KINDS, {"steps": 2, "rule": "left"}),
    "ig_activations": (KINDS, {"steps": 2, "exact": ((1, 0),)}), "conductance": (KINDS, {"steps": 3}),
    "atp_star": (KINDS, {}), "delta": (KINDS, {}), "random": (KINDS, {}),
}  # fmt: skip
ON_EDGES: dict[str, dict[str, Any]] = {
    "edge_patch": {}, "eap": {}, "relp_edges": {}, "eap_ig": {"steps": 2}, "relp_edges_ig": {"steps": 2},
    "eap_ig_activations": {"steps": 2}, "eap_gp": {"steps": 2}, "acdc": {"tau": 0.05}, "information_flow": {},
    "clean_corrupted": {},
}  # fmt: skip
ON_FEATURES: dict[str, dict[str, Any]] = {
    "act_patch": {}, "atp": {}, "relp": {}, "ig_inputs": {"steps": 2}, "ig_activations": {"steps": 2},
}  # fmt: skip
ROLES = (("start", "S", "S", "link", "IO", "end"), ("start", "S", "S", "link", "IO", "IO+1", "end"))
NUMBERS = ["faithfulness", "completeness", "random_faithfulness", "F_M", "F_C", "F_complement", "F_empty", "n_nodes"]

Cell = Callable[[], Mapping[str, Tensor]]


def fingerprint(tensor: Tensor) -> list[float]:
    """Two weighted sums of the entries, Σ|entry|, and how many there are; NaN (a variance of one example) counts as 0."""
    x = tensor.detach().double().flatten().nan_to_num(0.0)
    i = torch.arange(len(x), dtype=torch.float64)
    return [*((x * torch.cos(k * i + 1)).sum().item() for k in (0.7, 2.3)), x.abs().sum().item(), float(len(x))]


def cells() -> dict[str, Cell]:
    """Every cell by name (`nodes/relp/gpt2/noising`)."""
    return dict(_all())


def _all() -> Iterator[tuple[str, Cell]]:
    for family in FAMILIES:
        for direction in DIRECTIONS:
            for method, (kinds, params) in ON_NODES.items():
                yield (
                    f"nodes/{method}/{family}/{direction}",
                    partial(_score, family, method, kinds, direction=direction, **params),
                )
            for method, params in ON_EDGES.items():
                if method == "acdc" and family != "gpt2":
                    continue  # a loop of exact patches, 8 seconds each
                yield (
                    f"edges/{method}/{family}/{direction}",
                    partial(_score, family, method, ["edges"], direction=direction, **params),
                )
            for method, params in ON_FEATURES.items():
                yield (f"features/{method}/{family}/{direction}",
                       partial(_score, family, method, ["feature"], direction=direction, **params))  # fmt: skip
        for baseline in ("zero", "mean"):
            yield f"nodes/relp/{family}/{baseline}", partial(_score, family, "relp", KINDS, baseline=baseline)
            yield f"edges/eap/{family}/{baseline}", partial(_score, family, "eap", ["edges"], baseline=baseline)
        yield f"features/relp/{family}/zero", partial(_score, family, "relp", ["feature"], baseline="zero")
        yield f"nodes/relp/{family}/roles", partial(_score, family, "relp", KINDS, roles=True)
        yield f"nodes/act_patch/{family}/roles", partial(_score, family, "act_patch", PATCHED, roles=True)
        yield f"edges/eap/{family}/roles", partial(_score, family, "eap", ["edges"], roles=True, positions="keep")
        yield f"features/relp/{family}/roles", partial(_score, family, "relp", ["feature"], roles=True)
        for ablation in ("mean", "mean_task", "zero", "counterfactual", "resample"):
            yield f"evaluate/nodes/{family}/{ablation}", partial(_evaluate, family, ["head", "mlp_neuron"], ablation)
            if ablation != "resample":
                yield f"evaluate/edges/{family}/{ablation}", partial(_evaluate, family, ["edges"], ablation)
                yield f"evaluate/features/{family}/{ablation}", partial(_evaluate, family, ["feature"], ablation)
        yield f"feature_edges/{family}", partial(_feature_edges, family)


@cache
def dictionaries(family: str) -> Dictionaries:
    """Random autoencoders of 12 features at every site."""
    sites = [f"{kind}_out_layer{n}" for n in range(3) for kind in ("attn", "mlp", "resid")]
    if family != "gpt2":  # whose position embeddings stand between the token embedding and the first block
        sites.insert(0, "embed")
    with tempfile.TemporaryDirectory() as root:
        for i, site in enumerate(sites):
            write_learning(Path(root) / site, auto_encoder_state(32, 12, 10 * i, bias=0.2), None)
        return load_dictionaries(root, case(family).model)


def _scores(family: str, method: str, nodes: list[str], roles: bool = False, **options: Any) -> Any:
    batches = [pairs(roles=ROLES[0]), pairs(3, 7, seed=2, roles=ROLES[1])] if roles else [case(family).batch]
    if nodes == ["feature"]:
        options["dictionary"] = dictionaries(family)
    with exact_float64(), double_by_default():
        size = 4 if method == "acdc" else 3  # one batch: a pass for every edge and batch
        return relp.score(case(family).model, batches, method, nodes, batch_size=size, keep_examples=True, **options)


def _score(*args: Any, **options: Any) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for kind, s in _scores(*args, **options).items():
        if kind == "feature":
            out |= {f"feature/{site.name}": s.dense(site) for site in s.sites}
            out |= {f"variance/{site.name}": s.dense(site, "variance") for site in s.sites}
            out |= {"errors": s.error_mean, "error_variance": s.error_variance}
        else:
            out |= {f"{kind}/mean": s.mean, f"{kind}/variance": s.variance, f"{kind}/examples": s.examples}
        out[f"{kind}/n"] = s.n
    return out


def _evaluate(family: str, nodes: list[str], ablation: str) -> dict[str, Tensor]:
    scores = _scores(family, "eap" if nodes == ["edges"] else "relp", nodes)
    circuits = [relp.select(scores, top_k=k) for k in (5, 40)]
    more = {"dictionary": dictionaries(family)} if nodes == ["feature"] else {}
    with exact_float64(), double_by_default():
        table = relp.evaluate(
            case(family).model, [pairs(5, seed=3)], circuits, ablation, 1, random_circuits=2, bootstrap=20, **more
        )
    return {name: torch.tensor(table[name].to_numpy(dtype=float)) for name in NUMBERS}


def _feature_edges(family: str) -> dict[str, Tensor]:
    circuit = relp.select(_scores(family, "relp", ["feature"]), top_k=30)
    with exact_float64(), double_by_default():
        edges = relp.feature_edges(
            case(family).model, [case(family).batch], circuit, "relp", dictionary=dictionaries(family)
        )
    return {"weight": edges.mean}
