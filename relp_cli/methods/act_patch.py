"""Activation patching (RelP eq. 1), exactly: run with n(source) in place of n(run), one forward pass per node."""

from __future__ import annotations

from pydantic import Field

from relp_cli.methods.space import Batch
from relp_cli.methods.table import Params, Result


class ActPatchParams(Params):
    """chunk_tokens: how many tokens one forward pass may hold (units are patched in parallel rows; None: `Room`)."""

    chunk_tokens: int | None = Field(default=None, gt=0)


def act_patch(on: Batch, _: ActPatchParams) -> Result:
    """Patch every unit on its own; positions that share a label are patched jointly."""
    return on.patch()
