"""Trained cases: the training's forward pass against Hugging Face and relp's own exact patching, its labels by hand, and what
ships against exact patching.
"""

from __future__ import annotations

import pytest
import torch
from oracles.wrapped import close

from relp_cli.evaluation.known_circuits import KINDS, component_names, component_scores
from relp_cli.known.case import read_case
from relp_cli.known.interchange import interchanged
from relp_cli.known.trained import (
    TASKS,
    Settings,
    edge_matrix,
    interventions,
    new_model,
    nodes_of,
    train,
)
from relp_cli.models.load import load_model, wrap
from relp_cli.scoring import score
from relp_cli.spaces.graph import Graph
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.task import load_task

GRAPH = Graph(2, 4)


def test_edges_put_in_are_what_exact_patching_puts_in() -> None:
    """Every third edge by itself, in float64: the change of the logit difference is `act_patch`'s score of the edge."""
    torch.manual_seed(0)
    task = TASKS["trained_lookup"]
    model = new_model(task).double()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    prompts, sources = task.draw(3), task.draw(3)
    run = interchanged(model, prompts)
    close(run.logits, model(input_ids=prompts).logits[:, -1])
    answer, foil = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    batch = PairBatch(original=prompts, patch=sources, answer=answer, foil=foil, roles=("all",) * task.length)
    want = component_scores(score(wrap(model, None, "random"), [batch], "act_patch", ["edges"], keep_examples=True))
    other = interchanged(model, sources).writers
    rows = torch.arange(3)
    for i, (writer, reader) in list(enumerate(GRAPH.mask.nonzero().tolist()))[::3]:
        share = torch.zeros(3, *GRAPH.mask.shape, dtype=torch.float64)
        share[:, writer, reader] = 1
        logits = interchanged(model, prompts, [(other, share)]).logits - run.logits
        close(logits[rows, answer] - logits[rows, foil], want[:, i], 1e-5)


def test_labels_of_interventions() -> None:
    prompts, sources = torch.tensor([[0, 4, 2, 7, 9]]), torch.tensor([[3, 1, 5, 8, 9]])
    lookup = {node: answer(prompts, sources).item() for node, answer in TASKS["trained_lookup"].nodes.items()}
    assert TASKS["trained_lookup"].answer(prompts).item() == 5  # the letter after 4
    assert lookup == {"a0.h1": 3, "a1.h2": 0, "m1": 0}  # the source asks for place 2: 2 in the prompt, 5 in the source
    prompts, sources = torch.tensor([[1, 0, 0, 3, 6]]), torch.tensor([[4, 5, 5, 2, 6]])
    larger = {node: answer(prompts, sources).item() for node, answer in TASKS["trained_larger"].nodes.items()}
    assert TASKS["trained_larger"].answer(prompts).item() == 3
    assert larger == {"a0.h0": 4, "a0.h3": 2, "m1": 4}


def test_interventions_take_a_nodes_edges_of_the_circuit() -> None:
    torch.manual_seed(0)
    task = TASKS["trained_larger"]
    prompts, sources = task.draw(64), task.draw(64)
    share, labels = interventions(task, GRAPH, prompts, sources)
    seen = set()
    for example in range(64):
        edges = tuple(GRAPH.name(u, v) for u, v in share[example].nonzero().tolist())
        writers = {edge.partition("->")[0] for edge in edges}
        assert len(writers) <= 1
        assert set(edges) == {edge for edge in task.edges if edge.partition("->")[0] in writers}
        node = next(iter(writers), None)
        want = task.answer(prompts) if node is None else task.nodes[node](prompts, sources)
        assert labels[example] == want[example]
        seen.add(node)
    assert seen == {None, *task.nodes}
    assert edge_matrix(GRAPH, task.edges).sum() == len(task.edges)


def test_training_is_seeded() -> None:
    settings = Settings(steps=5, batch=16)
    one, loss = train(TASKS["trained_larger"], settings)
    again, same = train(TASKS["trained_larger"], settings)
    assert loss == same
    for a, b in zip(one.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", TASKS)
def test_what_ships_has_the_circuit(name: str) -> None:
    """Right on every pair; outside the circuit, the mean |effect| of no part is a tenth of the smallest inside."""
    case, task = read_case(name), TASKS[name]
    assert case.edges is not None
    assert set(case.edges) == set(task.edges)
    assert case.nodes == nodes_of(task.edges)
    model = load_model(str(case.folder), dtype="float64")
    (batch,) = load_task(case.pairs).pairs(model, None, split="all")
    assert torch.equal(model.logits(batch.original).argmax(-1), task.answer(batch.original))
    assert torch.equal(model.logits(batch.patch).argmax(-1), task.answer(batch.patch))
    for kinds in KINDS.values():
        scores = score(model, [batch], "act_patch", kinds, keep_examples=True)
        effects = dict(zip(component_names(scores), component_scores(scores).abs().mean(0).tolist(), strict=True))
        inside = [effects.pop(part) for part in (case.edges if kinds == ("edges",) else case.nodes)]
        assert max(effects.values()) < min(inside) / 10
