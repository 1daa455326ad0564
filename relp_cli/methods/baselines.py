"""Baselines that use no gradient: the size of the change, and noise."""

from __future__ import annotations

import torch

from relp_cli.methods.core import differences, products
from relp_cli.methods.space import Batch
from relp_cli.methods.table import Params, Result
from relp_cli.nodes.access import units


class RandomParams(Params):
    """seed: the same seed gives the same scores for the same shapes."""

    seed: int = 0


def delta(on: Batch, _: Params) -> Result:
    """‖n(source) − n(run)‖₂ of each node."""
    d = differences(on.source, on.run)
    return Result({k: v.sqrt() for k, v in products(on.setup, d, d).items()})


def random(on: Batch, params: RandomParams) -> Result:
    """Standard normal scores, the same for every pair (a random ranking, not an average that shrinks with n)."""
    setup, scores = on.setup, {}
    for kind in setup.kinds:
        n_units = [] if kind.split == "vector" else [units(setup.model, kind)]
        layers = []
        for label in setup.labels:
            # Seeded by label: a role has the same noise in batches of every length.
            generator = torch.Generator().manual_seed(params.seed * 1_000_003 + _stable_hash(f"{kind.name}/{label}"))
            layers.append(torch.randn(setup.model.shape.n_layers, *n_units, generator=generator))
        noise = torch.stack(layers, 1).to(setup.model.device)
        scores[kind.name] = noise.expand(len(setup.batch), *noise.shape)
    return Result(scores)


def _stable_hash(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())
