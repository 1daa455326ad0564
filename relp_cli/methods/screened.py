"""`screened`: nodes that cheap estimates call large are patched exactly, the others keep an estimate scaled by the slope seen.

1. AtP, RelP and `relp+secant` estimate every node, averaged over all pairs.
2. Per node kind, the exact share (`budget`) of the nodes that the patch changes: those of the first ranks of each, in turn.
3. As many again as `audit` says, drawn at random among the others, are patched exactly too: what they turn out to be, beside
   their estimate, says what may have been missed in the rest.
4. The rest: `relp+secant`'s estimate times Σ exact·estimate / Σ estimate² over the nodes of step 2.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.lrp.rules import RULE_SETS
from relp_cli.methods.nodes import NodeBatch
from relp_cli.methods.patching import patch_nodes
from relp_cli.methods.points import RelpParams, relp
from relp_cli.methods.score import position_axis, with_extra_rules
from relp_cli.methods.space import Point
from relp_cli.methods.table import Params, Result
from relp_cli.nodes.kinds import NODE_KINDS

BASE = "secant"


class ScreenedParams(Params):
    """budget: share of each kind's nodes that are patched exactly. audit: of that number, how many more at random; seed draws
    them. chunk_tokens: how many tokens one pass may hold (None: `Room`).
    """

    budget: float = Field(default=0.2, gt=0, le=1)
    audit: float = Field(default=0.1, ge=0, le=1)
    seed: int = Field(default=0, ge=0)
    chunk_tokens: int | None = Field(default=None, gt=0)


Values = dict[str, Tensor]  # node kind → Float[batch, layer, slot, unit]


def screened(batches: Sequence[NodeBatch], params: ScreenedParams) -> list[Result]:
    """Cost: three estimates, and a forward pass per node that is patched exactly."""
    estimates = [_estimates(on) for on in batches]
    _, labels = position_axis([on.setup.batch for on in batches])
    slots = [torch.tensor([labels.index(label) for label in on.labels]) for on in batches]
    kinds = [kind.name for kind in batches[0].setup.kinds]
    means = {
        kind: {m: _mean([e[m][kind] for e in estimates], slots, len(labels)) for m in estimates[0]} for kind in kinds
    }
    chosen = {kind: choose(means[kind], params) for kind in kinds}
    patched = {kind: top | drawn for kind, (top, drawn) in chosen.items()}
    exact = [_exact(on, {k: m[:, slot] for k, m in patched.items()}) for on, slot in zip(batches, slots, strict=True)]
    about, slopes = {}, {}
    for kind, (top, drawn) in chosen.items():
        known, base = _mean([e[kind] for e in exact], slots, len(labels)), means[kind][BASE]
        slopes[kind] = ((known * base)[top].sum() / base[top].square().sum()).nan_to_num(1.0).item()
        error = (known - slopes[kind] * base)[drawn].abs()
        about[kind] = {
            "exact": int(patched[kind].sum()), "of": int(_alive(means[kind]).sum()), "slope": slopes[kind],
            "audited": len(error), "audit_largest_error": error.max().item() if len(error) else None,
            "audit_95%": error.quantile(0.95).item() if len(error) else None, "patched": pack(patched[kind]),
        }  # fmt: skip
    results = []
    for on, slot, estimate, values in zip(batches, slots, estimates, exact, strict=True):
        scores = {
            kind: torch.where(patched[kind][:, slot].to(value.device), value, slopes[kind] * estimate[BASE][kind])
            for kind, value in values.items()
        }
        scores = {k: v[..., 0] if NODE_KINDS[k].split == "vector" else v for k, v in scores.items()}
        results.append(Result(scores, meta={**on.meta, "screened": about}))
    return results


def choose(
    means: Mapping[str, Float[Tensor, "layer label unit"]], params: ScreenedParams
) -> tuple[Bool[Tensor, "layer label unit"], Bool[Tensor, "layer label unit"]]:
    """The nodes of the first ranks of every estimate in turn, and the others that are drawn to audit them."""
    alive = _alive(means).cpu()
    n_alive = int(alive.sum())
    if not n_alive:
        raise RelpError("screened: the patch changes no node of these kinds")
    wanted = -(-n_alive * params.budget // 1)
    orders = torch.stack([m.abs().cpu().flatten().argsort(descending=True) for m in means.values()], 1).flatten()
    first = list(dict.fromkeys(orders.tolist()))[: int(wanted)]
    top = torch.zeros(alive.numel(), dtype=torch.bool)
    top[first] = True
    rest = (alive.flatten() & ~top).nonzero()[:, 0].numpy()
    drawn = torch.zeros_like(top)
    count = min(len(rest), max(int(params.audit > 0), round(params.audit * len(first))))
    drawn[torch.from_numpy(np.random.default_rng(params.seed).permutation(rest)[:count])] = True
    return top.view(alive.shape), drawn.view(alive.shape)


def pack(mask: Tensor) -> str:
    """Bool[layer, label, unit] in row-major order, eight to a byte, in base64."""
    return base64.b64encode(np.packbits(mask.cpu().numpy()).tobytes()).decode()


def unpack(text: str, shape: Sequence[int]) -> Tensor:
    """The mask that `pack` wrote."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=int(np.prod(shape)))
    return torch.from_numpy(bits.astype(bool)).view(*shape)


def _estimates(on: NodeBatch) -> dict[str, Values]:
    """Per method, with a unit axis throughout."""
    rules, base = with_extra_rules(on.model, on.model.family.rules, [BASE]), RULE_SETS[BASE]
    secant = RelpParams(rules=rules, endpoints=base.endpoints, blend=base.blend)
    points: list[tuple[str, Iterable[Point]]] = [
        ("atp", [Point()]), ("relp", relp(on, RelpParams())), (BASE, relp(on, secant)),
    ]  # fmt: skip
    found = {name: dict(on.attribute(made).scores) for name, made in points}
    vectors = {kind.name for kind in on.setup.kinds if kind.split == "vector"}
    return {name: {k: v[..., None] if k in vectors else v for k, v in s.items()} for name, s in found.items()}


def _alive(means: Mapping[str, Tensor]) -> Tensor:
    """Nodes that some estimate is not 0 for: the patch changes the others on no pair."""
    return torch.stack(list(means.values())).ne(0).any(0)


def _mean(values: Sequence[Tensor], slots: Sequence[Tensor], n_labels: int) -> Float[Tensor, "layer label unit"]:
    """Over the pairs that have a label, in float64."""
    layers, units = values[0].shape[1], values[0].shape[3]
    total = torch.zeros(layers, n_labels, units, dtype=torch.float64)
    count = torch.zeros(n_labels, dtype=torch.float64)
    for value, slot in zip(values, slots, strict=True):
        total.index_add_(1, slot, value.double().sum(0).cpu())
        count.index_add_(0, slot, torch.full((len(slot),), float(len(value)), dtype=torch.float64))
    return total / count[:, None]


def _exact(on: NodeBatch, masks: Mapping[str, Bool[Tensor, "layer slot unit"]]) -> Values:
    """Exact effects of the masked nodes, 0 elsewhere."""
    wanted = {
        (kind, n): nodes[None].expand(len(on), -1, -1) for kind, mask in masks.items() for n, nodes in enumerate(mask)
    }
    found = patch_nodes(on.setup, on.source, wanted, on.room.patched, on.tick)
    return {kind: torch.stack([found[kind, n] for n in range(len(mask))], 1) for kind, mask in masks.items()}
