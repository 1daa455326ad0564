"""Small GPT-2s that are trained to have a given circuit (strict interchange intervention training, as in InterpBench; Gupta et
al. 2024).

1. A task says what each head and MLP of the circuit stands for: what the answer is where it comes from another prompt.
2. Each step draws prompts and as many sources. Of an example, the edges out of one node of the circuit (or of none) come from
   the source, and a share of all edges outside the circuit (none, half or all) from a second one.
3. The loss is the cross-entropy with the answer that the task gives for this. So the circuit's nodes stand for what they are
   said to, and nothing else may matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from relp_cli.known.interchange import interchanged
from relp_cli.known.program import INPUT, Pair
from relp_cli.spaces.graph import Graph

Prompts = Int[Tensor, "batch pos"]
Labels = Int[Tensor, " batch"]


@dataclass(frozen=True)
class Task:
    """draw: how many → prompts. answer: of a prompt. nodes: node of the circuit → (prompts, sources) → the answer where the
    node comes from the source. edges: the circuit.
    """

    name: str
    about: str
    vocab: int
    length: int
    draw: Callable[[int], Prompts]
    answer: Callable[[Prompts], Labels]
    nodes: Mapping[str, Callable[[Prompts, Prompts], Labels]]
    edges: tuple[str, ...]


LETTERS, PLACES = 6, 3


def _lookup_prompts(n: int) -> Prompts:
    """Three letters, which of them is asked (6 to 8), and an end (9)."""
    return torch.cat(
        [torch.randint(LETTERS, (n, PLACES)), torch.randint(LETTERS, LETTERS + PLACES, (n, 1)), torch.full((n, 1), 9)],
        1,
    )


def _at(letters: Prompts, asks: Prompts) -> Labels:
    """The letter at the place that another prompt asks for."""
    return letters.gather(1, asks[:, PLACES : PLACES + 1] - LETTERS)[:, 0]


def _next(letters: Labels) -> Labels:
    return (letters + 1) % LETTERS


LOOKUP = Task(
    "trained_lookup",
    "trained: which letter is asked (a0.h1), that letter (a1.h2), the one after it (m1)",
    10,
    PLACES + 2,
    _lookup_prompts,
    lambda prompts: _next(_at(prompts, prompts)),
    {
        "a0.h1": lambda prompts, sources: _next(_at(prompts, sources)),
        "a1.h2": lambda _, sources: _next(_at(sources, sources)),
        "m1": lambda _, sources: _next(_at(sources, sources)),
    },
    ("input->a0.h1<v>", "a0.h1->a1.h2<q>", "input->a1.h2<v>", "a1.h2->m1", "m1->logits"),
)


LARGER = Task(
    "trained_larger",
    "trained: the larger of the first (a0.h0) and the fourth letter (a0.h3), in an MLP (m1)",
    LETTERS + 1,
    5,
    lambda n: torch.cat([torch.randint(LETTERS, (n, 4)), torch.full((n, 1), LETTERS)], 1),
    lambda prompts: torch.maximum(prompts[:, 0], prompts[:, 3]),
    {
        "a0.h0": lambda prompts, sources: torch.maximum(sources[:, 0], prompts[:, 3]),
        "a0.h3": lambda prompts, sources: torch.maximum(prompts[:, 0], sources[:, 3]),
        "m1": lambda _, sources: torch.maximum(sources[:, 0], sources[:, 3]),
    },
    ("input->a0.h0<v>", "input->a0.h3<v>", "a0.h0->m1", "a0.h3->m1", "m1->logits"),
)
TASKS = {task.name: task for task in (LOOKUP, LARGER)}


@dataclass(frozen=True)
class Settings:
    """AdamW without weight decay, so that what is outside the circuit stays as loud as it likes; one learning-rate cycle."""

    steps: int = 1000
    batch: int = 128
    lr: float = 4e-3
    seed: int = 0


def train(
    task: Task, settings: Settings = Settings(), say: Callable[[str], None] = print
) -> tuple[GPT2LMHeadModel, float]:
    """A model with the task's circuit, and the mean loss of the last 100 steps. Seeded; one thread, so that sums keep order."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    model = new_model(task)
    graph = Graph(model.config.n_layer, model.config.n_head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.steps)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(1, settings.steps + 1):
        loss = step_loss(model, task, graph, settings.batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        losses.append(loss.item())
        if step % 250 == 0:
            left = (time.monotonic() - started) / step * (settings.steps - step)
            say(f"{task.name}: step {step}/{settings.steps}, loss {sum(losses[-100:]) / 100:.4f}, {left:.0f} s left")
    recent = losses[-100:]
    return model.eval(), sum(recent) / len(recent)


def new_model(task: Task) -> GPT2LMHeadModel:
    """Two layers of four heads, untrained."""
    config = GPT2Config(
        vocab_size=task.vocab, n_positions=task.length, n_embd=32, n_layer=2, n_head=4, n_inner=64, embd_pdrop=0.0,
        attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
        initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def step_loss(model: GPT2LMHeadModel, task: Task, graph: Graph, batch: int) -> Float[Tensor, ""]:
    """One batch of prompts; their sources are the same prompts in two other orders."""
    prompts = task.draw(batch)
    writers = interchanged(model, prompts).writers
    first, second = torch.randperm(batch), torch.randperm(batch)
    share, labels = interventions(task, graph, prompts, prompts[first])
    outside = graph.mask & ~edge_matrix(graph, task.edges)
    amount = torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, (batch, 1, 1))]
    noise = ((torch.rand(batch, *outside.shape) < amount) & outside).float()
    run = interchanged(model, prompts, [(writers[:, first], share), (writers[:, second], noise)])
    return F.cross_entropy(run.logits, labels)


def interventions(
    task: Task, graph: Graph, prompts: Prompts, sources: Prompts
) -> tuple[Float[Tensor, "batch writer reader"], Labels]:
    """Per example a node of the circuit, or none: its edges in the circuit, and the answer where it comes from the source."""
    share = torch.zeros(len(prompts), *graph.mask.shape)
    labels = task.answer(prompts).clone()
    circuit = edge_matrix(graph, task.edges).float()
    chosen = torch.randint(len(task.nodes) + 1, (len(prompts),))
    for i, (node, answer) in enumerate(task.nodes.items()):
        where = chosen == i
        row = graph.writer(node)
        share[where, row] = circuit[row]
        labels[where] = answer(prompts, sources)[where]
    return share, labels


def edge_matrix(graph: Graph, edges: Sequence[str]) -> Bool[Tensor, "writer reader"]:
    """True at edges `writer->reader`."""
    mask = torch.zeros_like(graph.mask)
    for edge in edges:
        writer, _, reader = edge.partition("->")
        mask[graph.writer(writer), graph.reader(reader)] = True
    return mask


def nodes_of(edges: Sequence[str]) -> tuple[str, ...]:
    """Heads and MLPs that edges lead from."""
    return tuple(sorted({edge.partition("->")[0] for edge in edges} - {INPUT}))


def pairs_of(task: Task, n: int, seed: int) -> tuple[Pair, ...]:
    """Random pairs of prompts with different answers; the foil is the patch prompt's answer."""
    torch.manual_seed(seed)
    pairs: list[Pair] = []
    while len(pairs) < n:
        prompts = task.draw(2)
        answer, foil = task.answer(prompts).tolist()
        if answer != foil:
            original, patch = (tuple(text) for text in prompts.tolist())
            pairs.append(Pair(original, patch, answer, foil))
    return tuple(dict.fromkeys(pairs))
