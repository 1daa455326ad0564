"""`relp export RUN FILE`: a run's scores and circuit as one table, a row a unit; its circuit as an attribution graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from relp_cli.errors import RelpError
from relp_cli.features.kinds import SCORED
from relp_cli.files import check_file_writable, write_atomically
from relp_cli.report.attribution_json import Prompt, attribution_graph, check_drawable
from relp_cli.report.tables import write_table
from relp_cli.runs.scoring import Prepared, Session, open_run, prepare_again
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.top import in_circuit, unit_table
from relp_cli.studies.evaluating import own_circuit
from relp_cli.studies.features import feature_meanings


@dataclass(frozen=True)
class Exported:
    """rows: in the file. zeros: units at positions that are 0 in every pair and have no row. kept: rows in the circuit (None: the
    run has none).
    """

    rows: int
    zeros: int
    kept: int | None


def export_table(run: Path, file: Path) -> Exported:
    """Write kind, layer (of features: the site; of edges: the reader's), position, unit, score, se (over pairs), n and in_circuit
    (empty where the run has no circuit), in full precision.

    Raises: RelpError for a file that cannot be written and a circuit that is not of these scores.
    """
    check_file_writable(file)
    run_dir, _, scores = open_run(run)
    table = unit_table(scores)
    if not any(isinstance(unit, str) for unit in table.unit):
        table = table.astype({"unit": "Int64"})
    kept = None
    if run_dir.circuit.is_file():
        mask = in_circuit(scores, own_circuit(run_dir, scores))
        table["in_circuit"], kept = mask.numpy(), int(mask.sum())
    else:
        table["in_circuit"] = pd.array([pd.NA] * len(table), dtype="boolean")
    write_table(table, file)
    return Exported(len(table), scores.n_nodes - len(table), kept)


@dataclass(frozen=True)
class Drawn:
    """nodes, links: in the file. lost: units of the circuit at positions that the prompt does not have."""

    nodes: int
    links: int
    lost: int
    prompt: str


def export_graph(run: Path, file: Path, place: str | None = None, annotations: Path | None = None) -> Drawn:
    """Write the run's circuit as an attribution graph, over the first of its prompts that has most of its units' positions.

    Raises: RelpError for circuits without edges or positions, for a file that cannot be written, and a model that has changed.
    """
    check_file_writable(file)
    run_dir, spec, scores = open_run(run)
    if not run_dir.circuit.is_file():
        raise RelpError(f"run '{run}' has no circuit; select one: relp circuit {run} --top-k 50")
    circuit = own_circuit(run_dir, scores)
    check_drawable(circuit, str(run))
    session = Session(place)
    prepared = prepare_again(spec.model_copy(update={"only_correct": False}), scores, session)
    meanings = {}
    if SCORED in scores:
        said = feature_meanings(spec, session, prepared, scores, circuit, annotations, most=circuit.n_nodes)
        meanings = dict(zip(said["node"], said["meaning"], strict=True))
    prompt = _prompt(prepared, circuit)
    content, lost = attribution_graph(circuit, scores, prompt, file.stem, meanings)
    write_atomically(file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return Drawn(len(content["nodes"]), len(content["links"]), lost, prompt.text)


def _prompt(prepared: Prepared, circuit: Circuit) -> Prompt:
    used = dict(zip(circuit.labels, circuit.mask.sum(1).tolist(), strict=True))
    batch = max(prepared.pairs, key=lambda batch: sum(used.get(label, 0) for label in batch.labels))
    model, ids = prepared.model, batch.original[0].tolist()
    answer, foil = (values[0].flatten() for values in (batch.answer, batch.foil))
    answer, foil = answer[answer >= 0], foil[foil >= 0]
    with torch.no_grad():
        p = model.logits(batch.original[:1].to(model.device))[0].float().softmax(-1)
    probability = float(p[answer[:1] if batch.several else answer].sum())
    words = [_words(prepared, some.tolist(), batch.several) for some in (answer, foil)]
    metric = f"{prepared.metric}: {words[0]}" + (f" − {words[1]}" if len(foil) else "")
    metric += f" ({'first token: ' if batch.several else ''}p = {probability:.3f})"
    tokens = [_decoded(prepared, [i]) for i in ids]
    return Prompt(_decoded(prepared, ids), tokens, ids, batch.labels, int(answer[0]), probability, metric)


def _words(prepared: Prepared, ids: Sequence[int], several: bool) -> str:
    if several:
        return f'"{_decoded(prepared, ids)}"'
    shown = [f'"{_decoded(prepared, [i])}"' for i in ids[:3]]
    return ", ".join(shown) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def _decoded(prepared: Prepared, ids: Sequence[int]) -> str:
    tokenizer = prepared.model.tokenizer
    return " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(list(ids)))
