"""Compiled cases: weights compute what the program means, the program means what a task says, and exact patching says that
the circuit is the one that follows from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracles.make import exact_float64
from oracles.wrapped import double_by_default
from safetensors.torch import load_file

from relp_cli.errors import RelpError
from relp_cli.evaluation.known_circuits import KINDS, component_names, component_scores
from relp_cli.known.case import CASES, Case, case_names, read_case
from relp_cli.known.clutter import one_hot
from relp_cli.known.compile import compile_program
from relp_cli.known.make import MAKERS
from relp_cli.known.program import Copy, Head, Match, Program, run, truth
from relp_cli.known.programs import PROGRAMS, program
from relp_cli.models.load import wrap
from relp_cli.scoring import score
from relp_cli.tasks.task import load_task


def induction(tokens: Sequence[int]) -> int:
    *text, asked = tokens
    return text[text.index(asked) + 1]


def two_hops(tokens: Sequence[int]) -> int:
    links = {token // 4: token % 4 for token in tokens[1:-1]}
    return links[links[tokens[-1] - 16]]


def carried(tokens: Sequence[int]) -> int:
    return (tokens[1:-1][tokens[-1] - 8] + (1 if tokens[0] == 6 else -1)) % 6


def yes(true: bool) -> int:
    return 8 if true else 9


MEANING: dict[str, Callable[[Sequence[int]], int]] = {
    "induction": induction,
    "saturated": induction,
    "two_hops": two_hops,
    "carried": carried,
    "both": lambda tokens: yes(4 in tokens and 5 in tokens),
    "either": lambda tokens: yes(4 in tokens or 5 in tokens),
    "opposed": lambda tokens: yes(4 in tokens),
    "parity": lambda tokens: yes((4 in tokens) == (5 in tokens)),
    "tent": lambda tokens: 10 if tokens[1] in (4, 5) else 11,
    "ghost": lambda tokens: 10 if tokens[1] in (4, 5) else 11,
    "twins": lambda tokens: tokens[3],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_weights_compute_what_the_program_means(name: str) -> None:
    """On the prompts of all pairs and on random tokens that no pair has; weights are rounded to float32."""
    made = program(name)
    texts = [text for pair in made.pairs for text in (pair.original, pair.patch)]
    rng = random.Random(1)
    texts += [tuple(rng.randrange(len(made.tokens)) for _ in texts[0]) for _ in range(32)]
    with exact_float64(), torch.no_grad():
        model = compile_program(made).double().eval()
        logits = model(input_ids=torch.tensor(texts)).logits[:, -1]
    want = torch.tensor([run(made, text)[0] for text in texts], dtype=torch.float64)
    assert (logits - want).abs().max() < 2e-7 * want.abs().max()
    assert want.abs().max() > 3


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_do_their_tasks(name: str) -> None:
    """A clear margin for what the task's own rule says, in every prompt that has an answer by it."""
    made = program(name)
    for pair in made.pairs:
        logits, _ = run(made, pair.original)
        assert MEANING[name](pair.original) == pair.answer == logits.index(max(logits))
        assert logits[pair.answer] > logits[pair.foil] + 1
        logits, _ = run(made, pair.patch)
        if name != "parity" or len({4, 5, 6, 7} & set(pair.patch)) == 2:
            assert MEANING[name](pair.patch) == logits.index(max(logits))


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_ships_is_what_the_command_makes(name: str) -> None:
    made, case = program(name), read_case(name)
    circuit = truth(made)
    assert (case.nodes, case.edges) == (circuit.nodes, circuit.edges)
    shipped = load_file(CASES / name / "model.safetensors")
    for key, value in compile_program(made).state_dict().items():
        assert torch.equal(value, shipped[key]), key


def exact_effects(case: Case, kinds: tuple[str, ...], directions: Sequence[str]) -> dict[str, list[float]]:
    """Component → its largest |effect| on a pair, for each direction."""
    with exact_float64(), double_by_default():
        model = wrap(compile_program(program(case.name)).double(), None, case.name)
        (batch,) = load_task(case.pairs).pairs(model, None, split="all")
        pairs = [batch.rows(slice(0, 12))]  # of every sort of pair, two
        found = [
            score(model, pairs, "act_patch", kinds, case.metric, direction, keep_examples=True)
            for direction in directions
        ]
    largest = torch.stack([component_scores(scores).abs().amax(0) for scores in found])
    return dict(zip(component_names(found[0]), largest.T.tolist(), strict=True))


@pytest.mark.parametrize("space", KINDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_exact_patching_finds_the_circuit(name: str, space: str) -> None:
    """What is outside moves no logit on any pair; what is inside does, in one direction at least. Of OR, only denoising can."""
    case = read_case(name)
    circuit = case.nodes if space == "nodes" else case.edges
    assert circuit is not None
    one = space == "edges" and name != "either"  # takes as long as all the rest
    effects = exact_effects(case, KINDS[space], ["noising"] if one else ["noising", "denoising"])
    assert max(max(each) for part, each in effects.items() if part not in circuit) < 1e-6
    assert min(max(effects[part]) for part in circuit) > 0.2
    silent = {part for part in circuit if effects[part][0] < 1e-6}
    alone = {"nodes": {"m1"}, "edges": {"m1->logits"}}[space]  # all that a single patch can spoil
    assert silent == (set(circuit) - alone if name == "either" else set())


def test_every_case_that_ships_has_a_maker() -> None:
    assert sorted(MAKERS) == case_names()


def small(**changed: Any) -> Program:
    fields: dict[str, Any] = {
        "name": "small", "about": "", "architecture": "llama", "features": {"token": 8, "out": 8},
        "tokens": tuple(one_hot("token", t) for t in range(8)), "unembed": {0: one_hot("out", 0)},
        "heads": (Head(0, 0, (Match("token", "token", 1.0),), (Copy("token", "out"),)),), "mlps": (), "pairs": (),
    }  # fmt: skip
    return Program(**fields | changed)


def test_what_does_not_fit_is_refused() -> None:
    copies = (Copy("token", "out"), Copy("out", "token"))
    with pytest.raises(RelpError, match=r"a0\.h0 needs more than 14 dimensions"):
        compile_program(small(heads=(Head(0, 0, (), copies),)))
    with pytest.raises(RelpError, match="its features need 85 dimensions of 64"):
        compile_program(small(features={"token": 8, "out": 72}))


def test_truth_leaves_out_what_is_off_the_way() -> None:
    idle = Head(0, 1, (Match("token", "token", 1.0),), (Copy("token", "token"),))
    assert truth(small()).nodes == ("a0.h0",)
    assert truth(small(heads=(*small().heads, idle))).nodes == ("a0.h0",)  # heads of one layer do not read each other
    later = Head(1, 0, (Match("token", "out", 1.0, without_effect="k"),), (Copy("token", "out"),))
    circuit = truth(small(heads=(idle, later)))
    assert circuit.edges == ("a0.h1->a1.h0<q>", "a0.h1->a1.h0<v>", "a1.h0->logits", "input->a0.h1<k>", "input->a0.h1<q>",
                             "input->a0.h1<v>", "input->a1.h0<q>", "input->a1.h0<v>")  # fmt: skip
