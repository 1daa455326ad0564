"""Writing the cases that ship: the same command, the same files."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from relp_cli.known.case import CASES, Case, write_case
from relp_cli.known.compile import compile_program
from relp_cli.known.program import truth
from relp_cli.known.programs import PROGRAMS, program


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


MAKERS = dict.fromkeys(PROGRAMS, make_compiled)
