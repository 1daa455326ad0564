"""Benchmarks: cost of each method as a ratio to plain Hugging Face passes, measured in turns in one run.

Model: GPT-2-small shape with random weights; batch of 8 pairs × 16 tokens; one thread (`growth` has others).
Each round times the baseline and the candidate one after the other; the ratio is of medians over rounds.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from relp_cli.edges.run import edge_logits
from relp_cli.errors import unknown
from relp_cli.evaluation.edge_ablation import EdgeAblation
from relp_cli.evaluation.evaluate import Ablating
from relp_cli.evaluation.node_circuits import NodeAblator
from relp_cli.methods.patching import patch_nodes
from relp_cli.methods.request import Progress, Request
from relp_cli.methods.score import COMPONENTS
from relp_cli.methods.setup import Passes
from relp_cli.models.load import wrap
from relp_cli.models.model import Model
from relp_cli.nodes.access import units
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.scoring import score
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.nodes import units_of
from relp_cli.tasks.pairs import PairBatch

LOOP = "TransformerLens's loop, 1 node"


@dataclass(frozen=True, eq=False)
class Fixture:
    """The model, its untouched Hugging Face twin, and the pairs."""

    model: Model
    plain: Any
    batch: PairBatch


@dataclass(frozen=True)
class Bench:
    """One row: `run` is timed against `baseline`; `limit` is the ratio that the project promises. Where either returns a number,
    it did so many at once, and the time is of one. rounds: no more of them.
    """

    name: str
    baseline: str
    run: Callable[[Fixture], Any]
    limit: float | None
    rounds: int | None = None


# GPT-2's sizes: layers, width, heads. Random weights, so that no download is needed; costs do not depend on them.
SHAPES = {"tiny": (4, 128, 4), "gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20)}


def fixture(
    layers: int | None = None, positions: int = 16, pairs: int = 8, shape: str = "gpt2", device: Any = "cpu"
) -> Fixture:
    """A GPT-2 of a row of SHAPES, seeded random weights; `layers` of them. Both models share their weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    its_layers, width, heads = SHAPES[shape]
    config = GPT2Config(
        n_layer=layers or its_layers, n_embd=width, n_head=heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        n_positions=max(1024, positions),
    )  # fmt: skip
    config._attn_implementation = "eager"
    plain = GPT2LMHeadModel(config).eval().requires_grad_(False).to(device)
    shared = {id(parameter): parameter for parameter in plain.parameters()}
    ids = torch.randint(0, config.vocab_size, (2, pairs, positions))
    answer, foil = torch.randint(0, config.vocab_size, (2, pairs))
    batch = PairBatch(ids[0], ids[1], answer, foil).to(plain.device)
    return Fixture(wrap(copy.deepcopy(plain, shared), None, f"{shape}-shape"), plain, batch)


def plain_forward(f: Fixture) -> None:
    """One forward pass of the untouched Hugging Face model."""
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
    """What attribution patching costs at least."""
    plain_forward(f)
    plain_pass(f)


def plain_backwards(f: Fixture, forwards: int, backwards: int) -> None:
    """Forward passes, one of them differentiated several times over (as dropping one layer after the other needs)."""
    for _ in range(forwards - 1):
        plain_forward(f)
    embeddings = f.plain.transformer.wte(f.batch.original).requires_grad_(True)
    logits = f.plain(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
    value = (logits.gather(1, f.batch.answer) - logits.gather(1, f.batch.foil)).sum()
    for _ in range(backwards):
        torch.autograd.grad(value, embeddings, retain_graph=True)


def _edge_point(f: Fixture) -> None:
    """One F(C) of an edge circuit of half of the edges: ablation values are ready."""
    graph, excluded, ablated = _prepared_edges(f)
    with torch.no_grad():
        edge_logits(f.model, graph, f.batch.original, excluded, ablated)


@lru_cache(maxsize=1)
def _prepared_edges(f: Fixture) -> Any:
    graph = Graph.of(f.model.shape)
    drawn = torch.rand(graph.mask.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    values = EdgeAblation.prepare(f.model, [f.batch], "counterfactual").values(f.model, f.batch, f.batch.patch)
    return graph, (drawn & graph.mask)[None], values


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

    def logits(self, tokens: torch.Tensor, all_positions: bool = False, past: Any = None) -> torch.Tensor:
        logits = super().logits(tokens, all_positions=True, past=past)
        return logits if all_positions else logits[:, -1]


def _circuit_point(f: Fixture) -> None:
    """One F(C) of a neuron circuit: ablation values are ready, half of the neurons are ablated."""
    run, keep, ablated = _prepared(f)
    with torch.no_grad():
        run.logits(f.batch, keep, ablated)


@lru_cache(maxsize=1)
def _prepared(f: Fixture) -> Any:
    units = units_of(f.model, ["mlp_neuron"])
    keep = torch.rand(f.batch.n_pos, len(units), generator=torch.Generator().manual_seed(0)) > 0.5
    circuit = Circuit(units, keep, f.batch.labels)
    run = NodeAblator(f.model, [f.batch], [circuit], Ablating("mean", 0))
    return run, keep, next(run.batches())[1]


def _sample(f: Fixture, kind: str) -> dict[tuple[str, int], torch.Tensor]:
    """Every third layer, all positions, two units where there are several; for every pair."""
    shape = (len(f.batch), f.batch.n_pos, units(f.model, NODE_KINDS[kind]))
    masks = {}
    for layer in range(1, f.model.shape.n_layers, 3):
        masks[kind, layer] = torch.zeros(shape, dtype=torch.bool)
        masks[kind, layer][..., :2] = True
    return masks


def _exact(kinds: Sequence[str] = COMPONENTS, shared: int = 0) -> Callable[[Fixture], int]:
    """Exact patching of a sample, returning how many nodes; shared: at how many positions the prompts begin alike."""

    def run(f: Fixture) -> int:
        assert f.batch.patch is not None
        patch = torch.cat([f.batch.original[:, :shared], f.batch.patch[:, shared:]], 1)
        setup = Request().setup(f.model, replace(f.batch, patch=patch), tuple(NODE_KINDS[k] for k in kinds), Passes())
        wanted = {at: mask for kind in kinds for at, mask in _sample(f, kind).items()}
        patch_nodes(setup, setup.source_activations(), wanted)
        return sum(int(mask[0].sum()) for mask in wanted.values())

    return run


def _transformer_lens_loop(f: Fixture) -> int:
    """TransformerLens's way: `run_with_hooks` for every node. One node of each layer; they all take the same time."""
    layers, n_pos = f.model.shape.n_layers, f.batch.n_pos
    others = (torch.arange(n_pos, device=f.batch.original.device) != n_pos // 2)[:, None]
    with torch.no_grad():
        for layer in range(layers):
            hook = (f"blocks.{layer}.hook_mlp_out", lambda value, hook: value * others)  # noqa: ARG005
            f.model.bridge.run_with_hooks(f.batch.original, fwd_hooks=[hook])
    return layers


BASELINES: dict[str, Callable[[Fixture], Any]] = {
    LOOP: _transformer_lens_loop,
    "2 forward + 1 backward": plain_two_forward_one_backward,
    "1 forward": plain_forward,
    "1 forward + 1 backward": plain_pass,
    "4 forward + 1 backward": lambda f: plain_backwards(f, 4, 1),
    "2 forward + L backward": lambda f: plain_backwards(f, 2, f.model.shape.n_layers),
}
BENCHES = [
    Bench("relp, logits everywhere", "2 forward + 1 backward", _full_logits("relp"), 1.05),
    Bench("relp", "2 forward + 1 backward", _score("relp"), 0.9),
    Bench("atp", "2 forward + 1 backward", _score("atp"), 0.9),
    Bench("relp, neurons", "2 forward + 1 backward", _score("relp", ["mlp_neuron"]), None),
    Bench("relp+two_point", "2 forward + 1 backward", _score("relp+two_point"), None),
    Bench("one point of a circuit sweep", "1 forward", _circuit_point, 1.3),
    Bench("ig_inputs, 10 steps", "1 forward + 1 backward", _score("ig_inputs", steps=10), 11.0),
    Bench("atp_star, QK fix", "4 forward + 1 backward", _score("atp_star", ("query", "key"), grad_drop=False), 1.0),
    Bench("atp_star, GradDrop", "2 forward + L backward", _score("atp_star", qk_fix=False), 1.1),
    Bench("eap", "2 forward + 1 backward", _score("eap", ("edges",)), 1.5),
    Bench("relp_edges", "2 forward + 1 backward", _score("relp_edges", ("edges",)), 1.5),
    Bench("eap_ig, 5 steps", "2 forward + 1 backward", _score("eap_ig", ("edges",), steps=5), 6.0),
    Bench("one edge circuit", "1 forward", _edge_point, 2.0),
    Bench("act_patch, 1 node", LOOP, _exact(), 0.2, 2),
    Bench("act_patch, 1 node, same first half", LOOP, _exact(shared=8), 0.1, 2),
    Bench("act_patch, 1 head or neuron", LOOP, _exact(("head", "mlp_neuron")), 0.2, 2),
]


def run_benches(
    rounds: int, layers: int = 12, only: str = "", progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Time every row (or those whose name contains `only`); ratios of medians.

    Raises: RelpError where no row has that name.
    """
    chosen = [bench for bench in BENCHES if only in bench.name]
    if not chosen:
        raise unknown("row", only, [bench.name for bench in BENCHES], where="--only: ")
    with one_thread():
        f, rows = fixture(layers), []
        for bench in chosen:
            rows.append(timed(f, bench, rounds))
            if progress:
                progress(len(rows), len(chosen), "rows")
        return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(f: Fixture, bench: Bench, rounds: int) -> dict[str, Any]:
    """Medians of seconds, after one run of each that is not timed."""
    pair = (BASELINES[bench.baseline], bench.run)
    for run in pair:
        run(f)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(min(rounds, bench.rounds or rounds)):
        for run, spent in zip(pair, times, strict=True):
            start = time.perf_counter()
            count = run(f)
            if f.batch.original.is_cuda:
                torch.cuda.synchronize()
            spent.append((time.perf_counter() - start) / (count if isinstance(count, int) else 1))
    base, mine = (statistics.median(t) for t in times)
    return {"what": bench.name, "baseline": bench.baseline, "baseline s": base, "s": mine, "ratio": mine / base,
            "limit": bench.limit if bench.limit is not None else float("nan")}  # fmt: skip
