"""In what precision numbers are summed: a model may run in bfloat16 or float16, what is computed from it may not."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(value: Tensor) -> Tensor:
    """The value in float32 at least (float64 stays): half precisions keep 8 or 11 bits, which a sum soon uses up."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
