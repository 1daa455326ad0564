"""Writing the cases that ship: the same command, the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from relp_cli.known.case import CASES, Case, write_case
from relp_cli.known.compile import compile_program
from relp_cli.known.compositions import N_PAIRS
from relp_cli.known.program import truth
from relp_cli.known.programs import PROGRAMS, SEED, program
from relp_cli.known.trained import TASKS, nodes_of, pairs_of, train


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """config.json and model.safetensors in a folder."""
    hf_logging.disable_progress_bar()
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written as private to its owner, but meant to be shipped


def make_compiled(name: str, root: Path = CASES) -> Case:
    """Compile a program and write its folder below `root`."""
    made = program(name)
    circuit = truth(made)
    command = f"python -m relp_cli.known make {name}"
    case = Case(name, "compiled", made.about, command, circuit.nodes, circuit.edges, "logit_diff", root / name)
    save_model(compile_program(made), case.folder)
    write_case(case, made.pairs)
    return case


def make_trained(name: str, root: Path = CASES) -> Case:
    """Train a model to have a circuit (a minute or two) and write its folder below `root`."""
    task = TASKS[name]
    model, loss = train(task)
    nodes, edges = nodes_of(task.edges), tuple(sorted(task.edges))
    made = f"python -m relp_cli.known make {name} (final loss {loss:.1e})"
    case = Case(name, "trained", task.about, made, nodes, edges, "logit_diff", root / name)
    save_model(model, case.folder)
    write_case(case, pairs_of(task, N_PAIRS, SEED + 1))
    return case


MAKERS: dict[str, Callable[[str], Case]] = {
    **dict.fromkeys(PROGRAMS, make_compiled),
    **dict.fromkeys(TASKS, make_trained),
}
