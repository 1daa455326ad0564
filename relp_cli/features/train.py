"""Training sparse autoencoders on a model's activations: TopK (Gao et al. 2024) and standard (ReLU with an L1 penalty).

1. One run over the text collects x at every site (the BOS position apart), and what the site adds on average.
2. Each site is trained on its own with Adam on x / s, s the root mean square of x − mean(x); decoder rows keep norm 1.
3. s is folded into the biases, so the saved dictionary reads plain activations.
4. Reported on held-out lines: L0, fraction of variance explained, features that never fire, and the loss recovered:
   (H(mean) − H(x̂)) / (H(mean) − H(x)), H the next-token cross-entropy with the site at its mean, at x̂, or as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from torch import Tensor
from torch.nn.functional import cross_entropy

from relp_cli import MOST_SEED
from relp_cli.errors import RelpError, RunFailed
from relp_cli.features.dictionary import Dictionary
from relp_cli.models.model import Hook, Model
from relp_cli.nodes.access import capture
from relp_cli.spaces.sites import Site

HELDOUT = 10  # every 10th line is held out


class TrainSpec(BaseModel):
    """architecture: topk or standard; features: dictionary size; k: active features (topk); l1: penalty (standard)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: Literal["topk", "standard"] = "topk"
    features: int = Field(default=512, ge=2, le=1 << 20)
    k: int = Field(default=8, ge=1)
    l1: FiniteFloat = Field(default=0.05, ge=0)
    steps: int = Field(default=2000, ge=1)
    batch: int = Field(default=512, ge=1, le=1 << 20)
    lr: FiniteFloat = Field(default=2e-3, gt=0)
    seed: int = Field(default=0, ge=0, le=MOST_SEED)

    @classmethod
    def of(cls, **settings: Any) -> TrainSpec:
        """Raises RelpError in one line, naming the option, for a value that cannot be."""
        try:
            spec = cls(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            raise RelpError(f"--{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from error
        spec.check()
        return spec

    def check(self) -> None:
        """Raises RelpError for k above the number of features."""
        if self.architecture == "topk" and self.k > self.features:
            raise RelpError(f"k = {self.k} is more than {self.features} features")


@dataclass(frozen=True)
class Quality:
    """Measured on held-out lines: mean active features, variance explained, share of features that fire, loss recovered."""

    l0: float
    variance_explained: float
    alive: float
    loss_recovered: float

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Text:
    """Token rows of equal length together, for training and held out: Int[rows, pos] each. skip: BOS positions left out."""

    train: tuple[Int[Tensor, "_ _"], ...]
    heldout: tuple[Int[Tensor, "_ _"], ...]
    skip: int

    @property
    def n_train(self) -> int:
        """Positions to train on."""
        return sum(rows[:, self.skip :].numel() for rows in self.train)

    @classmethod
    def of(cls, model: Model, lines: Sequence[str]) -> Text:
        """Raises RelpError for a model without a tokenizer, for fewer than 20 lines of two tokens or more, and for a line that
        is longer than the model reads.
        """
        if model.tokenizer is None:
            raise RelpError(f"model {model.name} has no tokenizer to read text with")
        rows = []
        most = getattr(model.hf.config, "max_position_embeddings", None)
        for line in lines:
            ids = model.tokenizer(line, add_special_tokens=False)["input_ids"]
            row = model.with_bos(ids)
            if most is not None and len(row) > most:
                raise RelpError(f"a line of the text has {len(row)} tokens, and model {model.name} reads at most {most}: "
                                f"{line[:40]!r}…")  # fmt: skip
            if len(ids) > 1:
                rows.append(row)
        enough(len(rows), " of two tokens or more")
        parts = [[row for i, row in enumerate(rows) if (i % HELDOUT == 0) is held] for held in (False, True)]
        train, heldout = (_by_length(part, model.device) for part in parts)
        return cls(train, heldout, int(model.bos is not None))


def enough(lines: int, of: str = "") -> None:
    """Raises RelpError for too few lines of text, of which every tenth is held out."""
    if lines < 2 * HELDOUT:
        raise RelpError(f"training needs at least {2 * HELDOUT} lines of text{of}, got {lines}")


def _by_length(rows: list[list[int]], device: torch.device, most: int = 256) -> tuple[Tensor, ...]:
    lengths = sorted({len(row) for row in rows})
    stacked = [torch.tensor([row for row in rows if len(row) == n], device=device) for n in lengths]
    return tuple(part for whole in stacked for part in whole.split(most))


@torch.no_grad()
def activations_at(model: Model, batches: Sequence[Tensor], sites: Sequence[Site], skip: int) -> dict[Site, Tensor]:
    """Every site's activations at all positions but the first `skip`: Float[tokens, d_model]."""
    kinds = tuple(dict.fromkeys(site.node_kind for site in sites))
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for tokens in batches:
        with capture(model, kinds) as seen:
            model.logits(tokens)
        for site in sites:
            parts[site].append(seen[site.node_kind.name][site.at][:, skip:].flatten(0, 1).float())
    return {site: torch.cat(xs) for site, xs in parts.items()}


def train_dictionary(
    x: Float[Tensor, "tokens d_model"], spec: TrainSpec, report: Callable[[int], None] | None = None
) -> Dictionary:
    """One dictionary. The same seed and activations give the same weights.

    Raises: RelpError for k above the number of features and for activations that do not vary, RunFailed for ones that are
    not finite.
    """
    spec.check()
    if not x.isfinite().all():
        raise RunFailed("these activations are not finite; nothing can be learnt from them")
    mean = x.mean(0)
    scale = (x - mean).square().mean().sqrt()
    if not scale > 0:
        raise RelpError("these activations do not vary; nothing to learn")
    x = x / scale
    generator = torch.Generator().manual_seed(spec.seed)
    w_dec = torch.nn.functional.normalize(torch.randn(spec.features, x.shape[1], generator=generator), dim=1).to(
        x.device
    )
    weights: dict[str, Any] = {
        "w_enc": w_dec.T.clone(),
        "b_enc": torch.zeros(spec.features, device=x.device),
        "w_dec": w_dec,
        "b_dec": x.mean(0),
    }
    for tensor in weights.values():
        tensor.requires_grad_(True)
    adam = torch.optim.Adam(weights.values(), lr=spec.lr, betas=(0.9, 0.99))
    form, k = ("topk", spec.k) if spec.architecture == "topk" else ("relu", None)
    idle = torch.zeros(spec.features, device=x.device)
    with torch.enable_grad():
        for step in range(spec.steps):
            adam.param_groups[0]["lr"] = spec.lr * min(1.0, (step + 1) / 50, 5 * (spec.steps - step) / spec.steps)
            rows = x[torch.randint(len(x), (spec.batch,), generator=generator).to(x.device)]
            d = Dictionary(form, "", **weights, b_in=weights["b_dec"], k=k)
            f = d.encode(rows)
            rest = rows - d.decode(f)
            loss = rest.square().mean()
            if spec.architecture == "standard":
                loss = loss + spec.l1 * f.sum(-1).mean() / rows.shape[1] ** 0.5
            else:
                idle = torch.where((f > 0).any(0), torch.zeros_like(idle), idle + 1)
                loss = loss + _dead_loss(d, rows, rest.detach(), idle > 100) / 32
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                weights["w_dec"].copy_(torch.nn.functional.normalize(weights["w_dec"], dim=1))
            if report:
                report(step + 1)
    plain: dict[str, Any] = {
        name: t.detach() * (scale if name in ("b_enc", "b_dec") else 1) for name, t in weights.items()
    }
    return Dictionary(form, f"SAELens {spec.architecture}", **plain, b_in=plain["b_dec"], k=k)


def _dead_loss(d: Dictionary, rows: Tensor, rest: Tensor, dead: Tensor, most: int = 32) -> Tensor:
    """What idle features leave of the residual when the best of them are let through (Gao et al.'s auxiliary loss)."""
    if not dead.any():
        return rest.new_zeros(())
    pre = ((rows - d.b_in) @ d.w_enc + d.b_enc).masked_fill(~dead, -torch.inf)
    best = pre.topk(min(most, int(dead.sum())), dim=-1)
    f = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    return (rest - f @ d.w_dec).square().mean()


@torch.no_grad()
def quality(model: Model, site: Site, d: Dictionary, text: Text) -> Quality:
    """What a dictionary keeps of its site, on the held-out lines."""
    x = activations_at(model, text.heldout, [site], text.skip)[site]
    d32 = d.to(x.device, x.dtype)
    f = d32.encode(x)
    mean = x.mean(0)
    explained = 1 - (x - d32.decode(f)).square().sum() / (x - mean).square().sum()
    mine = d.to(model.device, model.dtype)

    def hooked(fn: Callable[[Tensor], Tensor]) -> dict[str, Hook]:
        return {site.point: lambda v: torch.cat([v[:, : text.skip], fn(v[:, text.skip :]).to(v.dtype)], 1)}

    whole = _entropy(model, text, {})
    coded = _entropy(model, text, hooked(lambda v: mine.decode(mine.encode(v))))
    gone = _entropy(model, text, hooked(lambda v: mean.expand_as(v)))
    recovered = (gone - coded) / (gone - whole) if gone != whole else float("nan")
    return Quality(
        (f > 0).float().sum(-1).mean().item(), explained.item(), (f > 0).any(0).float().mean().item(), recovered
    )


def _entropy(model: Model, text: Text, hooks: dict[str, Hook]) -> float:
    """Mean next-token cross-entropy on the held-out lines."""
    total, count = 0.0, 0
    for tokens in text.heldout:
        with model.hooks(hooks):
            logits = model.logits(tokens, all_positions=True)[:, :-1]
        total += cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum").item()
        count += tokens[:, 1:].numel()
    return total / count
