"""Exact patching of features: x + δf_j·W_dec[j] in place of x, for one feature at a time, everything downstream recomputed.

A feature that is the same in both runs has effect 0 without a run, and most are 0 in both: the cost is one forward pass over
one prompt per (example, position, feature) with δf ≠ 0, and per (example, position) for the error term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relp_cli.features.dictionary import Dictionary
from relp_cli.methods.patching import effects
from relp_cli.methods.room import fitting
from relp_cli.methods.setup import Setup
from relp_cli.methods.space import added
from relp_cli.precision import wide
from relp_cli.spaces.sites import Site


def patch_features(
    setup: Setup, site: Site, d: Dictionary, delta_f: Tensor, delta_e: Tensor, chunk_tokens: int
) -> tuple[Tensor, Tensor, int]:
    """Effects Float[batch, slot, feature] of features, Float[batch, slot] of the error term, and the number of runs.

    delta_f: Float[batch, pos, feature], delta_e: Float[batch, pos, d_model]; positions of one label are patched jointly.
    """
    slots, n_slots = setup.slots, len(setup.labels)
    by_slot = (slots[None] == torch.arange(n_slots, device=slots.device)[:, None]).to(delta_f.dtype)  # [slot, pos]
    active = torch.einsum("sp,bpf->bsf", by_slot, (delta_f != 0).to(delta_f.dtype)).nonzero()
    moved = torch.einsum("sp,bpd->bsd", by_slot, (delta_e != 0).to(delta_e.dtype)).sum(-1).nonzero()
    features = delta_f.new_zeros(len(delta_f), n_slots, d.n_features)
    errors = delta_f.new_zeros(len(delta_f), n_slots)
    size = fitting(setup.batch.n_pos, chunk_tokens)
    for part in active.split(size) if len(active) else ():
        example, slot, unit = part.unbind(1)
        change = (delta_f[example, :, unit] * by_slot[slot])[..., None] * wide(d.w_dec[unit])[:, None]
        features[example, slot, unit] = effects(setup, added({site.point: change}), example)
    for part in moved.split(size) if len(moved) else ():
        example, slot = part.unbind(1)
        change = delta_e[example] * by_slot[slot][..., None]
        errors[example, slot] = effects(setup, added({site.point: change}), example)
    return features, errors, len(active) + len(moved)
