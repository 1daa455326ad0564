"""What a scoring was asked for, and what it says of itself afterwards: the same for nodes, edges and features."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError, unknown
from relp_cli.methods.room import Room
from relp_cli.methods.setup import Means, Passes, Setup
from relp_cli.methods.table import Method, Params
from relp_cli.methods.unfinished import Unfinished
from relp_cli.models.model import Model
from relp_cli.nodes.kinds import NodeKind
from relp_cli.tasks.metrics import Metric, metric_of
from relp_cli.tasks.pairs import PairBatch

Progress = Callable[[int, int, str], None]  # (steps done, steps in all, what)
DIRECTIONS = ("noising", "denoising")
BASELINES = ("patch", "zero", "mean")


@dataclass(frozen=True)
class Request:
    """What `relp.score` was asked for besides the model, the pairs, the method and the nodes; see there for meanings."""

    metric: str | Callable[..., Any] | Metric = "logit_diff"
    direction: str = "noising"
    baseline: str = "patch"
    batch_size: int = BATCH_SIZE
    keep_examples: bool | None = None
    progress: Progress | None = None
    unfinished: Unfinished | None = None
    memory: int | None = None  # bytes, which the peak stays below
    room: Room | None = None  # how pairs are cut, where a limit to memory has decided already

    def check(self, of: str = "", baselines: Sequence[str] = BASELINES) -> None:
        """Raises RelpError for a metric, direction or baseline that does not exist (`of` features, say)."""
        metric_of(self.metric)
        for what, value, known in (("direction", self.direction, DIRECTIONS), ("baseline", self.baseline, baselines)):
            if value not in known:
                raise unknown(f"{what}{of}", str(value), known)

    def setup(
        self, model: Model, batch: PairBatch, kinds: tuple[NodeKind, ...], passes: Passes, means: Means | None = None
    ) -> Setup:
        """One batch made ready. `means`: for baseline mean."""
        direction: Any = self.direction
        baseline: Any = self.baseline
        return Setup(
            model.reading(batch.read), batch, metric_of(self.metric), kinds, direction, baseline, means, passes
        )


def chooses_rules(method: str, rules: Any) -> bool:
    """Whether rules are chosen on some of the pairs: `relp+auto`, or rules "auto", as they are given or read."""
    return method.partition("+")[2] == "auto" or rules in ("auto", ("auto",))


def needs_all(row: Method, method: str, rules: Any = None) -> bool:
    """Whether a method's batches depend on each other, or its rules are chosen on some of the pairs."""
    return row.by == "all" or chooses_rules(method, rules)


def check_divisible(row: Method, method: str, rules: Any = None) -> None:
    """Raises RelpError for a method that several processes cannot share."""
    if needs_all(row, method, rules):
        raise RelpError(f"method '{method}' needs all pairs in one process: it cannot be computed in shards")


def check_memory(row: Method, params: Params, method: str, request: Request) -> None:
    """Raises RelpError where `request.memory` is given and cannot choose how pairs are cut."""
    if request.memory is None:
        return
    if needs_all(row, method, getattr(params, "rules", None)):
        raise RelpError(
            f"method '{method}' needs all pairs at once: --memory has nothing to choose; give fewer --pairs"
        )
    for name, is_given in (
        ("--batch-size", request.batch_size != BATCH_SIZE),
        ("--set chunk_tokens", getattr(params, "chunk_tokens", None) is not None),
    ):
        if is_given:
            raise RelpError(f"--memory chooses how many pairs and tokens a pass has: give it or {name}, not both")


def within(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress within batch `number` of `count`, as progress of the whole."""
    if progress is None:
        return None
    return lambda done, total, what: progress(number * total + done, count * total, what)


class Account:
    """Passes, seconds and the metric on the original prompts, while a method works through its batches."""

    def __init__(self, request: Request, model: Model, chunks: Sequence[PairBatch], method: str) -> None:
        self.request, self.model, self.method = request, model, method
        self.n_batches, self.n_pairs = len(chunks), sum(map(len, chunks))
        self.passes, self.started = Passes(), time.perf_counter()
        self.values: list[Tensor] = []

    def done(self, setups: Sequence[Setup]) -> None:
        """One batch is scored, in so many parts, whose passes are counted with them, or with those of all batches already."""
        for setup in setups:
            if setup.passes is not self.passes:
                self.passes.add(setup.passes)
        original = [s.prompt_value("run" if self.request.direction == "noising" else "source") for s in setups]
        self.values.append(torch.stack(original).sum(0).cpu())
        if self.request.progress:
            self.request.progress(sum(map(len, self.values)), self.n_pairs, self.method)

    def meta(self, row: Method, params: Params, rules: Mapping[str, int], axis: str, **more: Any) -> dict[str, Any]:
        """What the result says of how it came about; passes are per pair, a pass over a batch counting for all its pairs.

        patched_share_computed: what was computed of the runs with a patch (which start at the patch), in whole runs;
        patched_share_no_effect: the share of them that left L as it was, to the last bit.
        """
        values, passes = torch.cat(self.values), self.passes
        forward = passes.forward / self.n_batches + passes.patched / self.n_pairs
        return {
            "method": self.method,
            "params": params.model_dump(mode="json", exclude=set(row.fixed)),
            "signed": row.signed,
            "rules": dict(rules),
            "metric": metric_of(self.request.metric).name,
            "direction": self.request.direction,
            "baseline": self.request.baseline,
            **model_meta(self.model),
            "n_pairs": self.n_pairs,
            "axis": axis,
            "forwards_per_pair": round(forward, 3),
            "backwards_per_pair": round(passes.backward / self.n_batches, 3),
            **_of_patched(passes),
            "seconds": round(time.perf_counter() - self.started + passes.seconds, 3),
            "mean_metric": values.mean().item(),
            "mean_abs_metric": values.abs().mean().item(),
            **more,
        }


def _of_patched(passes: Passes) -> dict[str, float]:
    shares = {"computed": passes.computed, "no_effect": passes.no_effect}
    return {f"patched_share_{k}": round(n / passes.patched, 3) for k, n in shares.items()} if passes.patched else {}


def model_meta(model: Model) -> dict[str, str]:
    """What every result says of the model it came from."""
    return {
        "model": model.name,
        "revision": model.revision,
        "family": model.family.name,
        "dtype": str(model.dtype).removeprefix("torch."),
    } | ({} if model.device_map is None else {"device_map": model.device_map})
