"""One batch of pairs made ready for scoring: which prompt runs, what is patched into it, and on which position axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.models.model import Hook, Model
from relp_cli.models.resume import Trace, record, way_of
from relp_cli.nodes.access import EMBEDDED, Activations, capture
from relp_cli.nodes.kinds import NodeKind
from relp_cli.tasks.formulas import SEVERAL
from relp_cli.tasks.metrics import Metric
from relp_cli.tasks.pairs import PairBatch

Direction = Literal["noising", "denoising"]
Baseline = Literal["patch", "zero", "mean"]
Means = Mapping[str, list[Tensor]]  # node kind → one Float[pos, width] per layer


@dataclass
class Passes:
    """Forward and backward passes spent on a batch, in units of one pass over one pair.

    patched: runs with a patch, on top of these, and of single pairs: how many there are depends on the pair. computed: what was
    computed for them, in whole runs. no_effect: how many of them ended in the run's own L, to the last bit. seconds: what other
    processes took for what was taken from them.
    """

    forward: float = 0.0
    backward: float = 0.0
    patched: int = 0
    computed: float = 0.0
    no_effect: int = 0
    seconds: float = 0.0

    def add(self, other: Passes) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Setup:
    """`run` is the prompt that is run and differentiated, `source` gives the values patched into it.

    noising (eq. 1):  run = original, source = patch;   c(n)     = L(x_o | n ← n(x_p)) − L(x_o)
    denoising:        run = patch,    source = original; c_den(n) = L(x_p | n ← n(x_o)) − L(x_p)
    With a baseline, source values are zeros or given means and no second prompt is needed.

    labels: the distinct position labels of this batch, in order; the `slot` axis of per-example scores.
    """

    model: Model
    batch: PairBatch
    metric: Metric
    kinds: tuple[NodeKind, ...]
    direction: Direction = "noising"
    baseline: Baseline = "patch"
    means: Means | None = None
    passes: Passes = field(default_factory=Passes)
    seen: dict[str, Tensor] = field(default_factory=dict)  # "run", "source": L of a prompt that a pass has already run
    inputs: dict[str, Tensor] = field(
        default_factory=dict
    )  # the same: what the first block reads, Float[batch, pos, d]

    def __post_init__(self) -> None:
        if self.batch.several:
            raise RelpError(SEVERAL)
        if self.batch.patch is None and (self.baseline == "patch" or self.direction == "denoising"):
            raise RelpError("these prompts have no patch prompt: use --baseline zero or mean (noising), or give pairs")
        if self.baseline != "patch" and self.direction == "denoising":
            raise RelpError(f"baseline '{self.baseline}' replaces the patch prompt; it has no denoising direction")
        if self.baseline == "mean" and self.means is None:
            raise RelpError("baseline 'mean' needs the mean activations")
        _ = self._reference  # now: inside a capture or under rules its own forward pass would be hooked as well

    @property
    def run(self) -> Int[Tensor, "batch pos"]:
        return self.batch.original if self.direction == "noising" else self._patch

    @property
    def source(self) -> Int[Tensor, "batch pos"]:
        return self._patch if self.direction == "noising" else self.batch.original

    @property
    def _patch(self) -> Tensor:
        assert self.batch.patch is not None  # checked in __post_init__ wherever it is read
        return self.batch.patch

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.batch.labels))

    @cached_property
    def slots(self) -> Int[Tensor, " pos"]:
        """Position → index into `labels`. Positions that share a label share a slot."""
        index = {label: i for i, label in enumerate(self.labels)}
        return torch.tensor([index[label] for label in self.batch.labels], device=self.model.device)

    def to_slots(self, values: Float[Tensor, "batch layer pos *unit"]) -> Float[Tensor, "batch layer slot *unit"]:
        """Sum positions that share a label (a gradient score of several positions patched jointly is their sum)."""
        if len(self.labels) == self.batch.n_pos:
            return values
        out = values.new_zeros(*values.shape[:2], len(self.labels), *values.shape[3:])
        return out.index_add_(2, self.slots, values)

    def any_of_slots(self, values: Bool[Tensor, "pos unit"]) -> Bool[Tensor, "slot unit"]:
        """Whether it holds at some of the positions that share a label."""
        out = torch.zeros(len(self.labels), values.shape[1], device=values.device)
        return out.index_add_(0, self.slots, values.to(out.dtype)) > 0

    @cached_property
    def _reference(self) -> Tensor | None:
        if not self.metric.zero_grad_at_original:
            return None
        self.passes.forward += 1
        with torch.no_grad():
            return self.model.logits(self.batch.original)

    def value(
        self, logits: Float[Tensor, "rows *read vocab"], pairs: Int[Tensor, " rows"] | None = None
    ) -> Float[Tensor, " rows"]:
        """The metric L per row; rows are this batch's pairs, repeated as often as needed, or those that `pairs` numbers."""
        if pairs is None:
            pairs = torch.arange(len(self.batch), device=logits.device).repeat(logits.shape[0] // len(self.batch))
        reference = None if self._reference is None else self._reference[pairs]
        return self.metric.fn(logits, self.batch.answer[pairs], self.batch.foil[pairs], reference)

    def prompt_value(self, prompt: Literal["run", "source"]) -> Float[Tensor, " batch"]:
        """L of the unpatched run or of the source prompt; a forward pass only where none has been spent on it yet."""
        if prompt not in self.seen:
            self.passes.forward += 1
            with torch.no_grad():
                self.seen[prompt] = self.value(self.model.logits(getattr(self, prompt)))
        return self.seen[prompt]

    def source_activations(self, run: Activations | None = None) -> Activations:
        """n(source) for every kind: Float[batch, pos, width] per layer (one forward pass; none for a mean baseline, nor for
        zeros where the run's activations are at hand).
        """
        if self.baseline == "zero" and run is not None:
            return {name: [torch.zeros_like(v) for v in layers] for name, layers in run.items()}
        if self.baseline == "mean":
            assert self.means is not None
            means = {k: [m.expand(len(self.batch), -1, -1) for m in layers] for k, layers in self.means.items()}
            if "resid_pre" in means:
                self.inputs["source"] = means["resid_pre"][0]
            return {k.name: means[k.name] for k in self.kinds}
        prompt: Literal["run", "source"] = "source" if self.baseline == "patch" else "run"
        self.passes.forward += 1
        values = self._captured(prompt)
        if self.baseline == "zero":
            self.inputs["source"] = torch.zeros_like(self.inputs["run"])
            return {name: [torch.zeros_like(v) for v in layers] for name, layers in values.items()}
        return values

    def run_activations(self) -> Activations:
        """n(run) for every kind: Float[batch, pos, width] per layer (one forward pass)."""
        self.passes.forward += 1
        return self._captured("run")

    @cached_property
    def traced(self) -> tuple[Trace, Activations]:
        """The run, kept so that patched ones start in the middle of it, and its activations (one forward pass)."""
        way = way_of(self.model, self.run)
        self.passes.forward += 1
        with torch.no_grad(), capture(self.model, self.kinds) as values:
            trace, logits = record(self.model, self.run, way)
        self.seen["run"] = self.value(logits)
        return trace, values

    def _captured(self, prompt: Literal["run", "source"]) -> Activations:
        with torch.no_grad():
            keep: Hook = lambda value: self.inputs.__setitem__(prompt, value)  # noqa: E731
            with self.model.hooks({EMBEDDED: keep}), capture(self.model, self.kinds) as values:
                logits = self.model.logits(getattr(self, prompt))
            self.seen[prompt] = self.value(logits)  # outside `capture`: kl runs the model for its reference
        return values
