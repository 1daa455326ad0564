"""Reading and writing the circuit files of EAP-IG (Hanna et al. 2024), which MIB's evaluator reads: `.json` and `.pt`.

JSON: `cfg` (n_layers, n_heads, parallel_attn_mlp, d_model), `nodes` name → {in_graph}, `edges` name → {score, in_graph}.
`.pt`: `cfg`, `src_nodes`, `dst_nodes`, and the matrices `edges_scores`, `edges_in_graph` [writer, reader], `nodes_in_graph`;
scores of nodes and neurons besides: `nodes_scores` [writer], `neurons_scores` [writer, d_model], NaN where nothing was scored.
Names and orders are the same there as here. The sign is not: MIB ranks edges with support of the behaviour positive, and our
noising scores have it negative. Files are written and read with support positive, and say what they were made from
(`cfg.relp`); scores of a file that does not say are taken to be of noising, and get its sign back.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.files import read_json, write_atomically
from relp_cli.models.model import Model
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.edges import EdgeScores, edge_circuit, edge_mask
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.scores import support_sign
from relp_cli.spaces.units import ANY_POSITION

SUPPORT_POSITIVE = "support positive"
PT_KEYS = ("cfg", "edges_scores", "edges_in_graph")


def export_circuit(
    path: str | Path, d_model: int, circuit: Circuit | None = None, scores: EdgeScores | None = None
) -> None:
    """Write a `.json` or `.pt` file. Without a circuit no edge is in (MIB selects by score); without scores kept edges
    have score 1 and others 0.

    Raises: RelpError for scores or circuits per position (the format has none), two graphs, or another suffix.
    """
    check_circuit_name(path)
    if circuit is None and scores is None:
        raise RelpError("nothing to export: neither a circuit nor scores")
    if any(x is not None and x.labels != ANY_POSITION for x in (circuit, scores)):
        raise RelpError("EAP-IG's files know no positions; score with positions=sum, or select with aggregate=sum")
    graph: Graph = circuit.units.structure if circuit is not None else scores.graph  # type: ignore[union-attr]
    if scores is not None and scores.graph != graph:
        raise RelpError("the circuit and the scores to export are of different graphs")
    kept = torch.zeros_like(graph.mask) if circuit is None else edge_mask(circuit)[0]
    values = kept.double() if scores is None else support_sign(scores.meta) * scores.mean.double()
    cfg = _cfg(graph, d_model, {} if scores is None else scores.meta)
    write_atomically(Path(path), _content(Path(path), graph, cfg, kept, values))


def _cfg(graph: Graph, d_model: int, meta: Mapping[str, Any]) -> dict[str, Any]:
    about = {k: meta[k] for k in ("method", "metric", "direction", "signed") if k in meta}
    return {
        "n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel, "d_model": d_model,
        "post_norm": graph.post_norm, "relp": {"sign": SUPPORT_POSITIVE, **about},
    }  # fmt: skip


def export_writers(
    path: Path, graph: Graph, d_model: int, scores: Float[Tensor, "writer ..."], meta: Mapping[str, Any]
) -> None:
    """Write a `.pt` file of scores of nodes, or of the dimensions of what they write (MIB's neurons), in the sign of `meta`;
    NaN where nothing was scored. No edge and no node is in: MIB selects by score.
    """
    what = "nodes_scores" if scores.ndim == 1 else "neurons_scores"
    content = _matrices(graph, _cfg(graph, d_model, meta), torch.zeros_like(graph.mask), torch.zeros(graph.mask.shape))
    content[what] = (support_sign(meta) * scores).float()
    if scores.ndim == 2:
        content["neurons_in_graph"] = torch.zeros(scores.shape, dtype=torch.bool)
    write_atomically(path, _saved(content))


def _matrices(graph: Graph, cfg: dict[str, Any], kept: Tensor, values: Tensor) -> dict[str, Any]:
    return {
        "cfg": cfg, "src_nodes": list(graph.writers), "dst_nodes": list(graph.readers), "edges_scores": values.float(),
        "edges_in_graph": kept, "nodes_in_graph": kept.any(1),  # a node is in where it writes along a kept edge
    }  # fmt: skip


def _saved(content: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _content(path: Path, graph: Graph, cfg: dict[str, Any], kept: Tensor, values: Tensor) -> bytes | str:
    if path.suffix == ".json":
        named = {name: {"in_graph": bool(i)} for name, i in zip(graph.writers, kept.any(1), strict=True)}
        at = graph.mask.nonzero().tolist()
        edges = {graph.name(u, v): {"score": values[u, v].item(), "in_graph": bool(kept[u, v])} for u, v in at}
        return json.dumps({"cfg": cfg, "nodes": named | {"logits": {"in_graph": True}}, "edges": edges})
    if path.suffix == ".pt":
        return _saved(_matrices(graph, cfg, kept, values))
    raise AssertionError(path)  # `check_circuit_name` lets no other pass


def check_circuit_name(path: str | Path) -> None:
    """Raises RelpError for a name without one of the two suffixes."""
    if Path(path).suffix not in (".json", ".pt"):
        raise RelpError(f"circuit file {path}: expected a name that ends in .json or .pt")


def import_circuit(path: str | Path, model: Model | None = None) -> tuple[Circuit, EdgeScores]:
    """The circuit (edges that are in) and the scores of a `.json` or `.pt` file; `.pt` is read with weights_only.

    model: whose graph the file must have. Raises: RelpError for what is no such file, another graph, or circuits of
    neurons.
    """
    file = Path(path)
    check_circuit_name(file)
    try:
        cfg, kept, values = _from_json(file) if file.suffix == ".json" else _from_pt(file)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RelpError(
            f"circuit file {path}: not a circuit file of EAP-IG ({type(error).__name__}: {error})"
        ) from error
    graph = _graph(file, cfg)
    if model is not None:
        theirs = Graph.of(model.shape)
        if replace(graph, post_norm=theirs.post_norm) != theirs:
            raise RelpError(f"circuit file {path}: its graph ({graph.n_layers} layers of {graph.n_heads} heads"
                            f"{', parallel' if graph.parallel else ''}) is not that of {model.name}")  # fmt: skip
        graph = theirs
    meta = {
        "method": "imported",
        "file": file.name,
        "d_model": cfg.get("d_model"),
        **_origin(file, cfg.get("relp", {})),
    }
    if kept.shape != graph.mask.shape or values.shape != graph.mask.shape:
        raise RelpError(f"circuit file {path}: matrices {list(values.shape)} for a graph of {list(graph.mask.shape)}")
    stray = ((kept | (values != 0)) & ~graph.mask).nonzero().tolist()
    if stray:
        raise RelpError(f"circuit file {path}: {graph.name(*stray[0])} is no edge (reads before it is written)")
    if not torch.isfinite(values).all():
        raise RelpError(
            f"circuit file {path}: {graph.name(*(~torch.isfinite(values)).nonzero()[0].tolist())} has no finite score"
        )
    circuit = edge_circuit(graph, kept, ANY_POSITION, **meta)
    mean = support_sign(meta) * values.double()
    unknown_variance = torch.where(graph.mask, torch.nan, torch.zeros_like(mean))
    return circuit, EdgeScores(graph, mean, unknown_variance, torch.ones(1, dtype=torch.long), meta=meta)


def is_eap_ig(path: str | Path) -> bool:
    """Whether a file is a `.pt`, or a JSON file with the keys of EAP-IG's circuits."""
    if Path(path).suffix == ".pt":
        return True
    content = read_json(path, "circuit file")
    return isinstance(content, dict) and {"cfg", "nodes", "edges"} <= content.keys()


def _origin(path: Path, about: Any) -> dict[str, Any]:
    """What a file says its scores were made from; without a word, signed scores of noising."""
    known = {"sign": (SUPPORT_POSITIVE,), "direction": ("noising", "denoising"), "signed": (True, False)}
    for key, values in known.items():
        if key in about and about[key] not in values:
            raise RelpError(f"circuit file {path}: cfg.relp.{key} is {about[key]!r}, expected one of {values}")
    origin = {"direction": about.get("direction", "noising"), "signed": about.get("signed", True)}
    origin["file_sign"] = SUPPORT_POSITIVE if about else f"not recorded; taken as {SUPPORT_POSITIVE}"
    return origin | {k: about[k] for k in ("metric",) if k in about}


def _graph(path: Path, cfg: Any) -> Graph:
    counts = {key: cfg[key] for key in ("n_layers", "n_heads")}
    for key, value in counts.items():
        if type(value) is not int or value < 1:
            raise RelpError(f"circuit file {path}: cfg.{key} is {value!r}, expected a whole number from 1 up")
    flags = {key: cfg.get(key, False) if key == "post_norm" else cfg[key] for key in ("parallel_attn_mlp", "post_norm")}
    for key, value in flags.items():
        if type(value) is not bool:
            raise RelpError(f"circuit file {path}: cfg.{key} is {value!r}, expected true or false")
    try:
        return Graph(counts["n_layers"], counts["n_heads"], *flags.values())
    except RelpError as error:
        raise RelpError(f"circuit file {path}: {error}") from error


def _from_json(path: Path) -> tuple[dict[str, Any], Tensor, Tensor]:
    content = read_json(path, "circuit file")
    graph, listed = _graph(path, content["cfg"]), content["edges"]
    if len(listed) < graph.n_edges:  # before anything of the graph's size is formed
        missing = next(name for name in graph.each_edge() if name not in listed)
        raise RelpError(
            f"circuit file {path}: edge {missing} is missing ({len(listed)} of {graph.n_edges} edges are there)"
        )
    if any(isinstance(node, dict) and not all(node.get("neurons") or [True]) for node in content["nodes"].values()):
        raise RelpError(f"circuit file {path}: it is a circuit of neurons; only edges can be read")
    kept, values = torch.zeros_like(graph.mask), torch.zeros(graph.mask.shape, dtype=torch.float64)
    for name, edge in listed.items():
        writer, _, reader = name.partition("->")
        try:
            at = graph.writer(writer), graph.reader(reader)
        except RelpError as error:
            raise RelpError(f"circuit file {path}: edge {name}: {error}") from error
        if not graph.mask[at]:
            raise RelpError(f"circuit file {path}: {name} is no edge (reads before it is written)")
        if type(edge["in_graph"]) is not bool:
            raise RelpError(
                f"circuit file {path}: edge {name}: in_graph is {edge['in_graph']!r}, expected true or false"
            )
        if type(edge["score"]) not in (int, float):
            raise RelpError(f"circuit file {path}: edge {name}: score is {edge['score']!r}, expected a number")
        kept[at], values[at] = edge["in_graph"], edge["score"]
    return content["cfg"], kept, values


def import_writers(path: Path) -> tuple[Graph, Tensor | None]:
    """The graph of a `.pt` file, and its scores of nodes, Float[writer], or neurons, Float[writer, d_model] (None: it has none).

    Raises: RelpError for another shape, for infinite scores and for no score at all.
    """
    content = _load_pt(path)
    graph, width = _graph(path, content["cfg"]), content["cfg"].get("d_model")
    for key, shape in (("neurons_scores", (len(graph.writers), width)), ("nodes_scores", (len(graph.writers),))):
        scores = content.get(key)
        if scores is None:
            continue
        if tuple(scores.shape) != shape:
            raise RelpError(f"circuit file {path}: {key} of shape {list(scores.shape)}, expected {list(shape)}")
        if scores.isinf().any() or scores.isnan().all():
            raise RelpError(f"circuit file {path}: {key} has {'no' if scores.isnan().all() else 'an infinite'} score")
        return graph, scores
    return graph, None


def _from_pt(path: Path) -> tuple[dict[str, Any], Tensor, Tensor]:
    content = _load_pt(path)
    graph, neurons = _graph(path, content["cfg"]), content.get("neurons_in_graph")
    if neurons is not None and not neurons.bool().all():
        raise RelpError(f"circuit file {path}: it is a circuit of neurons; only edges can be read")
    for key, names in (("src_nodes", graph.writers), ("dst_nodes", graph.readers)):
        if key in content and tuple(content[key]) != names:
            raise RelpError(f"circuit file {path}: its {key} are not in the order of EAP-IG's graph")
    if content["edges_in_graph"].dtype != torch.bool:
        raise RelpError(
            f"circuit file {path}: edges_in_graph is {content['edges_in_graph'].dtype}, expected torch.bool"
        )
    return content["cfg"], content["edges_in_graph"], content["edges_scores"]


def _load_pt(path: Path) -> dict[str, Any]:
    """What a `.pt` file holds. Raises RelpError for one that cannot be read, is no circuit, or holds more than plain values."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise RelpError(f"circuit file {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise RelpError(f"circuit file {path}: it holds more than tensors and plain values; not read") from error
    except (RuntimeError, EOFError) as error:
        raise RelpError(f"circuit file {path} cannot be read ({str(error).splitlines()[0][:120]})") from error
    missing = [key for key in PT_KEYS if key not in content]
    if missing:
        raise RelpError(f"circuit file {path}: expected keys {', '.join(PT_KEYS)}; missing {', '.join(missing)}")
    return content
