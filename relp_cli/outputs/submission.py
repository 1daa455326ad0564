"""A submission to MIB's leaderboard: one folder `task_model` per data set and model, each with one file of scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.edges.exchange import export_circuit, export_writers, import_circuit, import_writers
from relp_cli.errors import RelpError, nearest
from relp_cli.evaluation.mib import without_positions
from relp_cli.files import check_writable
from relp_cli.runs.scoring import Session, open_run
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.scores import Scores

MOST_BYTES = 50 * 10**6  # of a folder
FILE = "importances.pt"
TASKS = {  # MIB's data sets → their names in a submission
    "ioi": "ioi", "copycolors_mcqa": "mcqa", "arithmetic_addition": "arithmetic-addition",
    "arithmetic_subtraction": "arithmetic-subtraction", "arc_easy": "arc-easy", "arc_challenge": "arc-challenge",
}  # fmt: skip


@dataclass(frozen=True)
class Submitted:
    """A model of the leaderboard: the last part of its name on the hub, and its graph."""

    hub: str
    n_layers: int
    n_heads: int


MODELS = {
    "gpt2": Submitted("gpt2", 12, 12),
    "qwen2.5": Submitted("qwen2.5-0.5b", 24, 14),
    "gemma2": Submitted("gemma-2-2b", 26, 8),
    "llama3": Submitted("llama-3.1-8b", 32, 32),
}
LEVELS = {("edges",): "edge", ("head", "mlp_out"): "node", ("mlp_dim",): "neuron"}  # what of ours MIB's files can hold


def export_submission(run: Path, folder: Path, name: str | None = None, place: str | None = None) -> Path:
    """Write a run's scores into `folder`/`name` (None: from its task and model) and check the file. Returns the file.

    Raises: RelpError for scores that MIB's files cannot hold, for a name that is none, or of another model's graph, and
    for a folder that would be larger than MIB takes.
    """
    _, spec, scores = open_run(run)
    level = level_of(scores)
    name = checked_name(_name_of(str(scores.meta["task"]), spec.model, run) if name is None else name)
    file = folder / name / FILE
    check_writable(file)
    if others := [path for path in _files(file.parent) if path != file]:
        raise RelpError(
            f"{file.parent} holds {others[0].name} already; MIB takes one file of scores for each task_model"
        )
    if level == "edge":
        edges = without_positions(scores)["edges"]
        _check_graph(name, edges.graph)
        export_circuit(file, int(edges.meta["d_model"]), None, edges)
    else:
        shape = Session(place).model(spec.model, spec.dtype).shape
        graph = Graph.of(shape)
        _check_graph(name, graph)
        export_writers(file, graph, shape.d_model, _by_writer(scores, graph, shape.d_model), scores.meta)
    try:
        checked_folder(file.parent)
    except RelpError:  # what cannot be submitted is not left there
        file.unlink()
        file.parent.rmdir()
        raise
    return file


def level_of(scores: Scores) -> str:
    """edge, node or neuron. Raises RelpError for other units."""
    kinds = tuple(sorted(scores))
    if kinds not in LEVELS:
        known = " or ".join(",".join(kinds) for kinds in LEVELS)
        raise RelpError(f"MIB's files hold no scores of {', '.join(scores)}; expected a run of --nodes {known}")
    return LEVELS[kinds]


def _by_writer(scores: Scores, graph: Graph, d_model: int) -> Float[Tensor, "writer ..."]:
    """Scores in the order of writers; NaN for those that were not scored, which MIB keeps in every circuit."""
    summed = without_positions(scores)
    if "mlp_dim" in summed:
        out = torch.full((len(graph.writers), d_model), torch.nan, dtype=torch.float64)
        out[[graph.writer(f"m{n}") for n in range(graph.n_layers)]] = summed["mlp_dim"].mean[:, 0].double()
        return out
    out = torch.full((len(graph.writers),), torch.nan, dtype=torch.float64)
    for layer in range(graph.n_layers):
        out[graph.heads_of(layer)] = summed["head"].mean[layer, 0].double()
        out[graph.writer(f"m{layer}")] = summed["mlp_out"].mean[layer, 0].double()
    return out


def _name_of(task: str, model: str, run: Path) -> str:
    """`task_model` of MIB's. Raises RelpError where it has no such task or model."""
    plain = Path(model.partition("@")[0]).name.lower()
    short = TASKS.get(task.lower())
    known = next((name for name, row in MODELS.items() if row.hub == plain), None)
    if short is None or known is None:
        which = f"task '{task}'" if short is None else f"model '{model}'"
        raise RelpError(f"run '{run}': MIB's leaderboard has no {which}; name the folder that it is for: --as ioi_gpt2")
    return f"{short}_{known}"


def checked_name(name: str) -> str:
    """Raises RelpError for what is no `task_model` with a task of MIB's."""
    task, under, model = name.partition("_")
    if not (under and model and name == Path(name).name and not name.startswith(".")):
        raise RelpError(f"--as '{name}': expected task_model, for example ioi_gpt2")
    if task not in TASKS.values():
        raise RelpError(f"--as '{name}': unknown task '{task}'{nearest(task, TASKS.values())}")
    return name


def _check_graph(name: str, graph: Graph) -> None:
    row = MODELS.get(name.partition("_")[2])
    if row is not None and (row.n_layers, row.n_heads) != (graph.n_layers, graph.n_heads):
        raise RelpError(
            f"{name}: {row.hub} has {row.n_layers} layers of {row.n_heads} heads, these scores are of {graph.n_layers} layers "
            f"of {graph.n_heads}"
        )


def checked_folder(folder: Path) -> dict[str, Any]:
    """A row on one `task_model` folder: level, how many units are scored, megabytes.

    Raises: RelpError for what the leaderboard would not take.
    """
    checked_name(folder.name)
    files = _files(folder)
    if len(files) != 1:
        raise RelpError(f"{folder}: {len(files)} files that end in .pt or .json; expected one file of scores")
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    if size > MOST_BYTES:
        raise RelpError(f"{folder}: {size / 10**6:.1f} MB, MIB takes {MOST_BYTES // 10**6} MB; export a .pt file")
    graph, scores = import_writers(files[0]) if files[0].suffix == ".pt" else (None, None)
    if scores is None:
        circuit, edges = import_circuit(files[0])
        graph, level, scored = circuit.units.structure, "edge", edges.n_edges
        ranked = edges.mean[edges.mask]
    else:
        level, scored = ("node", "neuron")[scores.ndim - 1], int((~scores.isnan()).sum())
        ranked = scores[~scores.isnan()]
    assert graph is not None  # of either sort of file
    _check_graph(folder.name, graph)
    if (ranked == ranked[0]).all():
        raise RelpError(f"{folder}: all scores are {ranked[0].item() + 0.0:g}; they rank nothing")
    return {"folder": folder.name, "level": level, "scored": scored, "MB": round(size / 10**6, 2)}


def checked_submission(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per `task_model` folder, and what the leaderboard asks that is not there yet.

    Raises: RelpError for a folder that it would not take.
    """
    rows = [checked_folder(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    if not rows:
        raise RelpError(f"{folder}: no task_model folder in it")
    tasks, models = ({row["folder"].partition("_")[part] for row in rows} for part in (0, 2))
    notes = [
        f"MIB's leaderboard takes submissions of at least 2 {what}; there is {len(there)} ({', '.join(sorted(there))})"
        for what, there in (("tasks", tasks), ("models", models))
        if len(there) < 2
    ]
    strange = sorted(models - set(MODELS))
    if strange:
        notes.append(f"WARNING: MIB's leaderboard has no model {', '.join(strange)} (it has {', '.join(MODELS)})")
    if len({row["level"] for row in rows}) > 1:
        notes.append("WARNING: a submission is of one level; these folders hold several")
    return rows, notes


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in (".pt", ".json"))
