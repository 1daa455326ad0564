"""Random models of every shape in relp's wrapper, beside the weights that the oracle reads; shared prompt pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from relp_cli.models.load import wrap
from relp_cli.models.model import Model
from relp_cli.scoring import score
from relp_cli.spaces.scores import Scores
from relp_cli.tasks.pairs import PairBatch

from . import scores as oracle
from .make import exact_float64, random_model

GATED = ("qwen2", "llama", "gemma2")
TOL = 1e-9


@dataclass(frozen=True, eq=False)
class Case:
    """A relp Model, the same weights for the oracle, 4 pairs of 6 tokens, and the oracle's logit difference on them."""

    model: Model
    weights: dict[str, Tensor]
    config: Any
    batch: PairBatch
    metric: oracle.Metric

    @property
    def prompts(self) -> tuple[dict[str, Tensor], Any, Tensor, Tensor]:
        """What every oracle function takes first."""
        assert self.batch.patch is not None
        return self.weights, self.config, self.batch.original, self.batch.patch


@cache
def case(shape: str, bias: bool = True, dtype: torch.dtype = torch.float64, layers: int = 3) -> Case:
    """In a narrower dtype the oracle keeps the float64 weights."""
    with exact_float64():
        hf = random_model(shape, 0, bias, layers)
        weights = {k: v.clone() for k, v in hf.state_dict().items()}
        model = wrap(hf, None, shape) if dtype == torch.float64 else None
    if model is None:  # anew, so that the rotary tables have the precision that Hugging Face gives them
        narrow = AutoModelForCausalLM.from_config(hf.config, dtype=dtype, attn_implementation="eager")
        narrow.load_state_dict(weights)
        model = wrap(narrow, None, shape)
    batch = pairs()
    return Case(model, weights, hf.config, batch, oracle.logit_diff(batch.answer[:, 0], batch.foil[:, 0]))


def pairs(n: int = 4, pos: int = 6, seed: int = 1, roles: tuple[str, ...] | None = None) -> PairBatch:
    """Random pairs that differ at positions 1 and later."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (2, n, pos), generator=rng)
    ids[1, :, 0] = ids[0, :, 0]
    answer = torch.randint(50, (n,), generator=rng)
    return PairBatch(original=ids[0], patch=ids[1], answer=answer, foil=(answer + 7) % 50, roles=roles)


def run(case: Case, method: str, kinds: Any = oracle.KINDS, batches: Any = None, **options: Any) -> Scores:
    """`score` in float64 throughout, per-example scores included."""
    batches = [case.batch] if batches is None else batches
    with exact_float64(), double_by_default():
        return score(case.model, batches, method, kinds, **options)


@contextmanager
def double_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)  # not torch.float32, which is another within exact_float64


def hook_count(model: Model) -> int:
    """All hooks of any sort on any module that the model, its bridge, or its hook points own."""
    modules = {id(m): m for root in (model.hf, model.bridge, *model.points.values()) for m in root.modules()}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, k)) for m in modules.values() for k in kinds)


def close(got: Tensor, want: Tensor, tol: float = TOL) -> None:
    """`assert_close`, which costs as much as a small model's pass, called where it has something to say."""
    want = want.to(got.dtype)
    if got.shape != want.shape or not torch.allclose(got, want, rtol=tol, atol=tol):
        torch.testing.assert_close(got, want, rtol=tol, atol=tol)
