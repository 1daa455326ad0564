"""Benchmarks: cost of each method as a ratio to plain Hugging Face passes, measured in turns in one run.

Model: GPT-2-small shape with random weights; batch of 8 pairs × 16 tokens; one thread. Each round times the baseline and
the candidate one after the other; the ratio is of medians over rounds.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from relp_cli.circuits.circuit import Circuit
from relp_cli.evaluation.ablation import Ablation
from relp_cli.evaluation.evaluate import Runs
from relp_cli.methods.score import COMPONENTS, score
from relp_cli.models.load import wrap
from relp_cli.models.model import Model
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.pairs import PairBatch


@dataclass(frozen=True)
class Fixture:
    """The model, its untouched Hugging Face twin, and the pairs."""

    model: Model
    plain: Any
    batch: PairBatch


@dataclass(frozen=True)
class Bench:
    """One row: `run` is timed against `baseline`; `limit` is the ratio that the project promises."""

    name: str
    baseline: str
    run: Callable[[Fixture], Any]
    limit: float | None


def fixture(layers: int = 12) -> Fixture:
    """GPT-2-small shape (124M parameters at 12 layers), seeded random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    config._attn_implementation = "eager"
    plain = GPT2LMHeadModel(config).eval().requires_grad_(False)
    ids = torch.randint(0, config.vocab_size, (2, 8, 16))
    answer, foil = torch.randint(0, config.vocab_size, (2, 8))
    return Fixture(wrap(copy.deepcopy(plain), None, "gpt2-small-shape"), plain, PairBatch(ids[0], ids[1], answer, foil))


def plain_forward(f: Fixture) -> None:
    with torch.no_grad():
        f.plain(input_ids=f.batch.original, use_cache=False)


def plain_pass(f: Fixture) -> None:
    """One forward + one backward to the embeddings, parameters frozen."""
    embeddings = f.plain.transformer.wte(f.batch.original).requires_grad_(True)
    logits = f.plain(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
    rows = torch.arange(len(logits))
    value = (logits[rows, f.batch.answer[:, 0]] - logits[rows, f.batch.foil[:, 0]]).sum()
    torch.autograd.grad(value, embeddings)


def plain_two_forward_one_backward(f: Fixture) -> None:
    plain_forward(f)
    plain_pass(f)


def _score(method: str, nodes: Sequence[str] = COMPONENTS, **params: Any) -> Callable[[Fixture], Any]:
    return lambda f: score(f.model, [f.batch], method, nodes, **params)


def _full_logits(method: str) -> Callable[[Fixture], Any]:
    """The same with the unembedding computed at all positions, as a plain pass does."""

    def run(f: Fixture) -> None:
        everywhere = _EveryPosition(f.model)
        score(everywhere, [f.batch], method)

    return run


class _EveryPosition(Model):
    """A model that computes its logits everywhere (for like-for-like timing)."""

    def __init__(self, model: Model) -> None:
        self.__dict__.update(model.__dict__)

    def logits(self, tokens: torch.Tensor, all_positions: bool = False) -> torch.Tensor:
        logits = super().logits(tokens, all_positions=True)
        return logits if all_positions else logits[:, -1]


def _circuit_point(f: Fixture) -> None:
    """One F(C) of a neuron circuit: ablation values are ready, half of the neurons are ablated."""
    runs, masks, ablated, full = _prepared(f)
    with torch.no_grad():
        runs.run(f.batch, masks, ablated, full)


_cache: dict[int, Any] = {}


def _prepared(f: Fixture) -> Any:
    if id(f) not in _cache:
        kind, shape = NODE_KINDS["mlp_neuron"], f.model.shape
        mask = torch.rand(shape.n_layers, f.batch.n_pos, shape.d_mlp, generator=torch.Generator().manual_seed(0)) > 0.5
        circuit = Circuit.from_mask("mlp_neuron", mask)
        ablation = Ablation.prepare(f.model, [f.batch], "mean", [kind])
        runs = Runs(f.model, METRICS["logit_diff"], (kind,), 0, [f.batch], ablation)
        values, full = ablation.values(f.model, f.batch, f.batch), f.model.logits(f.batch.original)
        _cache[id(f)] = (runs, dict(circuit.masks), values, full)
    return _cache[id(f)]


BASELINES: dict[str, Callable[[Fixture], None]] = {
    "2 forward + 1 backward": plain_two_forward_one_backward,
    "1 forward": plain_forward,
    "1 forward + 1 backward": plain_pass,
}
BENCHES = [
    Bench("relp, logits everywhere", "2 forward + 1 backward", _full_logits("relp"), 1.05),
    Bench("relp", "2 forward + 1 backward", _score("relp"), 0.9),
    Bench("atp", "2 forward + 1 backward", _score("atp"), 0.9),
    Bench("relp, neurons", "2 forward + 1 backward", _score("relp", ["mlp_neuron"]), None),
    Bench("relp+two_point", "2 forward + 1 backward", _score("relp+two_point"), None),
    Bench("one point of a circuit sweep", "1 forward", _circuit_point, 1.3),
]


def run_benches(rounds: int, layers: int = 12, only: str = "") -> list[dict[str, Any]]:
    """Time every row (or those whose name contains `only`); ratios of medians."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        f = fixture(layers)
        return [_time(f, bench, rounds) for bench in BENCHES if only in bench.name]
    finally:
        torch.set_num_threads(before)


def _time(f: Fixture, bench: Bench, rounds: int) -> dict[str, Any]:
    pair = (BASELINES[bench.baseline], bench.run)
    for run in pair:
        run(f)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, spent in zip(pair, times, strict=True):
            start = time.perf_counter()
            run(f)
            spent.append(time.perf_counter() - start)
    base, mine = (statistics.median(t) for t in times)
    return {"what": bench.name, "baseline": bench.baseline, "baseline s": base, "s": mine, "ratio": mine / base,
            "limit": bench.limit if bench.limit is not None else float("nan")}  # fmt: skip
