"""A circuit with edges in the JSON of attribution graphs, which circuit-tracer's viewer and Neuronpedia read.

The form (Neuronpedia's `graph-schema.json`): `metadata` with the prompt's tokens, `qParams`, `nodes` at (layer, feature,
ctx_idx), and `links` from source to target with a weight. Its layers are rows of a picture: a row is a site of features, or
a layer's heads or its MLP, in the order of a forward pass; `metadata.generation_settings.rows` says which is which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relp_cli.errors import RelpError
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.edges import edge_mask
from relp_cli.spaces.feature_graph import FeatureNode
from relp_cli.spaces.features import feature_nodes, sites_of
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.sites import Site
from relp_cli.spaces.units import ANY_POSITION

FEATURE, ERROR, TOKEN, LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"
HEAD, MLP = "attention head", "mlp"  # types of ours: viewers draw what they do not know as a feature


@dataclass(frozen=True)
class Prompt:
    """The prompt that a graph is drawn over. labels: of its positions. answer: the token that the logit node stands for.

    probability: the answer's, in the model. metric: in words, what edges into the logit node are effects on.
    """

    text: str
    tokens: Sequence[str]
    ids: Sequence[int]
    labels: Sequence[str]
    answer: int
    probability: float
    metric: str


@dataclass
class _Drawn:
    """nodes by key, in order; links; lost: kept units at positions that the prompt does not have."""

    prompt: Prompt
    rows: dict[str, str] = field(default_factory=dict)
    nodes: dict[Any, dict[str, Any]] = field(default_factory=dict)
    links: dict[tuple[Any, Any], dict[str, Any]] = field(default_factory=dict)
    lost: int = 0

    def at(self, label: str) -> int | None:
        return self.prompt.labels.index(label) if label in self.prompt.labels else None

    def node(self, key: Any, row: str, feature: int, at: int, kind: str, text: str, **more: Any) -> None:
        self.nodes[key] = {
            "node_id": f"{row}_{feature}_{at}", "feature": feature, "layer": row, "ctx_idx": at, "feature_type": kind,
            "token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0,
            "jsNodeId": f"{row}_{feature}-{at}", "clerp": text, "influence": None, "activation": None, **more,
        }  # fmt: skip

    def tokens(self) -> None:
        for at, (token, text) in enumerate(zip(self.prompt.ids, self.prompt.tokens, strict=True)):
            self.node(("token", at), "E", at, at, TOKEN, text, node_id=f"E_{token}_{at}", jsNodeId=f"E_{token}-{at}")

    def logit(self, row: int) -> None:
        p = self.prompt
        self.node(
            "logit",
            str(row),
            p.answer,
            len(p.tokens) - 1,
            LOGIT,
            p.metric,
            token_prob=p.probability,
            is_target_logit=True,
        )

    def link(self, source: Any, target: Any, weight: float, part: str = "") -> None:
        """Edges into a head's query, key and value are one link; its `parts` say which has how much."""
        link = self.links.setdefault((source, target), {"weight": 0.0})
        link["weight"] += weight
        if part:
            link.setdefault("parts", {})[part] = weight

    def content(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        ends = {key: node["node_id"] for key, node in self.nodes.items()}
        return {
            "metadata": metadata,
            "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
            "nodes": list(self.nodes.values()),
            "links": [{"source": ends[u], "target": ends[v], **link} for (u, v), link in self.links.items()],
        }


def check_drawable(circuit: Circuit, run: str) -> None:
    """Raises RelpError for circuits without edges, and without positions."""
    if circuit.units.space not in _DRAW:
        raise RelpError(
            f"an attribution graph has edges; this circuit is of {circuit.units.space} (score edges, or features)"
        )
    if circuit.units.space == "features" and circuit.edges is None:
        raise RelpError(
            f"this circuit's edges were not scored: relp circuit {run} --edge-threshold .01 with how it was selected"
        )
    if circuit.labels == ANY_POSITION:
        how = "--set positions=keep" if circuit.units.space == "edges" else "--aggregate none"
        raise RelpError(
            f"an attribution graph stands over a prompt's positions; this circuit has none ({how} keeps them)"
        )


def attribution_graph(
    circuit: Circuit, scores: Scores, prompt: Prompt, name: str, meanings: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], int]:
    """The graph's JSON, and how many of the circuit's units are at positions that the prompt does not have and left out.

    Weights are the edges' mean scores with their own sign. influence, of features: the share of the features' summed |score| that
    the feature and all stronger ones have, by which viewers prune. name: of the graph (`slug`). meanings: node → text.
    """
    drawn = _Drawn(prompt)
    drawn.tokens()
    _DRAW[circuit.units.space](drawn, circuit, scores, meanings or {})
    meta = circuit.meta
    metadata = {
        "slug": name,
        "scan": str(meta.get("model", "")).rstrip("/").rpartition("/")[2],
        "transcoder_list": [],
        "prompt_tokens": list(prompt.tokens),
        "prompt": prompt.text,
        "schema_version": 1,
        "info": {
            "description": f"A circuit of relp: weights are mean scores over pairs of {meta.get('task', 'a task')} "
            f"({meta.get('method', '?')}, {meta.get('direction', 'noising')}, {meta.get('metric', '?')}), not of this prompt; "
            + (
                "support of the behaviour is negative."
                if meta.get("direction", "noising") == "noising"
                else "support is positive."
            ),
            "generator": {"name": "relp"},
        },
        "generation_settings": {
            **{
                k: meta[k]
                for k in ("task", "method", "params", "direction", "metric", "revision", "dictionary")
                if k in meta
            },
            "rows": drawn.rows,
        },
        "pruning_settings": dict(meta.get("selection") or {}),
    }
    return drawn.content(metadata), drawn.lost


def _features(drawn: _Drawn, circuit: Circuit, scores: Scores, meanings: Mapping[str, str]) -> None:
    sites = sites_of(circuit.units).sites
    rows = _site_rows(sites)
    drawn.rows |= {row: site.name for site, row in rows.items()}
    nodes = feature_nodes(circuit)
    share = _shares([_size(scores, node) for node in nodes])
    for number, node in enumerate(nodes):
        at = drawn.at(node.position)
        if at is None:
            drawn.lost += 1
            continue
        plain = f"{node.site.name}/{'error' if node.feature is None else node.feature}"
        text = meanings.get(plain) or ("error term" if node.feature is None else "")
        feature, kind = (-1, ERROR) if node.feature is None else (node.feature, FEATURE)
        drawn.node(
            number, rows[node.site], feature, at, kind, f"{plain}{': ' if text else ''}{text}", influence=share[number]
        )
    drawn.logit(1 + max(int(row) for row in rows.values()))
    edges = circuit.edges
    for (u, v), weight in zip(edges.index.tolist(), edges.mean.tolist(), strict=True):
        target = "logit" if v == len(nodes) else v
        if u in drawn.nodes and target in drawn.nodes:
            drawn.link(u, target, weight)


def _site_rows(sites: Sequence[Site]) -> dict[Site, str]:
    """The model's own layers where each has one site at most; else the sites' numbers."""
    layers = [site.layer for site in sites]
    own = min(layers) >= 0 and len(set(layers)) == len(layers)
    return {site: str(site.layer if own else i) for i, site in enumerate(sites)}


def _size(scores: Scores, node: FeatureNode) -> float:
    view: Any = scores[next(iter(scores))]
    at = view.labels.index(node.position)
    return abs(
        float(
            view.errors()[view.at(node.site), at] if node.feature is None else view.dense(node.site)[at, node.feature]
        )
    )


def _shares(sizes: Sequence[float]) -> list[float]:
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    total, so_far, out = sum(sizes) or 1.0, 0.0, [0.0] * len(sizes)
    for i in order:
        so_far += sizes[i]
        out[i] = so_far / total
    return out


def _edges(drawn: _Drawn, circuit: Circuit, scores: Scores, _: Mapping[str, str]) -> None:
    graph: Graph = circuit.units.structure
    mean = graph.dense(scores.dense(scores.mean.double()))
    drawn.rows |= {
        str(2 * n + i): f"{what} {n}" for n in range(graph.n_layers) for i, what in enumerate(("heads", "MLP"))
    }
    drawn.logit(2 * graph.n_layers)
    for p, u, v in edge_mask(circuit).nonzero().tolist():
        at = drawn.at(circuit.labels[p])
        name, _, part = graph.readers[v].partition("<")
        if at is None:
            drawn.lost += 1
            continue
        ends = [_component(drawn, end, at) for end in (graph.writers[u], name)]
        drawn.link(ends[0], ends[1], float(mean[p, u, v]), part[:1])


def _component(drawn: _Drawn, name: str, at: int) -> Any:
    """The key of a writer or reader at a position; its node is made when it is first met."""
    if name == "logits":
        return "logit"
    if name == "input":
        return ("token", at)
    if (name, at) not in drawn.nodes:
        layer, _, head = name[1:].partition(".h")
        row, feature, kind = (2 * int(layer), int(head), HEAD) if head else (2 * int(layer) + 1, 0, MLP)
        drawn.node((name, at), str(row), feature, at, kind, name)
    return (name, at)


_DRAW = {"features": _features, "edges": _edges}
